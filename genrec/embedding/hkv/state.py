"""The content of a table as tensors, and back: what checkpoints, copies and exports are made of."""

from __future__ import annotations

import warnings
from ctypes import byref, c_int64
from typing import Any

import torch
from torch import Tensor

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv import _binding
from genrec.embedding.hkv._binding import INSERT
from genrec.embedding.hkv.options import BUCKET_SLOTS
from genrec.embedding.hkv.table import HkvOverflowError, HkvTable

FORMAT = 1
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def mix_keys(keys: Tensor, inverse: bool = False) -> Tensor:
    """Keys as they are hashed and routed (a bijection on int64), or back."""
    keys = keys.to(torch.int64).contiguous()
    out = torch.empty_like(keys)
    _binding.library().genrec_hkv_mix(keys.data_ptr(), keys.numel(), int(inverse), out.data_ptr())
    return out


def owner_rank(keys: Tensor, world_size: int) -> Tensor:
    """(n,) int64: the rank that owns each key. Training, load and export route by this alone."""
    keys = keys.to(torch.int64).contiguous()
    out = torch.empty_like(keys)
    _binding.library().genrec_hkv_owners(keys.data_ptr(), keys.numel(), world_size, out.data_ptr())
    return out


def export_meta(table: HkvTable, min_update: int = 0, min_score: int = 0) -> dict[str, Tensor]:
    """Keys, rows, scores, steps, updates of the table's slots, sorted by mixed key (unsigned).

    Args:
        table: The table.
        min_update: Only rows updated at this step or later.
        min_score: Only rows of this score or more.
    """
    buckets = table.capacity // BUCKET_SLOTS
    chunk = 64 * 64  # a multiple of a block
    kinds = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int32)
    buffers = [torch.empty(min(buckets, chunk) * BUCKET_SLOTS, dtype=kind) for kind in kinds]
    columns: list[list[Tensor]] = [[] for _ in kinds]
    for begin in range(0, buckets, chunk):
        count = c_int64()
        _binding.call(
            "export", table._handle, begin, min(buckets, begin + chunk), min_update, min_score, byref(count),
            *(buffer.data_ptr() for buffer in buffers),
        )  # fmt: skip
        for column, buffer in zip(columns, buffers, strict=True):
            column.append(buffer[: count.value].clone())
    merged = [torch.cat(column) for column in columns]
    names = ("keys", "rows", "scores", "steps", "updates")
    return {
        name: column.to(torch.int64) & 0xFFFFFFFF if column.dtype == torch.int32 else column
        for name, column in zip(names, merged, strict=True)
    }


def export_counters(table: HkvTable) -> dict[str, Tensor]:
    """Sightings of keys not yet admitted: keys, counts, steps."""
    n = c_int64()
    _binding.call("export_counters", table._handle, 0, byref(n), None, None, None)
    keys = torch.empty(n.value, dtype=torch.int64)
    counts, steps = torch.empty(n.value, dtype=torch.int32), torch.empty(n.value, dtype=torch.int32)
    _binding.call(
        "export_counters", table._handle, n.value, byref(n), keys.data_ptr(), counts.data_ptr(), steps.data_ptr()
    )  # fmt: skip
    return {"keys": keys, "counts": counts, "steps": steps}


def table_state(table: HkvTable, since_step: int | None = None) -> dict[str, Any]:
    """Everything a table holds, as tensors and numbers.

    Args:
        table: The table.
        since_step: Rows only of keys updated after this step; keys and scores are always complete, so that a merge
            onto the state of that step gives the whole.
    """
    meta = export_meta(table)
    state: dict[str, Any] = {name: meta[name] for name in ("keys", "scores", "steps", "updates")}
    rows = meta["rows"]
    if since_step is not None:
        picked = (meta["updates"] > since_step).nonzero().flatten()
        state["picked"], rows = picked, rows[picked].contiguous()
    weights, optimizer = table.read_rows(rows)
    state["weights"], state["optimizer"] = weights.to(_DTYPES[table.config.dtype]), optimizer
    state["counters"] = export_counters(table)
    state["scalars"] = table_scalars(table)
    return state


def table_scalars(table: HkvTable) -> dict[str, Any]:
    """What a table's state has beside its rows."""
    return {
        "format": FORMAT,
        "name": table.config.name,
        "dim": table.config.dim,
        "dtype": table.config.dtype,
        "optimizer_name": table.config.optimizer.name,
        "score": table.options.score,
        "seed": table.seed,
        "slots": table.capacity,
        "world_size": table.world_size,
        "step": table.step,
        "epoch": table.epoch,
        "optimizer_step": table.optimizer_step,
        "clock": [[moment, step] for moment, step in table._clock],
    }


def check_scalars(table: HkvTable, scalars: dict[str, Any]) -> None:
    """Whether a saved state fits a table.

    Raises:
        ValueError: It doesn't; the message names what differs.
    """
    if scalars["format"] != FORMAT:
        raise ValueError(f"Table state has format {scalars['format']}, this version reads {FORMAT}.")
    if scalars["dim"] != table.config.dim:
        raise ValueError(
            f"Table '{table.config.name}' has rows of width {table.config.dim}, the saved ones have {scalars['dim']}."
        )


def restore_scalars(table: HkvTable, scalars: dict[str, Any]) -> None:
    """Steps, epoch and seed as saved, and room for as many slots."""
    table.set_seed(scalars["seed"])
    table.step, table.epoch = scalars["step"], scalars["epoch"]
    table.optimizer_step = scalars["optimizer_step"]
    table._clock = [(moment, step) for moment, step in scalars["clock"]]
    if scalars["world_size"] == table.world_size:
        table.reserve(int(scalars["slots"] * table.options.max_load_factor))


def insert_state(table: HkvTable, state: dict[str, Any], same_optimizer: bool) -> None:
    """Put rows with their scores and steps into the table, the last victims first: where a bucket is too small for its
    keys (fewer slots than before, or another number of ranks), those that would be evicted next are left out.

    Args:
        table: The table; its step must already be the saved one.
        state: As of `table_state`, or a part of it.
        same_optimizer: Take the optimizer's state too; else it starts from zero.

    Raises:
        HkvOverflowError: Keys don't fit, and the table may not drop any (score "none").
    """
    keys = state["keys"].contiguous()
    if keys.numel() == 0:
        return
    table.reserve(table.size + keys.numel())
    picked = state.get("picked")
    picked = torch.arange(keys.numel()) if picked is None else picked
    scores, steps = state["scores"][picked], state["steps"][picked]
    order = steps.argsort(descending=True, stable=True)
    # Scores are unsigned; flipping the top bit makes the signed order theirs.
    order = order[(scores[order] ^ torch.iinfo(torch.int64).min).argsort(descending=True, stable=True)]
    lookup = table.lookup(keys[picked[order]], INSERT, want_rows=True, overflow=False)
    assert lookup.rows_at is not None
    optimizer = state["optimizer"][order] if same_optimizer else None
    table.write_rows(lookup.rows_at, state["weights"][order], optimizer)
    left_out = int((lookup.rows_at < 0).sum())
    if left_out:
        message = (
            f"Table '{table.config.name}': {left_out} of {keys.numel()} saved keys don't fit into their buckets "
            f"({table.capacity:,} slots)"
        )
        if table.options.score == "none":
            raise HkvOverflowError(f"{message}, and score 'none' may drop none. Raise the capacity.")
        warnings.warn(f"{message}: the first victims are left out.", stacklevel=2)
    set_meta(table, keys, state["scores"], state["steps"], state["updates"])


def set_meta(table: HkvTable, keys: Tensor, scores: Tensor, steps: Tensor, updates: Tensor) -> None:
    """Scores and steps of keys that are there."""
    scores = scores.to(torch.int64).contiguous()
    steps, updates = steps.to(torch.int32).contiguous(), updates.to(torch.int32).contiguous()
    _binding.call(
        "set_meta", table._handle, keys.data_ptr(), keys.numel(), scores.data_ptr(), steps.data_ptr(),
        updates.data_ptr(),
    )  # fmt: skip


def get_meta(table: HkvTable, keys: Tensor) -> dict[str, Tensor]:
    """Scores, steps and update steps of keys; zeros for absent ones. Changes nothing."""
    keys = table.check_keys(keys)
    n = keys.numel()
    scores = torch.zeros(n, dtype=torch.int64)
    steps, updates = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    _binding.call(
        "get_meta", table._handle, keys.data_ptr(), n, scores.data_ptr(), steps.data_ptr(), updates.data_ptr()
    )  # fmt: skip
    return {
        "scores": scores,
        "steps": steps.to(torch.int64) & 0xFFFFFFFF,
        "updates": updates.to(torch.int64) & 0xFFFFFFFF,
    }


def restore_counters(table: HkvTable, counters: dict[str, Tensor]) -> None:
    """Sightings as saved, in place of all there are."""
    keys = counters["keys"].contiguous()
    counts, steps = counters["counts"].contiguous(), counters["steps"].contiguous()
    _binding.call(
        "restore_counters", table._handle, keys.numel(), keys.data_ptr(), counts.data_ptr(), steps.data_ptr()
    )  # fmt: skip


def load_table_state(table: HkvTable, state: dict[str, Any]) -> None:
    """Make the table what it was when `table_state` was taken; what it holds now goes.

    Raises:
        ValueError: The state is of another width or format.
    """
    scalars = state["scalars"]
    check_scalars(table, scalars)
    table.clear()
    restore_scalars(table, scalars)
    insert_state(table, state, scalars["optimizer_name"] == table.config.optimizer.name)
    restore_counters(table, state["counters"])


def rebuild_table(config: EmbeddingTableConfig, seed: int, world_size: int, state: dict[str, Any]) -> HkvTable:
    """A copy of a table, for copy and pickle."""
    table = HkvTable(config, seed, world_size)
    load_table_state(table, state)
    return table
