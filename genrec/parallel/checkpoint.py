"""Checkpoints of sharded runs: folders that any number of ranks, tensor-parallel or not, and strategy "auto" can load.

`python -m genrec.parallel.checkpoint FOLDER OUT.ckpt` writes a folder's content as a file for strategy "auto".
The format is described in docs/parallelism.md.
"""

from __future__ import annotations

import io
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from genrec.parallel import _folders, _pieces
from genrec.parallel._data_parallel import distributed_parts
from genrec.parallel._folders import META, TABLES, coordination_group, on_all, on_first
from genrec.parallel._sources import FileSource, FolderSource, whole_checkpoint
from genrec.parallel._state import (
    Reads,
    Shards,
    fused_rates,
    model_state,
    optimizer_pieces,
    parameter_groups,
    plan_model,
    plan_optimizers,
)

RNG = "rng_state"
"""Key of the checkpoint dict under which `load` gives this rank's random states: see `restore_rng`."""

_NOT_META = ("state_dict", "optimizer_states")


# Saving ---------------------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    *,
    shard_dims: Mapping[str, int] | None = None,
    async_save: bool = False,
) -> None:
    """Save a run as a folder. Every rank calls it; what was at `path` stays valid until the new one is complete.

    Args:
        path: The folder, on a file system that all ranks share.
        checkpoint: Lightning's checkpoint dict. Its "state_dict" and "optimizer_states" are not looked at.
        module: The LightningModule, its tables sharded in place.
        optimizers: Whose states are saved; those of tables that update themselves come with the module. Empty: the
            weights alone.
        shard_dims: Name of each tensor-parallel parameter -> dimension along which it is cut.
        async_save: Copy everything now and write in the background. The next save, load, removal or `wait` waits for it
            and raises what went wrong.

    Raises:
        ValueError: The path is not on a file system, or an optimizer trains parameters that the module doesn't have.
        RuntimeError: A rank could not write; every rank raises. What was there before is still there.
    """
    wait()
    group = coordination_group("checkpoint-async" if async_save else "checkpoint")
    target = Path(on_first(lambda: _local(path), group))
    job = _Save(target, dict(checkpoint), module, list(optimizers), _shards(shard_dims), group)
    data = on_first(lambda: _folders.begin(target), group)
    if async_save:
        _pending.start(job.later(data))
    else:
        job.now(data)


class _Save:
    """One save: takes what is to be written, writes it, makes it the checkpoint."""

    def __init__(
        self, path: Path, checkpoint: dict[str, Any], module: nn.Module, optimizers: list[Optimizer], shards: Shards,
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        self.path, self.module, self.group = path, module, group
        for part in distributed_parts(optimizers):
            part.collect_state()
        self.info = {
            "global_step": checkpoint.get("global_step"),
            "epoch": checkpoint.get("epoch"),
            "tensor_parallel_size": shards.size,
        }

        def collect() -> Any:
            _, self.pieces, extra = model_state(module, shards)
            groups: list[Any] = []
            if optimizers:
                self.pieces += optimizer_pieces(module, optimizers, shards)
                groups = parameter_groups(module, optimizers)
            return extra, groups, fused_rates(module) if optimizers else {}, rng_state()

        ranks = on_all(collect, group)
        self.meta = _meta(checkpoint, ranks, shards.size) if _folders.rank() == 0 else b""

    def now(self, data: str) -> None:
        folder = self.path / data

        def write() -> None:
            _pieces.write(self.pieces, folder, self.group)
            on_all(lambda: _write_tables(_table_states(self.module), folder), self.group)
            on_first(lambda: self._finish(folder, _table_scalars(self.module)), self.group)

        self._guarded(write, data)

    def later(self, data: str) -> Callable[[], None]:
        """Copy now; what it returns writes."""
        folder = self.path / data
        future = _pieces.write_later(self.pieces, folder, self.group)
        tables, scalars = list(_table_states(self.module)), _table_scalars(self.module)
        self.pieces = []

        def write() -> None:
            future.result()
            on_all(lambda: _write_tables(tables, folder), self.group)
            on_first(lambda: self._finish(folder, scalars), self.group)

        return lambda: self._guarded(write, data)

    def _finish(self, folder: Path, scalars: dict[str, Any]) -> None:
        from genrec.embedding.hkv.checkpoint import write_manifest

        with open(folder / META, "wb") as file:
            file.write(self.meta)
            file.flush()
            os.fsync(file.fileno())
        if scalars:
            write_manifest(scalars, folder / TABLES, "data")
        _folders.commit(self.path, folder.name, self.info)

    def _guarded(self, write: Callable[[], None], data: str) -> None:
        try:
            write()
        except (Exception, CheckpointException) as error:
            if _folders.rank() == 0:
                _folders.discard(self.path, data)
            raise RuntimeError(f"The checkpoint '{self.path}' could not be saved: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error) or repr(error)
    return "; ".join(f"rank {number}: {wrapped[0]!r}" for number, wrapped in sorted(failures.items()))


def _meta(checkpoint: dict[str, Any], ranks: list[Any], tensor_parallel_size: int) -> bytes:
    """meta.pt: all that is no tensor of the model or of an optimizer. Warns of what a safe load would refuse."""
    extra, groups, _, _ = ranks[0]
    for _, others, _, _ in ranks[1:]:
        for own, more in zip(groups, others, strict=True):
            # Ranks without a part of a table don't know its group.
            known = {name for group in own for name in group["params"]}
            own += [{**group, "params": names} for group in more if (names := [*{*group["params"]} - known])]
    content = {
        "checkpoint": {key: value for key, value in checkpoint.items() if key not in _NOT_META},
        "extra_state": extra,
        "groups": groups,
        "groups_of_first_rank": [len(group) for group in ranks[0][1]],
        "rates": {name: rate for _, _, rates, _ in ranks for name, rate in rates.items()},
        "rng": [state for *_, state in ranks],
        "tensor_parallel_size": tensor_parallel_size,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        warnings.warn(
            "This checkpoint will load with weights_only=False alone: a callback, the hyper-parameters or the "
            f"datamodule put in an object that is not plain data. {str(error).splitlines()[0]}",
            stacklevel=2,
        )
    return buffer.getvalue()


def _table_states(module: nn.Module) -> Any:
    from genrec.embedding.hkv.checkpoint import find_tables
    from genrec.embedding.hkv.state import table_state

    return ((name, table_state(table)) for name, table in find_tables(module).items())


def _table_scalars(module: nn.Module) -> dict[str, Any]:
    from genrec.embedding.hkv.checkpoint import find_tables
    from genrec.embedding.hkv.state import table_scalars

    return {name: table_scalars(table) for name, table in find_tables(module).items()}


def _write_tables(states: Any, folder: Path) -> None:
    from genrec.embedding.hkv.checkpoint import write_shares

    states = iter(states)
    first = next(states, None)
    if first is not None:
        write_shares((state for part in ([first], states) for state in part), folder / TABLES / "data", _folders.rank())


# Waiting and removing -------------------------------------------------------------------------------------------------


class _Pending:
    """The save that is being written in the background, and what is to be removed once it is complete."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._removals: list[Path] = []

    def start(self, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
                for path in self._removals:
                    _folders.remove(path)
            except BaseException as error:
                self._error = error

        # Not a daemon: a process that ends finishes its checkpoint.
        self._thread = threading.Thread(target=run, name="genrec-checkpoint")
        self._thread.start()

    def remove_after(self, path: Path) -> bool:
        if self._thread is None or not self._thread.is_alive():
            return False
        self._removals.append(path)
        return True

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        error, leftover = self._error, [] if self._error else self._removals
        self._thread, self._error, self._removals = None, None, []
        if error is not None:
            raise error
        for path in leftover:
            # Asked for when the thread was past them.
            _folders.remove(path)


_pending = _Pending()


def wait() -> None:
    """Wait for the asynchronous save, if there is one, and raise what went wrong in it. Every rank calls it."""
    _pending.wait()


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint: a folder, a file or a link. Every rank may call it; the first one acts.

    While a save is being written in the background, older checkpoints stay until it is complete.
    """
    if _folders.rank() == 0 and not _pending.remove_after(Path(path)):
        _folders.remove(Path(path))


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizers: Sequence[Optimizer] = (),
    *,
    shard_dims: Mapping[str, int] | None = None,
    weights_only: bool | None = None,
    fallback: bool = True,
    strict: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint of any number of ranks, or a `.ckpt` file of strategy "auto", in place. Every rank calls it.

    Args:
        path: The folder or file.
        module: As for `save`.
        optimizers: Whose states are loaded. Empty: the weights alone.
        shard_dims: As for `save`.
        weights_only: Refuse objects that are not plain data (None: torch's default, which is yes). Tensors are always
            read safely.
        fallback: Where the folder is incomplete, take the newest complete one beside it, and warn of it.
        strict: The checkpoint and the module must have the same tensors.

    Returns:
        Lightning's checkpoint dict without what is loaded already, with `RNG` where the folder has it.

    Raises:
        FileNotFoundError: There is no complete checkpoint; the message names what is missing.
        ValueError: A file is damaged, or the checkpoint doesn't fit the module or its optimizers.
    """
    wait()
    group = coordination_group()
    chosen, manifest = on_first(lambda: _folders.find(Path(_local(path)), fallback), group)
    shards = _shards(shard_dims)
    from genrec.embedding.hkv.checkpoint import find_tables, load_tables

    source: Any = None

    def plan() -> None:
        nonlocal source
        if manifest is None:
            source = FileSource(chosen, module, optimizers, weights_only)
        else:
            source = FolderSource(chosen / manifest["data"], group, weights_only)
        reads.append(Reads(source))
        plan_model(reads[0], module, shards, source.extra, strict)
        if optimizers and not source.groups:
            raise ValueError(f"The checkpoint '{chosen}' holds the weights alone, no optimizer states.")
        if optimizers:
            plan_optimizers(reads[0], module, optimizers, shards, source.rates)

    def finish() -> None:
        reads[0].finish()
        if manifest is not None and find_tables(module):
            load_tables(module, chosen / manifest["data"] / TABLES)

    reads: list[Reads] = []
    on_all(plan, group)
    try:
        source.read(reads[0].pieces)
    except CheckpointException as error:
        raise ValueError(f"The checkpoint '{chosen}' could not be read: {_reason(error)}.") from error
    on_all(finish, group)
    for part in distributed_parts(optimizers):
        part.spread_state()
    _say(f"Loaded '{chosen}'" + (f": {_folders.describe(manifest)}." if manifest else " (of one process)."))
    checkpoint = source.checkpoint
    if "lr_schedulers" in checkpoint:
        checkpoint["lr_schedulers"] = source.schedulers(module, optimizers)
    if (state := _own_rng(source, shards)) is not None:
        checkpoint[RNG] = state
    return checkpoint


def _say(message: str) -> None:
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(message)


def _shards(dims: Mapping[str, int] | None) -> Shards:
    from genrec.parallel import megatron

    if not megatron.is_initialized():
        return Shards()
    return Shards(dims or {}, megatron.tensor_parallel_rank(), megatron.tensor_parallel_size())


def _local(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"'{text}': checkpoints of sharded runs need a file system that all ranks share, not a URL.")
    return os.path.abspath(text)


# Random numbers -------------------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """States of the random number generators of this process (Python, NumPy, torch, its GPU), as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(checkpoint: Mapping[str, Any]) -> None:
    """Make the random number generators what they were at the save, from what `load` returned.

    To be called just before the first batch: whatever draws in between would otherwise be seen.
    """
    state = checkpoint.get(RNG)
    if state is None:
        return
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _own_rng(source: Any, shards: Shards) -> dict[str, Any] | None:
    """The state of the saved rank with this one's place; None where there was no such rank."""
    saved, size = source.rng, source.tensor_parallel_size
    data_rank, place = divmod(_folders.rank(), shards.size)
    number = data_rank * size + min(place, size - 1)
    return saved[number] if number < len(saved) and len(saved) // size == _folders.world_size() // shards.size else None


# Conversion -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
    """A folder's content as the checkpoint dict of one process, whole tensors in memory.

    Args:
        path: The folder.
        weights_only: As for `load`.

    Raises:
        FileNotFoundError, ValueError: As `load`.
    """
    chosen, manifest = _folders.find(Path(_local(path)), fallback=False)
    if manifest is None:
        raise ValueError(f"'{chosen}' is a file, not a checkpoint folder: load it with torch.load.")
    return whole_checkpoint(chosen / manifest["data"], weights_only)


def as_file(path: str | os.PathLike[str], weights_only: bool | None = None) -> io.BytesIO:
    """A folder's content as the file that `torch.save` would write of `read_checkpoint`."""
    buffer = io.BytesIO()
    torch.save(read_checkpoint(path, weights_only), buffer)
    buffer.seek(0)
    return buffer


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) not in (1, 2) or words[0] in ("-h", "--help"):
        print("usage: python -m genrec.parallel.checkpoint FOLDER [OUT.ckpt]", file=sys.stderr)
        return 2
    try:
        manifest = _folders.read_manifest(Path(words[0]))
        print(f"{words[0]}: {_folders.describe(manifest)}, {sum(manifest['files'].values()):,} bytes")
        if len(words) == 2:
            content, out = read_checkpoint(words[0]), Path(words[1])
            partial = out.with_name(f".{out.name}.part")
            torch.save(content, partial)
            os.replace(partial, out)
            tensors = [value for value in content["state_dict"].values() if isinstance(value, Tensor)]
            print(f"{out}: {len(tensors)} tensors, {out.stat().st_size:,} bytes, for strategy 'auto'")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
