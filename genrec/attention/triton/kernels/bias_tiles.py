"""The relative bias of all visited tiles of a batch, once for all heads and kept in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, first_entry, position_bias
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, query_blocks
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.stored import store_fragments, tile_number
from genrec.attention.triton.kernels.tiles import regions, sequence

LARGEST = tl.constexpr(65504.0)
"""Of fp16. A bias beyond is as good as this one."""


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
        for line in range(0, KEYS if OF_KEYS else ROWS, LINES):
            if OF_KEYS:
                i = (m * ROWS + shift + tl.arange(0, ROWS))[None, :]
                j = (n * KEYS + line + tl.arange(0, LINES))[:, None]
                bias = tl.zeros([LINES, ROWS], tl.float32)
            else:
                i = (m * ROWS + line + shift + tl.arange(0, LINES))[:, None]
                j = (n * KEYS + tl.arange(0, KEYS))[None, :]
                bias = tl.zeros([LINES, KEYS], tl.float32)
            i = tl.minimum(i, kv_len - 1)
            j = tl.minimum(j, kv_len - 1)
            if time_table is not None:
                bias = add_time_bias(bias, i, j, kv_times + kv_start, row_times, kv_len, earliest, span_first,
                                     span_last, near, time_table, edges, near_edges, BUCKETS, FACTOR)  # fmt: skip
            if position is not None:
                bias += position_bias(i, j, position, max_positions) * FACTOR
            if bias_tiles.dtype.element_ty == tl.float16:
                bias = tl.minimum(tl.maximum(bias, -LARGEST), LARGEST)
            store_fragments(tile + line * (ROWS if OF_KEYS else KEYS), bias.to(bias_tiles.dtype.element_ty))
