"""Dynamic tables on disk, whole or incremental. Each rank has its files; any number of ranks loads them.

A directory holds `manifest.json` and the files of one data folder that it names. A save writes a new data folder, then
replaces the manifest in one step, then removes the old folder: killed at any moment, it leaves the previous save whole.
Each rank writes, for each table, NumPy files of its share, sorted by mixed key.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genrec.embedding.hkv.state import (
    check_scalars,
    export_meta,
    insert_state,
    owner_rank,
    restore_counters,
    restore_scalars,
    set_meta,
    table_scalars,
    table_state,
)
from genrec.embedding.hkv.table import HkvTable

MANIFEST = "manifest.json"
FORMAT = 1

_SEPARATE: ContextVar[bool] = ContextVar("tables_saved_separately", default=False)


@contextlib.contextmanager
def tables_saved_separately() -> Iterator[None]:
    """Inside, a state_dict of sharded dynamic tables holds a marker in place of the rows, and loading accepts it.

    Say so only where `save_tables` and `load_tables` carry the rows: without it a state_dict of sharded tables raises.
    """
    token = _SEPARATE.set(True)
    try:
        yield
    finally:
        _SEPARATE.reset(token)


def saved_separately() -> bool:
    """Whether the caller is inside `tables_saved_separately`."""
    return _SEPARATE.get()


def find_tables(module: nn.Module) -> dict[str, HkvTable]:
    """The dynamic tables (or this rank's shares of them) in a module, by name.

    Raises:
        ValueError: Two tables share a name.
    """
    from genrec.embedding.hkv.collection import TableGroup

    tables: dict[str, HkvTable] = {}
    for child in module.modules():
        if isinstance(child, TableGroup):
            for name, table in child.tables.items():
                if name in tables:
                    raise ValueError(f"Two dynamic tables are named '{name}': names must differ to be saved.")
                tables[name] = table
    return tables


# Saving ---------------------------------------------------------------------------------------------------------------


def save_tables(
    module: nn.Module, directory: str | Path, process_group: dist.ProcessGroup | None = None
) -> None:  # fmt: skip
    """Save every dynamic table of a module. All ranks call it, with the same directory on a shared file system.

    Saved are keys, rows, scores, steps, optimizer state and admission counters.
    """
    _save(module, Path(directory), process_group, None)


def dump_increment(
    module: nn.Module,
    directory: str | Path,
    since_step: int | Mapping[str, int] | None = None,
    since_time: float | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Save the rows updated after a step or a time. All ranks call it.

    The keys and scores of all rows are written too, so that a merge also removes what was evicted in between.

    Args:
        module: The module with the tables.
        directory: Of this increment alone.
        since_step: Step of the tables (`HkvTable.step`) at the save onto which this will be merged; one for all or by
            table.
        since_time: Instead of it seconds since 1970; the dump may reach a second (or a thousandth of the table's age)
            further back.
        process_group: Of the ranks.

    Raises:
        ValueError: Neither or both of the two are given.
    """
    if (since_step is None) == (since_time is None):
        raise ValueError("Give since_step or since_time: the increment needs the moment of the save that it extends.")
    tables = find_tables(module)
    if since_time is not None:
        since = _least({name: table.step_at(since_time) for name, table in tables.items()}, process_group)
    elif isinstance(since_step, Mapping):
        since = dict(since_step)
    else:
        assert since_step is not None
        since = dict.fromkeys(tables, since_step)
    _save(module, Path(directory), process_group, since)


def _save(
    module: nn.Module, directory: Path, group: dist.ProcessGroup | None, since: dict[str, int] | None
) -> None:  # fmt: skip
    rank, world_size = rank_and_size(group)
    tables = find_tables(module)
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / f"data-{_agreed_name(group, world_size)}"
    states = ((name, table_state(table, None if since is None else since[name])) for name, table in tables.items())
    write_shares(states, folder, rank)
    barrier(group, world_size)
    if rank == 0:
        write_manifest({name: table_scalars(table) for name, table in tables.items()}, directory, folder.name, since)
    barrier(group, world_size)


def write_shares(states: Iterable[tuple[str, dict[str, Any]]], folder: Path, rank: int) -> None:
    """Write one rank's shares, `table_state`s by name, into a data folder. It becomes a save by `write_manifest`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states:
        # Unsharded tables are the same on every rank.
        if state["scalars"]["world_size"] > 1 or rank == 0:
            _write_state(folder, name, rank, state)
    _sync_directory(folder)


def write_manifest(
    scalars: dict[str, dict[str, Any]], directory: Path, data: str, since: dict[str, int] | None = None
) -> None:
    """Make the data folder that all ranks have written the directory's save. One rank calls it.

    Args:
        scalars: `table_scalars` by name.
        directory: Of the save.
        data: Name of the data folder in it; others are removed.
        since: Of an increment, the steps that it extends.
    """
    _replace_manifest(directory, {"format": FORMAT, "data": data, "since": since, "tables": scalars})
    for old in directory.glob("data-*"):
        if old.name != data:
            shutil.rmtree(old, ignore_errors=True)


def _write_state(folder: Path, name: str, rank: int, state: dict[str, Any]) -> None:
    for column in ("keys", "scores", "steps", "updates", "picked", "weights", "optimizer"):
        if column in state:
            _write_array(folder / f"{name}.{rank}.{column}.npy", state[column])
    for column, values in state["counters"].items():
        _write_array(folder / f"{name}.{rank}.counter_{column}.npy", values)


def _write_array(path: Path, values: Tensor) -> None:
    # NumPy has no bfloat16: its bits are kept.
    array = values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _replace_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    draft = directory / f"{MANIFEST}.draft"
    with open(draft, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, directory / MANIFEST)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Loading --------------------------------------------------------------------------------------------------------------


def load_tables(
    module: nn.Module, directory: str | Path, process_group: dist.ProcessGroup | None = None
) -> None:  # fmt: skip
    """Make the dynamic tables of a module what they were at the save, by any number of ranks. All ranks call it.

    Raises:
        FileNotFoundError: The directory holds no finished save.
        ValueError: A table is missing from it or doesn't fit, or it is an increment.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if manifest["since"] is not None:
        raise ValueError(f"'{directory}' is an increment: load its base with load_tables, then this by load_increment.")
    rank, _ = rank_and_size(process_group)
    for name, table in find_tables(module).items():
        scalars = _table_entry(manifest, name, directory)
        check_scalars(table, scalars)
        state = _read_state(directory / manifest["data"], name, scalars, table, rank)
        table.clear()
        restore_scalars(table, scalars)
        insert_state(table, state, scalars["optimizer_name"] == table.config.optimizer.name)
        restore_counters(table, state["counters"])


def load_increment(
    module: nn.Module, directory: str | Path, process_group: dist.ProcessGroup | None = None
) -> None:  # fmt: skip
    """Merge an increment into the tables, which hold the state that it extends. All ranks call it.

    Raises:
        FileNotFoundError: The directory holds no finished increment.
        ValueError: The tables are not at (or after) the increment's base, or it is a whole save.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if manifest["since"] is None:
        raise ValueError(f"'{directory}' is a whole save: use load_tables.")
    rank, _ = rank_and_size(process_group)
    for name, table in find_tables(module).items():
        scalars = _table_entry(manifest, name, directory)
        check_scalars(table, scalars)
        if table.step < manifest["since"][name]:
            raise ValueError(
                f"Table '{name}' is at step {table.step}, the increment extends step {manifest['since'][name]}: load "
                "the save of that step first."
            )
        state = _read_state(directory / manifest["data"], name, scalars, table, rank)
        _merge(table, state, scalars)


def _merge(table: HkvTable, state: dict[str, Any], scalars: dict[str, Any]) -> None:
    present = export_meta(table)["keys"]
    table.erase(present[~torch.isin(present, state["keys"])])
    changed = state["keys"][state["picked"]]
    rest = torch.ones(state["keys"].numel(), dtype=torch.bool)
    rest[state["picked"]] = False
    lost = int((~table.contains(state["keys"][rest])).sum())
    if lost:
        raise ValueError(
            f"Table '{table.config.name}' lacks {lost} keys which the increment takes from its base: load that first."
        )
    table.erase(changed)
    restore_scalars(table, scalars)
    same_optimizer = scalars["optimizer_name"] == table.config.optimizer.name
    insert_state(table, state, same_optimizer)
    set_meta(table, state["keys"], state["scores"], state["steps"], state["updates"])
    restore_counters(table, state["counters"])


def read_tables(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The whole tables of a save as `table_state`s by name, as an unsharded collection's state_dict holds them.

    Raises:
        FileNotFoundError: The directory holds no finished save.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    return {
        name: {**_read_shares(directory / manifest["data"], name, scalars, 1, 0), "scalars": scalars}
        for name, scalars in manifest["tables"].items()
    }


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"'{directory}' holds no finished save of dynamic tables ({MANIFEST} is missing).")
    manifest = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"'{path}' has format {manifest['format']}, this version reads {FORMAT}.")
    return manifest


def _table_entry(manifest: dict[str, Any], name: str, directory: Path) -> dict[str, Any]:
    if name not in manifest["tables"]:
        raise ValueError(f"'{directory}' has no dynamic table '{name}'; it has {sorted(manifest['tables'])}.")
    return manifest["tables"][name]


def _read_state(
    folder: Path, name: str, scalars: dict[str, Any], table: HkvTable, rank: int
) -> dict[str, Any]:  # fmt: skip
    """This rank's share of what all ranks saved."""
    return _read_shares(folder, name, scalars, table.world_size, rank if table.world_size > 1 else 0)


def _read_shares(folder: Path, name: str, scalars: dict[str, Any], world_size: int, rank: int) -> dict[str, Any]:
    """What rank `rank` of `world_size` owns of what all ranks saved."""
    saved = int(scalars["world_size"])
    sources = [rank] if saved == world_size else range(saved)
    parts = [_read_share(folder, name, source, scalars["dtype"], world_size, rank) for source in sources]
    offset = 0
    for part in parts:
        if "picked" in part:
            part["picked"] = part["picked"] + offset
            offset += part["keys"].numel()
    counters = {key: torch.cat([part["counters"][key] for part in parts]) for key in parts[0]["counters"]}
    columns = [key for key in parts[0] if key != "counters"]
    return {"counters": counters, **{key: torch.cat([part[key] for part in parts]) for key in columns}}


def _read_share(folder: Path, name: str, source: int, dtype: str, world_size: int, rank: int) -> dict[str, Any]:
    """What rank `source` saved, as far as `rank` of `world_size` owns it."""

    def array(column: str) -> np.ndarray:
        return np.load(folder / f"{name}.{source}.{column}.npy", mmap_mode="r")

    def picked_rows(column: str, index: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array(column)[index.numpy()]))

    keys = torch.from_numpy(np.array(array("keys")))
    own = (owner_rank(keys, world_size) == rank).nonzero().flatten()
    part: dict[str, Any] = {"keys": keys[own]}
    for column in ("scores", "steps", "updates"):
        part[column] = picked_rows(column, own)
    rows = own
    if (folder / f"{name}.{source}.picked.npy").is_file():
        picked = torch.from_numpy(np.array(array("picked")))
        rows = torch.isin(picked, own).nonzero().flatten()
        part["picked"] = torch.searchsorted(own, picked[rows])
    part["weights"], part["optimizer"] = picked_rows("weights", rows), picked_rows("optimizer", rows)
    if dtype == "bf16":
        part["weights"] = part["weights"].view(torch.bfloat16)
    counted = torch.from_numpy(np.array(array("counter_keys")))
    mine = (owner_rank(counted, world_size) == rank).nonzero().flatten()
    part["counters"] = {column: picked_rows(f"counter_{column}", mine) for column in ("keys", "counts", "steps")}
    return part


# Ranks ----------------------------------------------------------------------------------------------------------------


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Of this process; (0, 1) without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _least(steps: dict[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Of each table the least step of all ranks, whose clocks may differ."""
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return steps
    everyone: list[dict[str, int]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyone, steps, group=group)
    return {name: min(one[name] for one in everyone) for name in steps}


def _agreed_name(group: dist.ProcessGroup | None, world_size: int) -> str:
    name = [uuid.uuid4().hex]
    if world_size > 1:
        dist.broadcast_object_list(name, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return name[0]


def barrier(group: dist.ProcessGroup | None, world_size: int) -> None:
    """Wait for the other ranks, if there are any."""
    if world_size > 1:
        dist.barrier(group)
