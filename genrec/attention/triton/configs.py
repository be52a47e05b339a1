"""Block sizes and warps of the kernels: a heuristic default, and the short list that the tuner tries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "forward", "backward", "backward_values", "backward_rows", "backward_tables", "stored_rows", "stored_tables"
]
Passes = Literal["one", "tables", "rows", "split", "stored"]


@dataclass(frozen=True)
class Config:
    """How a kernel is cut and launched."""

    rows: int
    """Rows (queries) of a block."""
    keys: int
    """Keys of a block."""
    warps: int = 4
    stages: int = 2
    """Blocks that the loads run ahead."""
    tma: bool = True
    """Tensor descriptors where the tensors allow it."""
    passes: Passes = "one"
    """How a backward pass is divided, for the kernel "backward" alone: see `launch_backward`."""
    stored: bool = False
    """Whether the kernel "forward" loads a relative bias that another has computed for all heads, as "backward" does in
    the form "stored"."""


@dataclass(frozen=True)
class Shape:
    """What a choice depends on."""

    bits: int
    """Of an element of q, k, v."""
    qk_width: int
    v_width: int
    """Dims, rounded up to a power of two."""
    bias: bool
    hopper: bool
    interpreted: bool
    room_for_bias: bool = False
    room_for_scores: bool = False
    """What may be stored: see `launch_stored`."""


INTERPRETER = Config(32, 32, tma=False)
"""Few and large steps, yet several blocks in short sequences."""

_FORWARD = {
    64: [Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 128, 8, 2)],
    128: [Config(128, 64, 4, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 3), Config(128, 128, 8, 2)],
    256: [Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(128, 32, 8, 2)],
}
# The relative bias takes registers: these don't spill with it.
_FORWARD_WITH_BIAS = {
    64: [Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 4, 3), Config(128, 128, 8, 2)],
    128: [Config(64, 64, 4, 2), Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 128, 8, 2)],
    256: [Config(128, 32, 8, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2)],
}
_STORED_FORWARD = {
    64: [Config(128, 64, 4, 3, stored=True)],
    128: [Config(128, 64, 4, 2, stored=True), Config(128, 64, 8, 3, stored=True)],
    256: [Config(128, 64, 8, 2, stored=True)],
}
_BACKWARD = {
    64: [Config(64, 128, 8, 3, passes="rows"), Config(64, 64, 4, 2), Config(64, 128, 8, 2), Config(128, 128, 8, 2)],
    128: [Config(64, 128, 8, 2, passes="rows"), Config(64, 128, 8, 2), Config(64, 64, 4, 1)],
    # A second accumulator of 128 keys doesn't fit, and blocks of 64 ask the L2 cache for more than it delivers.
    256: [Config(32, 128, 8, 3, passes="split"), Config(32, 128, 8, 2, passes="split"),
          Config(64, 64, 8, 2, passes="rows")],
}  # fmt: skip
# With the bias's tables to sum, the registers of one kernel don't suffice: its main loop spills ten times as often.
_BACKWARD_WITH_BIAS = {
    64: [Config(64, 128, 8, 2, passes="tables"), Config(64, 128, 8, 3, passes="rows"), Config(64, 128, 8, 2)],
    128: [Config(64, 128, 8, 2, tma=False, passes="tables"), Config(64, 128, 8, 2, passes="rows"),
          Config(64, 128, 8, 2, tma=False)],
    256: [Config(64, 64, 8, 2, passes="rows"), Config(32, 128, 8, 3, passes="split"),
          Config(64, 64, 8, 1, passes="tables"), Config(64, 64, 8, 1)],
}  # fmt: skip
# At 256 two accumulators of whole warpgroups' keys don't fit.
_STORED_BACKWARD = {
    64: [Config(64, 64, 4, 3, passes="stored")],
    128: [Config(64, 64, 4, 2, passes="stored"), Config(64, 128, 8, 3, passes="stored")],
}
# At least as many rows as keys, for the gradient of a position table; the other way round in the kernels over keys.
_ROWS = {
    64: [Config(64, 64, 4, 2), Config(128, 64, 8, 2)],
    128: [Config(64, 64, 4, 2), Config(128, 64, 8, 2)],
    256: [Config(128, 32, 8, 3), Config(128, 32, 8, 2), Config(64, 64, 8, 2)],
}
_ROWS_WITH_BIAS = _ROWS | {256: [Config(64, 64, 8, 1), Config(64, 32, 8, 2)]}
_VALUES = {
    64: [Config(64, 128, 8, 3)],
    128: [Config(64, 128, 8, 2)],
    256: [Config(64, 128, 8, 2), Config(32, 128, 8, 3)],
}
_TABLES = {
    64: [Config(64, 64, 8, 2), Config(64, 128, 8, 2)],
    128: [Config(64, 64, 8, 2), Config(64, 128, 8, 2)],
    256: [Config(64, 64, 8, 1), Config(32, 64, 8, 1)],
}
# Of cells of 128 x 128.
_STORED_ROWS = [Config(128, 64, 4, 3), Config(128, 64, 8, 4), Config(64, 64, 4, 4)]
_STORED_TABLES = [Config(64, 64, 4, 1), Config(64, 64, 8, 1)]
_LISTS = {
    "forward": _FORWARD, "backward": _BACKWARD, "backward_values": _VALUES, "backward_rows": _ROWS,
    "backward_tables": _TABLES, "stored_rows": dict.fromkeys((64, 128, 256), _STORED_ROWS),
    "stored_tables": dict.fromkeys((64, 128, 256), _STORED_TABLES),
}  # fmt: skip
_WITH_BIAS = {"forward": _FORWARD_WITH_BIAS, "backward": _BACKWARD_WITH_BIAS, "backward_rows": _ROWS_WITH_BIAS}
# An element of fp32 is three of tf32 on the way to the tensor cores: small blocks, and no product made twice.
_WIDE = {64: [Config(64, 32, 4, 1)], 128: [Config(32, 32, 4, 1)], 256: [Config(16, 32, 8, 1)]}
_WIDE_BACKWARD = {64: [Config(32, 32, 4, 1)], 128: [Config(32, 32, 4, 1)], 256: [Config(16, 16, 8, 1)]}
_WIDE_ROWS = {64: [Config(32, 32, 4, 1)], 128: [Config(32, 32, 4, 1)], 256: [Config(32, 16, 8, 1)]}
_WIDE_SQUARES = {width: [Config(32, 32, 4, 1)] for width in (64, 128, 256)}
_WIDE_LISTS = {
    "forward": _WIDE, "backward": _WIDE_BACKWARD, "backward_values": _WIDE_BACKWARD, "backward_rows": _WIDE_ROWS,
    "backward_tables": _WIDE_BACKWARD, "stored_rows": _WIDE, "stored_tables": _WIDE_SQUARES,
}  # fmt: skip


def candidates(kind: Kind, shape: Shape) -> list[Config]:
    """What the tuner tries; the first is the default."""
    if shape.interpreted:
        return [INTERPRETER]
    width = max(64, shape.qk_width, shape.v_width)
    if shape.bits == 32:
        return _WIDE_LISTS[kind][width]
    found = _LISTS[kind][width]
    if shape.bias:
        found = _WITH_BIAS.get(kind, _LISTS[kind])[width]
    if not shape.hopper:  # two thirds of the shared memory, and no descriptors
        found = [replace(c, tma=False, rows=min(c.rows, 64), keys=min(c.keys, 64), warps=4) for c in found]
        found = [replace(c, stages=1) if width == 256 else c for c in found]
    elif kind == "forward" and shape.bias and shape.room_for_bias:
        found = _STORED_FORWARD.get(width, []) + found
    elif kind == "backward" and shape.bias and shape.room_for_scores:
        found = _STORED_BACKWARD.get(width, []) + found
    return list(dict.fromkeys(found))
