"""Rows of dynamic tables as Parquet: for serving, and from pretraining."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from genrec.embedding.hkv.checkpoint import barrier, find_tables, rank_and_size
from genrec.embedding.hkv.state import export_meta, owner_rank
from genrec.embedding.hkv.table import HkvTable


def export_parquet(
    module: nn.Module, table_name: str, directory: str | Path, process_group: dist.ProcessGroup | None = None
) -> None:
    """Write a table's keys and rows to `directory/part-<rank>.parquet`: columns key (int64), row (list of fp32).

    All ranks call it. Rows are those of training; files are replaced whole, and parts of an earlier export by more
    ranks are removed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rank, world_size = rank_and_size(process_group)
    table = _named(module, table_name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if table.world_size > 1 or rank == 0:
        meta = export_meta(table)
        weights, _ = table.read_rows(meta["rows"])
        values = pa.FixedSizeListArray.from_arrays(pa.array(weights.flatten().numpy()), table.config.dim)
        draft = directory / f".part-{rank:05d}.draft"
        pq.write_table(pa.table({"key": meta["keys"].numpy(), "row": values}), draft)
        os.replace(draft, directory / f"part-{rank:05d}.parquet")
    barrier(process_group, world_size)
    if rank == 0:
        for part in directory.glob("part-*.parquet"):
            if int(part.stem.removeprefix("part-")) >= table.world_size:
                part.unlink()
    barrier(process_group, world_size)


def import_parquet(
    module: nn.Module, table_name: str, path: str | Path, process_group: dist.ProcessGroup | None = None
) -> int:
    """Put pretrained rows into a table, each into the rank that owns it; rows of other keys stay. All ranks call it.

    Args:
        module: The module with the table.
        table_name: Of the table.
        path: A Parquet file, or a directory of them, with columns key (int64) and row (lists as wide as the table).
        process_group: Of the ranks.

    Returns:
        Rows that this rank took.

    Raises:
        ValueError: The rows are not as wide as the table's.
    """
    import pyarrow.dataset as ds

    rank, _ = rank_and_size(process_group)
    table = _named(module, table_name)
    rank = rank if table.world_size > 1 else 0
    taken = 0
    for batch in ds.dataset(path, format="parquet").to_batches(columns=["key", "row"]):
        keys = torch.from_numpy(batch.column("key").to_numpy().astype(np.int64))
        rows = np.asarray(batch.column("row").flatten(), dtype=np.float32)
        if rows.size != keys.numel() * table.config.dim:
            raise ValueError(f"'{path}': rows are not {table.config.dim} wide, as table '{table_name}' is.")
        own = owner_rank(keys, table.world_size) == rank
        table.insert_or_assign(keys[own], torch.from_numpy(rows.reshape(keys.numel(), -1)[own.numpy()].copy()))
        taken += int(own.sum())
    return taken


def _named(module: nn.Module, name: str) -> HkvTable:
    tables = find_tables(module)
    if name not in tables:
        raise ValueError(f"The module has no dynamic table '{name}'; it has {sorted(tables)}.")
    return tables[name]
