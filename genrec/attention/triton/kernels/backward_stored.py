"""What the backward pass makes of stored gradients of the scores: dq, and the gradients of the bias's tables.

The kernel over keys (`backward_kernel`) has stored them in cells of 128 keys x 128 rows, rows side by side; hidden
pairs of a cell that it visits are zeros there, what it doesn't visit is not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import bucket_span, first_entry
from genrec.attention.triton.kernels.bias_gradient import add_position_gradient, add_time_gradient
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, visible
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.stored import tile_number
from genrec.attention.triton.kernels.tiles import load_rows, product, regions, sequence

CELL = tl.constexpr(128)
"""Keys and rows of a cell."""
TOGETHER = tl.constexpr(4)
"""Heads whose tiles are asked for at the same time."""


@triton.jit
def cell_line(start, b, row0, key0, per_row, WIDE: tl.constexpr):
    """int64 line of CELL elements that holds key `key0` and the rows of row0's cell, of the first head."""
    return tile_number(start, b, row0 // CELL, key0 // CELL, per_row, WIDE, CELL, CELL) * CELL + key0 % CELL


@triton.jit(do_not_specialize=["cells", "cells_per_row", "heads"])
def stored_rows_kernel(
    scores, scores_descriptor, k, k_descriptor, dq, q_offsets, kv_offsets, items, count, num_contexts, num_targets,
    k_row, k_head, cells, cells_per_row, heads, alpha,
    QK_DIM: tl.constexpr, QK_WIDTH: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (contiguous): a program owns a block of rows of a head. One product a tile, and memory is the limit."""
    work = tl.program_id(0)
    if work >= tl.load(count) * heads:
        return
    b, h, block = locate(work, items, heads)
    row0 = block * ROWS
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    rows = row0 + tl.arange(0, ROWS)
    i = (rows + shift)[None, :]
    acc = tl.zeros([ROWS, QK_WIDTH], tl.float32)
    first, low, full_low, full_high, high, target_low, target_high = key_blocks(
        row0 + shift, tl.minimum(row0 + ROWS, q_len) + shift, contexts, history_end, KEYS, GROUP, WINDOW, CAUSAL,
        num_targets is not None)  # fmt: skip
    for CUT in tl.static_range(2):
        if CUT:
            begin = 0
            end = cut_count(first, low, full_low, full_high, high, target_low, target_high)
        else:
            begin = full_low
            end = full_high
        for index in tl.range(begin, end, num_stages=STAGES):
            if CUT:
                n = cut_block(index, first, low, full_low, full_high, high, target_low)
            else:
                n = index
            key0 = n * KEYS
            line = cell_line(q_start, b, row0, key0, cells_per_row, WIDE) + h.to(tl.int64) * cells * CELL
            if scores_descriptor is not None:
                d_score = scores_descriptor.load([line.to(tl.int32), row0 % CELL])
            else:
                e = tl.arange(0, KEYS)[:, None] * CELL + tl.arange(0, ROWS)[None, :]
                d_score = tl.load(scores + (line * CELL + row0 % CELL) + e)
            if CUT:
                j = (key0 + tl.arange(0, KEYS))[:, None]
                seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                               num_targets is not None)  # fmt: skip
                # What was not written may be NaN: it is replaced.
                d_score = tl.where(seen & (j < kv_len) & (rows < q_len)[None, :], d_score, 0.0)
            k_tile = load_rows(k, k_descriptor, kv_start, key0, kv_len, k_row, h * k_head, QK_DIM, QK_WIDTH, KEYS, CUT,
                               True)  # fmt: skip
            acc = product(tl.trans(d_score), k_tile, acc, PRECISION)
    d = tl.arange(0, QK_WIDTH)[None, :]
    address = dq + ((q_start + row0) * heads + h) * QK_DIM + tl.arange(0, ROWS)[:, None] * (heads * QK_DIM) + d
    tl.store(address, (acc * alpha).to(dq.dtype.element_ty), (rows < q_len)[:, None] & (d < QK_DIM))


@triton.jit(do_not_specialize=["cells", "cells_per_row", "first_work", "parts", "copies", "heads", "max_positions"])
def stored_tables_kernel(
    scores, d_position, d_time, q_offsets, kv_offsets, items, count, num_contexts, num_targets,
    edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high,
    cells, cells_per_row, first_work, parts, copies, heads, max_positions,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BUCKETS: tl.constexpr,
    WIDE: tl.constexpr, MASKED: tl.constexpr, DETERMINISTIC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_position (copies, 2M - 1) and d_time (copies, buckets), sums in fp32 over all heads; tiles are (keys, rows).

    A program goes down a diagonal of square tiles (or `parts` of them do, by turns): the same entry of each belongs to
    the same entry of the position table, so that tiles are added as they are, and summed along their own diagonals once
    in the end. MASKED, tiles may hold what was not written: it is not read.
    """
    copy = (tl.program_id(0) % copies).to(tl.int64)
    work = first_work + tl.program_id(0)
    if work >= tl.load(count) * parts:
        return
    b, part, band = locate(work, items, parts)
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    row_times = None
    if d_time is not None:
        rows_entry = first_entry(q_start, b, BLOCK)
        keys_entry = first_entry(kv_start, b, BLOCK)
        if q_times is not None:
            row_times = q_times + (q_start - shift)
    row_blocks = tl.cdiv(q_len, BLOCK)
    key_blocks_ = tl.cdiv(kv_len, BLOCK)
    apart = cells.to(tl.int64) * (CELL * CELL)
    x = tl.arange(0, BLOCK)
    e = x[:, None] * CELL + x[None, :]
    # Bands below the diagonal, and above it: there is something only where keys are more than queries or seen ahead.
    for SIDE in tl.static_range(2 if WIDE else 1):
        if SIDE:
            row_first = 0
            key_first = band
            steps = tl.where(band > 0, tl.minimum(row_blocks, key_blocks_ - band), 0)
        else:
            row_first = band
            key_first = 0
            steps = tl.minimum(row_blocks - band, key_blocks_)
        summed = tl.zeros([BLOCK, BLOCK], tl.float32)
        for step in tl.range(part, steps, parts, num_stages=STAGES):
            m = row_first + step
            n = key_first + step
            row0 = m * BLOCK
            key0 = n * BLOCK
            i = (row0 + shift + x)[None, :]
            j = (key0 + x)[:, None]
            line = cell_line(q_start, b, row0, key0, cells_per_row, WIDE)
            at = line * CELL + row0 % CELL
            of_heads = tl.zeros([BLOCK, BLOCK], tl.float32)
            if MASKED:
                seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                               num_targets is not None)  # fmt: skip
                seen = seen & (i < kv_len) & (j < kv_len)
                for h in range(heads):
                    of_heads += tl.load(scores + (tl.multiple_of(at + h * apart, BLOCK) + e), seen, 0.0).to(tl.float32)
            else:
                for group in range(0, heads, TOGETHER):
                    for place in tl.static_range(TOGETHER):
                        h = group + place
                        present = tl.full([BLOCK, BLOCK], 1, tl.int1) & (h < heads)
                        address = scores + (tl.multiple_of(at + h * apart, BLOCK) + e)  # wide loads want to know
                        of_heads += tl.load(address, present, 0.0).to(tl.float32)
            summed += of_heads
            if d_time is not None:
                earliest = tl.load(row_low + rows_entry + m)
                span_first, span_last, near = bucket_span(
                    earliest, tl.load(row_high + rows_entry + m), tl.load(key_low + keys_entry + n),
                    tl.load(key_high + keys_entry + n), BUCKETS)  # fmt: skip
                add_time_gradient(of_heads, tl.minimum(i, kv_len - 1), tl.minimum(j, kv_len - 1), kv_times + kv_start,
                                  row_times, kv_len, earliest, span_first, span_last, near, d_time + copy * BUCKETS,
                                  edges, near_edges, BUCKETS, DETERMINISTIC)  # fmt: skip
        if d_position is not None:  # noqa: SIM102  the one is known to the compiler, the other isn't
            if part < steps:
                entries = 2 * max_positions - 1
                offset = (key_first - row_first) * BLOCK - shift + max_positions - 1
                add_position_gradient(summed, offset, d_position + copy * entries, entries, True,
                                      DETERMINISTIC)  # fmt: skip
