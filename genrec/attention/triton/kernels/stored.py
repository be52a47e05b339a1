"""Tiles in memory, between the kernel that makes them and those that read them.

The relative bias depends on no head: `bias_kernel` computes a tile of it once, in 16 bits, and the kernels of all heads
load it. The gradients of the scores go through memory too, from the kernel over keys to those that sum them over keys
(dq) and over heads and diagonals (the tables).

Places follow from offsets and lengths alone, without a pass over the batch. Where a causal mask hides everything above
the diagonal (and keys and queries are the same rows), row blocks lie one after the other with what each can show; the
number of tiles of a longest sequence's average row is `per_row`, and so many lie between the first tiles of
neighbouring sequences for each row. WIDE, each row has the columns of the longest sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import first_entry
from genrec.attention.triton.kernels.tiles import EMULATED

LARGEST = tl.constexpr(65504.0)
"""Of fp16. A bias beyond is as good as this one."""

HIDDEN = tl.constexpr(-1e38)
"""The bias of what a row does not see: with it, a weight is exactly zero. Of tiles in fp16 it is -LARGEST."""


@triton.jit
def hidden_bias(tile):
    """As it is stored in `tile`.

    Not minus infinity: its weight would be NaN without one operation more a pair, 7 % of the forward kernel's time. In
    fp16 it hides scores (alpha <q, k>) up to 130,000, half of which are added to it.
    """
    if tile.dtype.element_ty == tl.float16:
        return -LARGEST
    else:
        return HIDDEN


@triton.jit
def tile_number(start, b, m, n, per_row, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """int64 number of the tile of row block m and key block n of sequence b, whose queries begin at row `start`."""
    if WIDE:
        return (first_entry(start, b, ROWS) + m) * per_row + n
    else:
        LARGER: tl.constexpr = ROWS if ROWS > KEYS else KEYS
        row = m // (LARGER // ROWS)
        before = row * (row + 1) // 2 * (LARGER // ROWS * (LARGER // KEYS))
        within = m % (LARGER // ROWS) * ((row + 1) * (LARGER // KEYS)) + n
        return first_entry(start, b, LARGER) * per_row + (before + within)


@triton.jit
def fragment_offsets(x, y, COLUMNS: tl.constexpr):
    """Where entry (x, y) of a tile with so many columns lies.

    In the order of the tensor cores' registers: a thread's eight of each 16 x 16 entries are neighbours, a warp's 256.
    """
    square = (x >> 4) * (COLUMNS // 16) + (y >> 4)
    lane = (x & 7) * 4 + ((y & 7) >> 1)
    return square * 256 + lane * 8 + ((y & 8) >> 1) + ((x & 8) >> 2) + (y & 1)


@triton.jit
def load_fragments(tile, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """(LINES, COLUMNS) as `bias_kernel` stored it.

    A thread's sixteen bytes at once, in the layout of a product's result: the eight entries that one assembly block
    makes are those that lie side by side, as `test_triton_compiles.py` verifies. Other layouts would read nonsense:
    where the compiler has no reason for this one (32 bits, the interpreter), entries are loaded one by one.
    """
    offsets = fragment_offsets(tl.arange(0, LINES)[:, None], tl.arange(0, COLUMNS)[None, :], COLUMNS)
    if EMULATED or tile.dtype.element_ty.primitive_bitwidth != 16:
        return tl.load(tile + offsets)
    elif COLUMNS == 64:  # one address for 16 lines
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.s32 a, $48, 2, $16;"
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [a]; ld.global.nc.v4.b32 {$4, $5, $6, $7}, [a + 512];"
            "ld.global.nc.v4.b32 {$8, $9, $10, $11}, [a + 1024];"
            "ld.global.nc.v4.b32 {$12, $13, $14, $15}, [a + 1536]; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,"
            "l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,l,"
            "r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [tile.to(tl.int64), offsets],
            dtype=tile.dtype.element_ty, is_pure=True, pack=32)  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.s32 a, $12, 2, $4; ld.global.nc.v4.b32 {$0, $1, $2, $3}, [a]; }",
            "=r,=r,=r,=r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r", [tile.to(tl.int64), offsets],
            dtype=tile.dtype.element_ty, is_pure=True, pack=8)  # fmt: skip


@triton.jit
def prefetch_tile(tile, ELEMENTS: tl.constexpr):
    """Asks for a tile of 16 bits, into the L1 cache."""
    if not EMULATED:
        lines = tile + tl.arange(0, ELEMENTS // 64) * 64
        tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)],
                                  dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@triton.jit
def fragment_entries(e, COLUMNS: tl.constexpr):
    """(x, y) of the numbers e of such a tile, the other way round than `fragment_offsets`."""
    square = e >> 8
    x = square // (COLUMNS // 16) * 16 + ((e >> 5) & 7) + ((e & 2) << 2)
    y = square % (COLUMNS // 16) * 16 + ((e >> 2) & 6) + ((e & 4) << 1) + (e & 1)
    return x, y


@triton.jit
def fragment_diagonals(e, COLUMNS: tl.constexpr):
    """y - x of `fragment_entries`, a sum with what a thread's neighbouring numbers have in common."""
    square = e >> 8
    common = (square % (COLUMNS // 16) - square // (COLUMNS // 16)) * 16 + (((e >> 2) & 6) - ((e >> 5) & 7))
    return common + (((e & 4) << 1) - ((e & 2) << 2) + (e & 1))
