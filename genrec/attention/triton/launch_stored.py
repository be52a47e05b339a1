"""What goes through memory between kernels: whether there is room, and the launches that fill and use it.

`GENREC_ATTENTION_BIAS_GIB` limits what the tiles of the relative bias take, else a 64th of the GPU's memory does;
`GENREC_ATTENTION_STORED_GIB`, or a 16th, the gradients of the scores of all heads. A batch that needs more has the
forms of the kernels that store nothing. What one needs is known from the number of tokens and the greatest length,
without asking the device: for each row all keys that the longest sequence has, or half of them with a causal mask.
Where lengths differ, that is more than is used.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from genrec.attention.triton.configs import Config
from genrec.attention.triton.kernels.backward_stored import CELL, stored_rows_kernel, stored_tables_kernel
from genrec.attention.triton.kernels.bias_tiles import bias_kernel
from genrec.attention.triton.prepared import Places

if TYPE_CHECKING:
    from genrec.attention.triton.launch import Call

PARTS = 4
"""Programs that share the tiles of a diagonal."""

FILL_PARTS = 4
"""Programs that share those of a block of rows or keys whose bias is computed."""

REGISTERS = 1024
"""Of a lane of all warps of a program that waits for memory: two such programs fit a multiprocessor."""


def places(call: Call, rows: int, keys: int) -> Places:
    """For tiles of rows x keys."""
    wide = not call.causal or call.num_contexts is not None or call.q.shape[0] != call.k.shape[0]
    larger = max(rows, keys)
    if wide:
        per_row, block = triton.cdiv(call.max_kv_len, keys), rows
    else:
        parts, block = larger // rows * (larger // keys), larger
        per_row = triton.cdiv(parts * (triton.cdiv(call.max_q_len, larger) + 1), 2)
    return Places(rows, keys, per_row, wide, call.prepared.bound(False, block) * per_row)


@cache
def limit(name: str, device: torch.device, share: int) -> float:
    """Bytes that the environment allows, else a GPU's memory divided by `share`, or so much of 64 GiB; found once."""
    text = os.environ.get(name)
    if not text:
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 64 * 2**30
        return memory / share
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if math.isnan(gib) or gib < 0:
        raise ValueError(f"{name}={text!r} must be a number of GiB, the most memory to take; 0 takes none.")
    return gib * 2**30


def room(call: Call) -> tuple[bool, bool]:
    """Whether the bias and the gradients of the scores may be stored: a relative bias alone is worth it.

    In 16 bits on Hopper, and in the interpreter without a GPU. In fp32 it hasn't been right on a GPU yet.
    """
    if call.generation != (9 if call.fragments else 0) or (call.position is None and call.time is None):
        return False, False
    cells = places(call, CELL.value, CELL.value).tiles * CELL.value**2 * call.q.element_size()
    device = call.q.device
    bias = cells <= limit("GENREC_ATTENTION_BIAS_GIB", device, 64)
    return bias, bias and cells * call.q.shape[1] <= limit("GENREC_ATTENTION_STORED_GIB", device, 16)


def loads(call: Call, config: Config, of_keys: bool) -> bool:
    """Whether a kernel with such blocks has its scores as tiles of the bias are stored, in rows of whole warpgroups."""
    lines = config.keys if of_keys else config.rows
    return not call.fragments or (config.warps >= 4 and lines % (16 * config.warps) == 0)


BIAS_AHEAD = 1
"""Which tile of the bias the forward kernel asks for while it multiplies: this one (1), the next (2) or none (0)."""


@dataclass(frozen=True)
class BiasTiles:
    """The relative bias of a batch, for one kernel's blocks."""

    data: Tensor
    places: Places

    def arguments(self) -> dict[str, Any]:
        """Of a kernel that loads them, in place of what it would compute them from."""
        nothing = ("position", "time_table", "edges", "near_edges", "kv_times", "q_times",
                   "row_low", "row_high", "key_low", "key_high")  # fmt: skip
        return dict.fromkeys(nothing) | {
            "max_positions": 0, "BUCKETS": 0,
            "bias_tiles": self.data, "bias_per_row": self.places.per_row, "BIAS_WIDE": self.places.wide,
        }  # fmt: skip


NO_TILES = {"bias_tiles": None, "bias_per_row": 0, "BIAS_WIDE": False}


def fill_bias(call: Call, config: Config, of_keys: bool, lines: int = 32, warps: int = 4) -> BiasTiles:
    """Tiles for a kernel with such blocks, over blocks of keys or of rows."""
    from genrec.attention.triton import launch  # which imports this module

    found = places(call, config.rows, config.keys)
    dtype = torch.float16 if call.q.element_size() == 2 else torch.float32
    tiles = torch.empty(found.tiles * config.rows * config.keys, dtype=dtype, device=call.q.device)
    common, spans = call.common(config, of_keys), None
    if call.time is not None:
        spans = call.prepared.spans(found, call.time.numel(), (call.max_q_len, call.max_kv_len))
    arguments = {name: x for name, x in common.items() if name in bias_kernel.arg_names} | {
        "bias_tiles": tiles, "bias_per_row": found.per_row, "tiles": found.tiles, "spans": spans,
        "parts": FILL_PARTS, "OF_KEYS": of_keys, "WIDE": found.wide,
        "LINES": min(lines, config.keys if of_keys else config.rows), "num_warps": warps,
    }  # fmt: skip
    programs = call.prepared.bound(of_keys, config.keys if of_keys else config.rows) * FILL_PARTS
    launch.start(bias_kernel, call, config, programs, arguments)
    return BiasTiles(tiles, found)


@dataclass(frozen=True)
class Scores:
    """Gradients of the scores of a batch, all heads."""

    data: Tensor
    """(lines, CELL)"""
    places: Places

    def arguments(self) -> dict[str, Any]:
        """Of all kernels that write or read them."""
        return {"scores": self.data, "cells": self.places.tiles, "cells_per_row": self.places.per_row}

    def descriptor(self, rows: int, keys: int, config: Config) -> Any:
        """For tiles of keys x rows; None where the kernel goes without."""
        if not config.tma:
            return None
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.data, list(self.data.shape), [CELL.value, 1], [keys, rows])


def new_scores(call: Call) -> Scores:
    """Room for them, not filled."""
    found = places(call, CELL.value, CELL.value)
    lines = found.tiles * call.q.shape[1] * CELL.value
    return Scores(torch.empty(lines, CELL.value, dtype=call.q.dtype, device=call.q.device), found)


def launch_stored_rows(call: Call, scores: Scores, dq: Tensor, config: Config) -> None:
    """dq."""
    from genrec.attention.triton import launch

    common = call.common(config, of_keys=False)
    arguments = {name: x for name, x in common.items() if name in stored_rows_kernel.arg_names}
    arguments |= scores.arguments() | {
        "scores_descriptor": scores.descriptor(config.rows, config.keys, config), "WIDE": scores.places.wide,
        "k_descriptor": launch.descriptor(call.k, config.keys, config), "dq": dq,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    launch.start(stored_rows_kernel, call, config, call.pieces(config, of_keys=False), arguments)


def stored_tables_arguments(call: Call, scores: Scores, writer: Config, config: Config) -> dict[str, Any]:
    """All but the tables. `writer` has the blocks of the kernel that stored the scores' gradients.

    Raises:
        ValueError: Blocks that aren't square.
    """
    if config.rows != config.keys:  # times are told for blocks of both
        raise ValueError(f"The kernel over stored scores goes down diagonals of square blocks, not of {config}.")
    common = call.common(config, of_keys=True)
    whole = writer.rows % config.keys == 0 and writer.keys % config.keys == 0
    arguments = {name: x for name, x in common.items() if name in stored_tables_kernel.arg_names}
    return arguments | scores.arguments() | {
        "WIDE": scores.places.wide, "BLOCK": config.keys, "parts": PARTS, "DETERMINISTIC": call.deterministic,
        "maxnreg": min(255, REGISTERS // config.warps),
        "MASKED": scores.places.wide or call.num_targets is not None or call.window >= 0 or not whole,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
