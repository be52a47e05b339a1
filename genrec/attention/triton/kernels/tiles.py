"""Reading the rows of a sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs


@triton.jit
def load_rows(
    base,
    descriptor,
    start,
    row,
    limit,
    stride,
    column,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CUT: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """(ROWS, WIDTH): rows [row, row + ROWS) of a sequence that starts at row `start`, columns from `column` on.

    With CUT the block may reach beyond row `limit`. What lies there belongs to others and may be NaN: with CLEAN it
    reads as zero (0 * NaN would be NaN), else the caller hides the scores that come of it. A descriptor reads it in
    any case: the addresses and predicates of ordinary loads would take the registers that the accumulators need.
    """
    if descriptor is not None:
        tile = descriptor.load([(start + row).to(tl.int32), column.to(tl.int32)])
        if CUT and CLEAN:
            return tl.where((row + tl.arange(0, ROWS) < limit)[:, None], tile, 0.0)
        else:
            return tile
    else:
        r = tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        address = base + ((start + row) * stride + column) + r[:, None] * stride + d[None, :]
        if CUT and DIM != WIDTH:
            return tl.load(address, (row + r < limit)[:, None] & (d < DIM)[None, :], 0.0)
        elif CUT:
            return tl.load(address, (row + r < limit)[:, None], 0.0)
        elif DIM != WIDTH:
            return tl.load(address, (d < DIM)[None, :], 0.0)
        else:
            return tl.load(address)


@triton.jit
def sequence(offsets, b):
    """First row (int64) and length (int32) of sequence b."""
    start = tl.load(offsets + b).to(tl.int64)
    return start, (tl.load(offsets + b + 1).to(tl.int64) - start).to(tl.int32)


@triton.jit
def regions(num_contexts, num_targets, b, kv_len):
    """Number of contexts, and the row at which targets begin."""
    contexts = 0
    history_end = kv_len
    if num_contexts is not None:
        contexts = tl.load(num_contexts + b).to(tl.int32)
    if num_targets is not None:
        history_end = kv_len - tl.load(num_targets + b).to(tl.int32)
    return contexts, history_end


EMULATED = tl.constexpr(knobs.runtime.interpret)
"""Triton's interpreter multiplies the bits of bfloat16 as if they were integers: there products take fp32."""


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in fp32; acc is None for nothing."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
