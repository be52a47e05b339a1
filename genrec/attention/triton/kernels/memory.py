"""Gathers that keep the layout of a product of matrices.

The compiler lays tiles of `tl.load` out for coalesced access and moves each result through shared memory to where the
products want it: twice the traffic, and room that the pipeline needs. Tables of the bias are small and live in the
cache; each thread reads what its own scores ask for. The interpreter takes the ordinary operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.tiles import EMULATED


@triton.jit
def gather(table, index):
    """table[index] for a table of fp32 or int32 that nobody writes, and a tile of int32 indices."""
    if EMULATED:
        return tl.load(table + index)
    elif table.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.s32 a, $2, 4, $1; ld.global.nc.f32 $0, [a]; }", "=f,l,r",
            [table.to(tl.int64), index], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.s32 a, $2, 4, $1; ld.global.nc.b32 $0, [a]; }", "=r,l,r",
            [table.to(tl.int64), index], dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip


@triton.jit
def gather_at(table, index):
    """`gather` of fp32 from a pointer into the table, for indices that are sums: addresses are then constants apart."""
    if EMULATED:
        return tl.load(table + index)
    else:
        return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [(table + index).to(tl.int64)],
                                         dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip


@triton.jit
def near_times(times, index, base):
    """times[index] - base in 32 bits, of times in 64 bits that nobody writes and that are that near to `base`."""
    if EMULATED:
        return (tl.load(times + index) - base).to(tl.int32)
    else:  # the lower half of each
        low = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [(times + index).to(tl.int64)],
                                        dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
        return low - base.to(tl.int32)
