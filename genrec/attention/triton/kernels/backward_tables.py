"""The gradients of the relative bias's tables, by a pass of their own.

All heads share the tables, and an entry of a block belongs to the same time bucket and the same diagonal in every
head: here the heads' gradients of the scores are added first, in registers, and what follows is done once for all of
them, as is the bias itself. The two products of each head are made again, seven products a block instead of five; but
neither pass then has to hold what the other needs, and nothing is summed over blocks but in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.activation import kept, silu_and_slope
from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, first_entry, position_bias
from genrec.attention.triton.kernels.bias_gradient import add_position_gradient, add_time_gradient
from genrec.attention.triton.kernels.mask import cut_block, cut_count, query_blocks, visible
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.tiles import load_rows, product, regions, sequence


@triton.jit(do_not_specialize=["first_work", "copies", "heads", "max_positions", "seed"])
def backward_tables_kernel(
    q, k, v, d_out, q_descriptor, k_descriptor, v_descriptor, d_out_descriptor, d_position, d_time,
    q_offsets, kv_offsets, items, count, num_contexts, num_targets, scales,
    position, time_table, edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high, dense,
    q_row, q_head, k_row, k_head, v_row, v_head, d_out_row, d_out_head, dense_batch, dense_head, dense_row,
    first_work, copies, heads, max_positions, alpha, scale, dropout, seed,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, DETERMINISTIC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_position (copies, 2M - 1) and d_time (copies, buckets) as in `backward_kernel`; tiles are (KEYS, ROWS).

    As many programs as there are heads share a block of keys: each takes every so many of its blocks of rows.
    """
    FACTOR: tl.constexpr = 0.5 if FAST else 1.0
    copy = (tl.program_id(0) % copies).to(tl.int64)
    work = first_work + tl.program_id(0)
    if work >= tl.load(count) * heads:
        return
    b, part, block = locate(work, items, heads)
    key0 = block * KEYS
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    j = (key0 + tl.arange(0, KEYS))[:, None]
    j_inside = tl.minimum(j, kv_len - 1)
    slope_scale = scale
    if scales is not None:
        slope_scale = tl.load(scales + b).to(tl.float32)
    slope_scale = slope_scale * FACTOR
    row_times = None
    if time_table is not None:
        entry = first_entry(kv_start, b, KEYS) + block
        earliest = tl.load(key_low + entry)
        latest = tl.load(key_high + entry)
        rows_entry = first_entry(q_start, b, ROWS)
        if q_times is not None:
            row_times = q_times + (q_start - shift)
    first, low, _full_low, _full_high, high, target_low, target_high = query_blocks(
        key0, tl.minimum(key0 + KEYS, kv_len), contexts, history_end, kv_len, q_len, ROWS, KEYS, GROUP, WINDOW, CAUSAL,
        num_targets is not None)  # fmt: skip
    visits = cut_count(first, low, low, low, high, target_low, target_high)
    mine = tl.maximum(visits - part + heads - 1, 0) // heads
    bias = tl.zeros([KEYS, ROWS], tl.float32)
    total = tl.zeros([KEYS, ROWS], tl.float32)
    # One loop over blocks and heads, so that the loads of a block run ahead in the one before.
    for step in tl.range(0, mine * heads, num_stages=STAGES):
        h = step % heads
        m = cut_block(part + step // heads * heads, first, low, low, low, high, target_low)
        row0 = m * ROWS
        rows = row0 + tl.arange(0, ROWS)
        i = (rows + shift)[None, :]
        i_inside = tl.minimum(i, kv_len - 1)
        k_tile = load_rows(k, k_descriptor, kv_start, key0, kv_len, k_row, h * k_head, QK_DIM, QK_WIDTH, KEYS, True,
                           False)  # fmt: skip
        q_tile = load_rows(q, q_descriptor, q_start, row0, q_len, q_row, h * q_head, QK_DIM, QK_WIDTH, ROWS, True,
                           False)  # fmt: skip
        x = product(k_tile, tl.trans(q_tile), None, PRECISION) * (alpha * FACTOR)
        v_tile = load_rows(v, v_descriptor, kv_start, key0, kv_len, v_row, h * v_head, V_DIM, V_WIDTH, KEYS, True,
                           False)  # fmt: skip
        d_out_tile = load_rows(d_out, d_out_descriptor, q_start, row0, q_len, d_out_row, h * d_out_head, V_DIM, V_WIDTH,
                               ROWS, True, False)  # fmt: skip
        d_weight = product(v_tile, tl.trans(d_out_tile), None, PRECISION)
        if h == 0:
            bias = tl.zeros([KEYS, ROWS], tl.float32)
            if time_table is not None:
                row_earliest = tl.load(row_low + rows_entry + m)
                span_first, span_last, near = bucket_span(
                    row_earliest, tl.load(row_high + rows_entry + m), earliest, latest, BUCKETS)  # fmt: skip
                bias = add_time_bias(bias, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, row_earliest,
                                     span_first, span_last, near, time_table, edges, near_edges, BUCKETS,
                                     FACTOR)  # fmt: skip
            if position is not None:
                bias += position_bias(i_inside, j_inside, position, max_positions) * FACTOR
            total = tl.zeros([KEYS, ROWS], tl.float32)
        _p, slope = silu_and_slope(x + bias, FAST)
        if HAS_DROPOUT:
            slope *= kept(seed, b * heads + h, i, j, dropout)
        total += d_weight * slope
        if h == heads - 1:
            seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                           num_targets is not None)  # fmt: skip
            # What lies beyond the sequence may be NaN: it is replaced, not multiplied.
            d_score = tl.where(seen & (rows < q_len)[None, :] & (j < kv_len), total * slope_scale, 0.0)
            if d_time is not None:
                row_earliest = tl.load(row_low + rows_entry + m)
                span_first, span_last, near = bucket_span(
                    row_earliest, tl.load(row_high + rows_entry + m), earliest, latest, BUCKETS)  # fmt: skip
                add_time_gradient(d_score, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, row_earliest,
                                  span_first, span_last, near, d_time + copy * BUCKETS, edges, near_edges, BUCKETS,
                                  DETERMINISTIC)  # fmt: skip
            if d_position is not None:
                entries = 2 * max_positions - 1
                add_position_gradient(d_score, key0 - row0 - shift + max_positions - 1,
                                      d_position + copy * entries, entries, True, DETERMINISTIC)  # fmt: skip
