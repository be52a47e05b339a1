"""dq by a pass of its own: a program owns a block of rows, so that every sum of dq has one fixed order.

It may make the gradients of the relative bias's tables too: it holds one accumulator where the kernel over keys holds
two, so that there are registers for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.activation import kept, silu_slope
from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, dense_bias, first_entry, position_bias
from genrec.attention.triton.kernels.bias_gradient import add_position_gradient, add_time_gradient
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, visible
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.tiles import load_rows, product, regions, sequence


@triton.jit(do_not_specialize=["copies", "heads", "max_positions", "seed"])
def backward_rows_kernel(
    q, k, v, d_out, q_descriptor, k_descriptor, v_descriptor, d_out_descriptor, dq, d_position, d_time,
    q_offsets, kv_offsets, items, count, num_contexts, num_targets, scales,
    position, time_table, edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high, dense,
    q_row, q_head, k_row, k_head, v_row, v_head, d_out_row, d_out_head, dense_batch, dense_head, dense_row,
    copies, heads, max_positions, alpha, scale, dropout, seed,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Arguments as in `forward_kernel` and `backward_kernel`; dq is contiguous. Tiles are (ROWS, KEYS).

    Descriptors of q and d_out are given where nothing is summed over rows: they read beyond a sequence as well.
    """
    FACTOR: tl.constexpr = 0.5 if FAST else 1.0
    copy = (tl.program_id(0) % copies).to(tl.int64)
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
    i = (rows + shift)[:, None]
    i_inside = tl.minimum(i, kv_len - 1)
    slope_scale = scale
    if scales is not None:
        slope_scale = tl.load(scales + b).to(tl.float32)
    slope_scale = slope_scale * FACTOR
    q_tile = load_rows(q, q_descriptor, q_start, row0, q_len, q_row, h.to(tl.int64) * q_head, QK_DIM, QK_WIDTH, ROWS,
                       True, False)  # fmt: skip
    d_out_tile = load_rows(d_out, d_out_descriptor, q_start, row0, q_len, d_out_row, h.to(tl.int64) * d_out_head,
                           V_DIM, V_WIDTH, ROWS, True, False)  # fmt: skip
    if time_table is not None:
        entry = first_entry(q_start, b, ROWS) + block
        earliest = tl.load(row_low + entry)
        latest = tl.load(row_high + entry)
        keys_entry = first_entry(kv_start, b, KEYS)
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
            j = (n * KEYS + tl.arange(0, KEYS))[None, :]
            if CUT:
                j_inside = tl.minimum(j, kv_len - 1)
            else:
                j_inside = j
            if time_table is not None:  # while the products of scores run, not after them
                span_first, span_last, near = bucket_span(
                    earliest, latest, tl.load(key_low + keys_entry + n), tl.load(key_high + keys_entry + n), BUCKETS
                )
                row_times = None
                if q_times is not None:
                    row_times = q_times + (q_start - shift)
            k_tile = load_rows(k, k_descriptor, kv_start, n * KEYS, kv_len, k_row, h * k_head, QK_DIM, QK_WIDTH, KEYS,
                               CUT, True)  # fmt: skip
            x = product(q_tile, tl.trans(k_tile), None, PRECISION) * (alpha * FACTOR)
            v_tile = load_rows(v, v_descriptor, kv_start, n * KEYS, kv_len, v_row, h * v_head, V_DIM, V_WIDTH, KEYS,
                               CUT, False)  # fmt: skip
            d_weight = product(d_out_tile, tl.trans(v_tile), None, PRECISION)
            if time_table is not None:
                x = add_time_bias(x, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, earliest, span_first,
                                  span_last, near, time_table, edges, near_edges, BUCKETS, FACTOR)  # fmt: skip
            if position is not None:
                x += position_bias(i_inside, j_inside, position, max_positions) * FACTOR
            if dense is not None:
                base = dense + b.to(tl.int64) * dense_batch + h.to(tl.int64) * dense_head
                x += dense_bias(base, rows[:, None], j, dense_row, (rows < q_len)[:, None] & (j < kv_len)) * FACTOR
            slope = silu_slope(x, slope_scale, FAST)
            if HAS_DROPOUT:
                slope *= kept(seed, b * heads + h, i, j, dropout)
            # Scaled before it is rounded: fp16 overflows easily.
            d_score = d_weight * slope
            if CUT:
                seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                               num_targets is not None)  # fmt: skip
                d_score = tl.where(seen & (j < kv_len), d_score, 0.0)
            acc = product(d_score.to(k_tile.dtype), k_tile, acc, PRECISION)
            if d_time is not None:
                add_time_gradient(d_score, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, earliest,
                                  span_first, span_last, near, d_time + copy * BUCKETS, edges, near_edges, BUCKETS,
                                  False)  # fmt: skip
            if d_position is not None:
                entries = 2 * max_positions - 1
                add_position_gradient(d_score, n * KEYS - row0 - shift + max_positions - 1,
                                      d_position + copy * entries, entries, False, False)  # fmt: skip
    d = tl.arange(0, QK_WIDTH)[None, :]
    address = dq + ((q_start + row0) * heads + h) * QK_DIM + tl.arange(0, ROWS)[:, None] * (heads * QK_DIM) + d
    tl.store(address, (acc * alpha).to(dq.dtype.element_ty), (rows < q_len)[:, None] & (d < QK_DIM))
