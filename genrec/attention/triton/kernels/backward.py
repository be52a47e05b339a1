"""The backward kernel: a program owns a block of keys and walks over the blocks of rows that see them.

It makes dk, dv and the gradients of the bias. With dq_sum it adds its share of dq in fp32: one pass over the scores,
five products a block, where a second pass over the rows would make seven of them. The deterministic mode pays for that
second pass (`backward_rows`), since the order of additions is not fixed here.

Without dk (then nothing but dv comes of it) or without dv it has one accumulator in place of two: at a head dim of 256
they don't fit into registers together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.activation import kept, silu, silu_and_slope, silu_slope
from genrec.attention.triton.kernels.backward_stored import CELL, cell_line
from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, dense_bias, first_entry, position_bias
from genrec.attention.triton.kernels.bias_gradient import add_position_gradient, add_time_gradient
from genrec.attention.triton.kernels.mask import cut_block, cut_count, query_blocks, visible
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.stored import load_fragments, tile_number
from genrec.attention.triton.kernels.tiles import load_rows, product, regions, sequence


@triton.jit(do_not_specialize=["bias_per_row", "cells", "cells_per_row", "first_work", "copies", "heads",
                               "max_positions", "seed"])  # fmt: skip
def backward_kernel(
    q, k, v, d_out, q_descriptor, k_descriptor, v_descriptor, d_out_descriptor, dq_sum, dq_descriptor, dk, dv,
    d_position, d_time, d_dense,
    q_offsets, kv_offsets, items, count, num_contexts, num_targets, scales,
    position, time_table, edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high, dense,
    q_row, q_head, k_row, k_head, v_row, v_head, d_out_row, d_out_head,
    dense_batch, dense_head, dense_row, d_dense_batch, d_dense_head, d_dense_row,
    bias_tiles, bias_per_row, scores, scores_descriptor, cells, cells_per_row,
    first_work, copies, heads, max_positions, alpha, scale, dropout, seed,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, DETERMINISTIC: tl.constexpr, SHARED_DENSE: tl.constexpr,
    BIAS_WIDE: tl.constexpr, CELLS_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv, dq_sum are contiguous, None for what isn't wanted; without dk there is no gradient of scores either.

    d_position is (copies, 2M - 1), d_time (copies, buckets), all fp32 sums. Descriptors of k and v are given where
    nothing is summed over keys: they read what lies beyond a sequence as well.

    bias_tiles are `bias_kernel`'s for the same blocks; then there is neither `position` nor `time_table`. Into `scores`
    go the gradients of the scores, for `backward_stored`.

    Tiles of scores are (KEYS, ROWS): their products with rows then take the scores from registers.
    """
    FACTOR: tl.constexpr = 0.5 if FAST else 1.0
    BIASED: tl.constexpr = position is not None or time_table is not None
    copy = (tl.program_id(0) % copies).to(tl.int64)
    # Loops over pieces of work would hold registers that the accumulators need: the hardware starts the next program.
    work = first_work + tl.program_id(0)
    if work >= tl.load(count) * heads:
        return
    b, h, block = locate(work, items, heads)
    key0 = block * KEYS
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    keys = key0 + tl.arange(0, KEYS)
    j = keys[:, None]
    j_inside = tl.minimum(j, kv_len - 1)
    weight_scale = scale
    if scales is not None:
        weight_scale = tl.load(scales + b).to(tl.float32)
    slope_scale = weight_scale * FACTOR
    k_tile = load_rows(k, k_descriptor, kv_start, key0, kv_len, k_row, h.to(tl.int64) * k_head, QK_DIM, QK_WIDTH, KEYS,
                       True, False)  # fmt: skip
    if dk is not None:
        v_tile = load_rows(v, v_descriptor, kv_start, key0, kv_len, v_row, h.to(tl.int64) * v_head, V_DIM, V_WIDTH,
                           KEYS, True, False)  # fmt: skip
    if time_table is not None:
        entry = first_entry(kv_start, b, KEYS) + block
        earliest = tl.load(key_low + entry)
        latest = tl.load(key_high + entry)
        rows_entry = first_entry(q_start, b, ROWS)
    if dk is not None:
        dk_acc = tl.zeros([KEYS, QK_WIDTH], tl.float32)
    if dv is not None:
        dv_acc = tl.zeros([KEYS, V_WIDTH], tl.float32)
    first, low, full_low, full_high, high, target_low, target_high = query_blocks(
        key0, tl.minimum(key0 + KEYS, kv_len), contexts, history_end, kv_len, q_len, ROWS, KEYS, GROUP, WINDOW, CAUSAL,
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
                m = cut_block(index, first, low, full_low, full_high, high, target_low)
            else:
                m = index
            row0 = m * ROWS
            rows = row0 + tl.arange(0, ROWS)
            i = (rows + shift)[None, :]
            if CUT:
                i_inside = tl.minimum(i, kv_len - 1)
            else:
                i_inside = i
            if time_table is not None:  # while the products of scores run, not after them
                row_earliest = tl.load(row_low + rows_entry + m)
                span_first, span_last, near = bucket_span(
                    row_earliest, tl.load(row_high + rows_entry + m), earliest, latest, BUCKETS)  # fmt: skip
                row_times = None
                if q_times is not None:
                    row_times = q_times + (q_start - shift)
            # What enters a sum over rows has to be clean; scores of rows beyond the sequence are hidden.
            q_tile = load_rows(q, q_descriptor, q_start, row0, q_len, q_row, h * q_head, QK_DIM, QK_WIDTH, ROWS, CUT,
                               dk is not None)  # fmt: skip
            if bias_tiles is not None:
                number = tile_number(q_start, b, m, block, bias_per_row, BIAS_WIDE, ROWS, KEYS)
                bias = load_fragments(bias_tiles + number * (ROWS * KEYS), KEYS, ROWS)
            x = product(k_tile, tl.trans(q_tile), None, PRECISION) * (alpha * FACTOR)
            if bias_tiles is not None:
                x += bias.to(tl.float32)
            d_out_tile = load_rows(d_out, d_out_descriptor, q_start, row0, q_len, d_out_row, h * d_out_head, V_DIM,
                                   V_WIDTH, ROWS, CUT, dv is not None)  # fmt: skip
            if dk is not None and not BIASED:
                d_weight = product(v_tile, tl.trans(d_out_tile), None, PRECISION)
            if time_table is not None:
                x = add_time_bias(x, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, row_earliest,
                                  span_first, span_last, near, time_table, edges, near_edges, BUCKETS,
                                  FACTOR)  # fmt: skip
            if position is not None:
                x += position_bias(i_inside, j_inside, position, max_positions) * FACTOR
            if dense is not None:
                base = dense + b.to(tl.int64) * dense_batch + h.to(tl.int64) * dense_head
                x += dense_bias(base, rows[None, :], j, dense_row, (rows < q_len)[None, :] & (j < kv_len)) * FACTOR
            if dk is None:
                p = silu(x, FAST)
            elif dv is None:
                slope = silu_slope(x, slope_scale, FAST)
            else:
                p, slope = silu_and_slope(x, FAST)
                slope *= slope_scale
            if CUT:
                seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                               num_targets is not None)  # fmt: skip
                seen = seen & (rows < q_len)[None, :]
            if HAS_DROPOUT:
                keep = kept(seed, b * heads + h, i, j, dropout)
                if dv is not None:
                    p *= keep
                if dk is not None:
                    slope *= keep
            if dv is not None:
                if CUT:
                    p = tl.where(seen, p, 0.0)
                dv_acc = product(p.to(d_out_tile.dtype), d_out_tile, dv_acc, PRECISION)
            if dk is not None and BIASED:
                # Not earlier: while the bias is looked up, registers are short.
                d_weight = product(v_tile, tl.trans(d_out_tile), None, PRECISION)
            if dk is not None:
                # Scaled before it is rounded: fp16 overflows easily.
                d_score = d_weight * slope
                if CUT:
                    d_score = tl.where(seen, d_score, 0.0)
                d_rounded = d_score.to(q_tile.dtype)
                dk_acc = product(d_rounded, q_tile, dk_acc, PRECISION)
                if scores is not None:
                    line = cell_line(q_start, b, row0, key0, cells_per_row, CELLS_WIDE) + h.to(tl.int64) * cells * CELL
                    if scores_descriptor is not None:
                        scores_descriptor.store([line.to(tl.int32), row0 % CELL], d_rounded)
                    else:
                        # Inside of what there is even if a length is too small; a descriptor minds that itself.
                        line = tl.minimum(line, cells.to(tl.int64) * heads * CELL - KEYS)
                        e = tl.arange(0, KEYS)[:, None] * CELL + tl.arange(0, ROWS)[None, :]
                        tl.store(scores + (line * CELL + row0 % CELL) + e, d_rounded)
            if dq_sum is not None:
                dq = product(tl.trans(d_rounded), k_tile, None, PRECISION) * alpha
                if dq_descriptor is not None:
                    # Rows beyond the sequence add zeros to the next one.
                    dq_descriptor.atomic_add([(q_start + row0).to(tl.int32), h * QK_DIM], dq)
                else:
                    d = tl.arange(0, QK_WIDTH)
                    into = dq_sum + ((q_start + row0) * heads + h) * QK_DIM
                    into = into + (tl.arange(0, ROWS) * (heads * QK_DIM))[:, None] + d[None, :]
                    tl.atomic_add(into, dq, (rows < q_len)[:, None] & (d < QK_DIM)[None, :], sem="relaxed")
            if d_dense is not None:
                into = d_dense + b.to(tl.int64) * d_dense_batch + h.to(tl.int64) * d_dense_head
                into = into + rows.to(tl.int64)[None, :] * d_dense_row + j
                inside = (rows < q_len)[None, :] & (j < kv_len)
                if SHARED_DENSE:
                    tl.atomic_add(into, d_score, inside, sem="relaxed")
                else:
                    tl.store(into, d_score.to(d_dense.dtype.element_ty), inside)
            if d_time is not None:
                add_time_gradient(d_score, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, row_earliest,
                                  span_first, span_last, near, d_time + copy * BUCKETS, edges, near_edges, BUCKETS,
                                  DETERMINISTIC)  # fmt: skip
            if d_position is not None:
                entries = 2 * max_positions - 1
                add_position_gradient(d_score, key0 - row0 - shift + max_positions - 1,
                                      d_position + copy * entries, entries, True, DETERMINISTIC)  # fmt: skip
    r = tl.arange(0, KEYS)[:, None] * heads
    inside = (keys < kv_len)[:, None]
    if dk is not None:
        d = tl.arange(0, QK_WIDTH)[None, :]
        tl.store(dk + ((kv_start + key0) * heads + h) * QK_DIM + r * QK_DIM + d,
                 (dk_acc * alpha).to(dk.dtype.element_ty), inside & (d < QK_DIM))  # fmt: skip
    if dv is not None:
        d = tl.arange(0, V_WIDTH)[None, :]
        tl.store(dv + ((kv_start + key0) * heads + h) * V_DIM + r * V_DIM + d,
                 (dv_acc * weight_scale).to(dv.dtype.element_ty), inside & (d < V_DIM))  # fmt: skip
