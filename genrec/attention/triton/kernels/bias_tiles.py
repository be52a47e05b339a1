"""The relative bias of all visited tiles of a batch, once for all heads and kept in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, first_entry
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, query_blocks
from genrec.attention.triton.kernels.memory import gather, gather_at
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.stored import fragment_diagonals, fragment_entries, tile_number
from genrec.attention.triton.kernels.tiles import EMULATED, regions, sequence

LARGEST = tl.constexpr(65504.0)
"""Of fp16. A bias beyond is as good as this one."""


@triton.jit
def finite_half(x):
    """fp16, no farther than LARGEST; NaN stays NaN."""
    if EMULATED:
        x = tl.where(x > LARGEST, LARGEST, x)
        return tl.where(x < -LARGEST, -LARGEST, x).to(tl.float16)
    else:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16,
                                         is_pure=True, pack=2)  # fmt: skip


@triton.jit(do_not_specialize=["parts", "bias_per_row", "max_positions"])
def bias_kernel(
    bias_tiles, q_offsets, kv_offsets, items, count, num_contexts, num_targets,
    position, time_table, edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high,
    parts, bias_per_row, max_positions,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BUCKETS: tl.constexpr, FAST: tl.constexpr,
    OF_KEYS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Tiles as the kernel that loads them has them: (KEYS, ROWS) where OF_KEYS, a program for a block of keys and every
    so many of the row blocks that it visits; else (ROWS, KEYS), for a block of rows. With FAST half the bias, as `silu`
    wants it. So many LINES of a tile are computed at a time.
    """
    FACTOR: tl.constexpr = 0.5 if FAST else 1.0
    COLUMNS: tl.constexpr = ROWS if OF_KEYS else KEYS
    work = tl.program_id(0)
    if work >= tl.load(count) * parts:
        return
    b, part, block = locate(work, items, parts)
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    row_times = None
    if time_table is not None:
        rows_entry = first_entry(q_start, b, ROWS)
        keys_entry = first_entry(kv_start, b, KEYS)
        if q_times is not None:
            row_times = q_times + (q_start - shift)
    if OF_KEYS:
        first, low, _full_low, _full_high, high, target_low, target_high = query_blocks(
            block * KEYS, tl.minimum(block * KEYS + KEYS, kv_len), contexts, history_end, kv_len, q_len, ROWS, KEYS,
            GROUP, WINDOW, CAUSAL, num_targets is not None)  # fmt: skip
    else:
        first, low, _full_low, _full_high, high, target_low, target_high = key_blocks(
            block * ROWS + shift, tl.minimum(block * ROWS + ROWS, q_len) + shift, contexts, history_end, KEYS, GROUP,
            WINDOW, CAUSAL, num_targets is not None)  # fmt: skip
    e = tl.arange(0, LINES * COLUMNS)
    x, y = fragment_entries(e, COLUMNS)
    apart = fragment_diagonals(e, COLUMNS)
    if OF_KEYS:
        apart = -apart
    visits = cut_count(first, low, low, low, high, target_low, target_high)
    for index in range(part, visits, parts):
        other = cut_block(index, first, low, low, low, high, target_low)
        if OF_KEYS:
            m, n = other, block
        else:
            m, n = block, other
        if time_table is not None:
            earliest = tl.load(row_low + rows_entry + m)
            span_first, span_last, near = bucket_span(
                earliest, tl.load(row_high + rows_entry + m), tl.load(key_low + keys_entry + n),
                tl.load(key_high + keys_entry + n), BUCKETS)  # fmt: skip
        tile = bias_tiles + tile_number(q_start, b, m, n, bias_per_row, WIDE, ROWS, KEYS) * (ROWS * KEYS)
        # Neighbouring lanes have neighbouring numbers of the tile: what they make is stored as it is, 16 bytes at once.
        for line in range(0, KEYS if OF_KEYS else ROWS, LINES):
            if OF_KEYS:
                i0, j0 = m * ROWS + shift, n * KEYS + line
            else:
                i0, j0 = m * ROWS + shift + line, n * KEYS
            bias = tl.zeros([LINES * COLUMNS], tl.float32)
            if position is not None:
                entries = 2 * max_positions - 1
                first_place = j0 - i0 + (max_positions - 1)
                if (first_place >= LINES + COLUMNS) & (first_place + (LINES + COLUMNS) <= entries):
                    bias = gather_at(position + first_place, apart) * FACTOR
                else:  # beyond a sequence it doesn't matter which entry is taken
                    bias = gather(position, tl.minimum(tl.maximum(first_place + apart, 0), entries - 1)) * FACTOR
            if time_table is not None:
                i = tl.minimum(i0 + (y if OF_KEYS else x), kv_len - 1)
                j = tl.minimum(j0 + (x if OF_KEYS else y), kv_len - 1)
                bias = add_time_bias(bias, i, j, kv_times + kv_start, row_times, kv_len, earliest, span_first,
                                     span_last, near, time_table, edges, near_edges, BUCKETS, FACTOR,
                                     ALONE=True)  # fmt: skip
            if bias_tiles.dtype.element_ty == tl.float16:
                bias = finite_half(bias)
            tl.store(tile + line * COLUMNS + e, bias)
