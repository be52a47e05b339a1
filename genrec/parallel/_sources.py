"""Checkpoints as sources of named tensors: folders of sharded runs, files of strategy "auto"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from genrec._optimizer_names import driven, named_state, parameter_names
from genrec.parallel import _pieces
from genrec.parallel._folders import META, TABLES
from genrec.parallel._pieces import Piece
from genrec.parallel._state import BY_COLUMNS, Columns


def _read(path: Path, weights_only: bool | None) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        hint = ""
        if "weights_only" in str(error):
            # Lightning does not hand on what fit(weights_only=False) says to strategies that load after their setup.
            hint = (
                " It holds more than plain data: if you trust it, load with weights_only=False; under a sharded "
                "Trainer with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment."
            )
        raise ValueError(f"'{path}' can't be read: {str(error).splitlines()[0]}{hint}") from error


class _Source:
    """What both kinds have beside their tensors.

    Attributes:
        checkpoint: Lightning's dict without the tensors.
        extra: What is no tensor in the module's state_dict, by name.
        groups: Options of all trained parameters, as groups of names.
        layout: The groups of each optimizer as the schedulers of the saved run saw them.
        rates: Of tables that update themselves, by name.
        rng: Random states of the saved ranks.
    """

    checkpoint: dict[str, Any]
    extra: dict[str, Any]
    groups: list[dict[str, Any]]
    layout: list[list[dict[str, Any]]]
    rates: dict[str, float]
    rng: list[dict[str, Any]]
    tensor_parallel_size: int

    def schedulers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> list[Any]:
        """States of the schedulers: what they keep for each group, for the groups that there are now."""
        states = self.checkpoint["lr_schedulers"]
        if not optimizers or not self.layout:
            return states
        names = parameter_names(module)
        out = []
        for number, state in enumerate(states):
            place = min(number, len(optimizers) - 1, len(self.layout) - 1)
            present = [(group, {names.get(id(w)) for w in weights}) for group, weights in driven(optimizers[place])]
            saved = [set(group["params"]) for group in self.layout[place]]
            out.append(_fit_schedule(state, saved, present))
        return out


def _fit_schedule(state: Any, saved: list[set[str]], present: list[tuple[dict[str, Any], set[Any]]]) -> Any:
    if not isinstance(state, Mapping) or saved == [names for _, names in present]:
        return state
    fitted: dict[str, Any] = {}
    for key, value in state.items():
        if key == "_schedulers":
            fitted[key] = [_fit_schedule(inner, saved, present) for inner in value]
        elif key in ("base_lrs", "_last_lr"):
            fitted[key] = [group.get("initial_lr" if key == "base_lrs" else "lr") for group, _ in present]
        elif isinstance(value, list) and len(value) == len(saved):
            places = [next((i for i, old in enumerate(saved) if old & names), 0) for _, names in present]
            fitted[key] = [value[place] for place in places]
        else:
            fitted[key] = value
    return fitted


class FolderSource(_Source):
    """A complete data folder of a sharded run.

    Args:
        folder: The data folder.
        group: The ranks that read together.
        weights_only: Read plain data alone (None: torch's default, which is that).
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup | None, weights_only: bool | None) -> None:
        self._folder, self._group = folder, group
        self._metadata = _pieces.read_metadata(folder)
        self.sizes, self.dtypes = _pieces.sizes(self._metadata), _pieces.dtypes(self._metadata)
        meta = _read(folder / META, weights_only)
        self.checkpoint, self.extra = meta["checkpoint"], meta["extra_state"]
        self.layout = [
            groups[:count] for groups, count in zip(meta["groups"], meta["groups_of_first_rank"], strict=True)
        ]
        self.optimizer_groups: list[list[dict[str, Any]]] = meta["groups"]
        self.groups = [group for groups in meta["groups"] for group in groups]
        self.rates, self.rng, self.tensor_parallel_size = meta["rates"], meta["rng"], meta["tensor_parallel_size"]

    def columns(self, name: str) -> list[int]:
        """Widths of the column shards in which a table's weight was saved."""
        chunks = self._metadata.state_dict_metadata[f"model.{name}"].chunks  # type: ignore[union-attr]
        widths = {chunk.offsets[1]: chunk.sizes[1] for chunk in chunks}
        return [widths[offset] for offset in sorted(widths)]

    def read(self, pieces: list[Piece]) -> None:
        """Fill the pieces."""
        _pieces.read(pieces, self._folder, self._group)


class FileSource(_Source):
    """A `.ckpt` file of strategy "auto".

    Args:
        path: The file.
        module, optimizers: Those that are to be filled: they tell what an older file's parameters are called.
        weights_only: Read plain data alone (None: torch's default, which is that).

    Raises:
        ValueError: The file can't be read, or its optimizer states can't be told apart.
    """

    def __init__(
        self, path: Path, module: nn.Module, optimizers: Sequence[Optimizer], weights_only: bool | None
    ) -> None:
        self.checkpoint = _read(path, weights_only)
        state = self.checkpoint.pop("state_dict", {})
        self.tensors = {f"model.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        self.extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        self.layout, self.rates, self.rng, self.tensor_parallel_size = [], {}, [], 1
        for number, saved in enumerate(self.checkpoint.pop("optimizer_states", []) if optimizers else []):
            named = named_state(saved) or _named_by_place(saved, module, optimizers[number], list(state))
            self.layout.append(named["groups"])
            for name, quantities in named["state"].items():
                for quantity, value in quantities.items():
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    self.tensors[f"optimizer.{name}.{quantity}"] = tensor
        self.groups = [group for groups in self.layout for group in groups]
        self.sizes = {key: tuple(value.shape) for key, value in self.tensors.items()}
        self.dtypes = {key: value.dtype for key, value in self.tensors.items()}

    def columns(self, name: str) -> list[int]:
        """The whole width."""
        return [self.sizes[f"model.{name}"][1]]

    def read(self, pieces: list[Piece]) -> None:
        """Fill the pieces."""
        for piece in pieces:
            box = tuple(slice(start, start + n) for start, n in zip(piece.offset, piece.tensor.shape, strict=True))
            piece.tensor.detach().copy_(self.tensors[piece.key][box])


def _named_by_place(
    saved: Mapping[str, Any], module: nn.Module, optimizer: Optimizer, tensors: list[str]
) -> dict[str, Any]:  # fmt: skip
    """The state of an optimizer that did not note names, by the names and sizes of its groups."""
    names = parameter_names(module)
    present: dict[Any, list[list[str]]] = {}
    for group, weights in driven(optimizer):
        present.setdefault(group.get("name"), []).append([names.get(id(weight), "") for weight in weights])
    groups, state = [], {}
    for group in saved["param_groups"]:
        kind, count = group.get("name"), len(group["params"])
        table = str(kind).removeprefix("tables.")
        if kind is not None and table != kind and count == 1:
            own = [name for name in tensors if name.endswith(f".{table}.weight")]
        else:
            own = present[kind].pop(0) if present.get(kind) else []
        if len(own) != count and count:
            raise ValueError(
                f"The file's optimizer has a group '{kind}' of {count} parameters without names, which can't be told "
                "apart. Save it again with this version of genrec, or load the weights alone."
            )
        groups.append({**group, "params": own})
        state.update({own[i]: saved["state"][n] for i, n in enumerate(group["params"]) if n in saved["state"]})
    return {"state": state, "groups": groups}


def whole_checkpoint(folder: Path, weights_only: bool | None) -> dict[str, Any]:
    """A data folder's content as the checkpoint dict of one process; optimizer states with `param_names`."""
    source = FolderSource(folder, None, weights_only)
    tensors = {key: torch.zeros(size, dtype=source.dtypes[key]) for key, size in source.sizes.items()}
    source.read([Piece.whole(key, tensor) for key, tensor in tensors.items()])
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, quantity = key.removeprefix("optimizer.").rpartition(".")
            if quantity.endswith(BY_COLUMNS):
                value = Columns(value, source.columns(name)).mean()
            states.setdefault(name, {})[quantity.removesuffix(BY_COLUMNS)] = value
    checkpoint = {**source.checkpoint, "state_dict": {**weights, **_whole_tables(folder, source.extra)}}
    if source.optimizer_groups:
        checkpoint["optimizer_states"] = [_numbered(groups, states) for groups in source.optimizer_groups]
    return checkpoint


def _whole_tables(folder: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    if not any(isinstance(value, Mapping) and value.get("external") for value in extra.values()):
        return dict(extra)
    from genrec.embedding.hkv.checkpoint import read_tables

    tables = read_tables(folder / TABLES)
    return {
        name: {table: tables[table] for table in value["tables"]}
        if isinstance(value, Mapping) and value.get("external")
        else value
        for name, value in extra.items()
    }


def _numbered(groups: list[dict[str, Any]], states: Mapping[str, Any]) -> dict[str, Any]:
    """A torch optimizer's state_dict of named groups and states."""
    numbers: dict[str, int] = {}
    for group in groups:
        for name in group["params"]:
            numbers.setdefault(name, len(numbers))
    return {
        "state": {numbers[name]: state for name, state in states.items() if name in numbers},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]], "param_names": list(group["params"])}
            for group in groups
        ],
    }
