"""The forward kernel: a program owns a block of rows and walks over the blocks of keys that they see."""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.activation import kept, silu
from genrec.attention.triton.kernels.bias import add_time_bias, bucket_span, dense_bias, first_entry, position_bias
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, visible
from genrec.attention.triton.kernels.schedule import locate, rows_of
from genrec.attention.triton.kernels.stored import load_fragments, prefetch_tile, tile_number
from genrec.attention.triton.kernels.tiles import load_rows, product, regions, sequence


@triton.jit(do_not_specialize=["bias_per_row", "heads", "max_positions", "seed"])
def forward_kernel(
    q, k, v, out, k_descriptor, v_descriptor,
    q_offsets, kv_offsets, items, count, num_contexts, num_targets, scales,
    position, time_table, edges, near_edges, kv_times, q_times, row_low, row_high, key_low, key_high, dense,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, dense_batch, dense_head, dense_row,
    bias_tiles, bias_per_row, heads, max_positions, alpha, scale, dropout, seed,
    QK_DIM: tl.constexpr, V_DIM: tl.constexpr, QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, BIAS_WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, BIAS_AHEAD: tl.constexpr,
):  # fmt: skip
    """Pointers are None for what a call doesn't have. Blocks seen whole come first, then those that need a mask.

    bias_tiles are `bias_kernel`'s for the same blocks, with `hidden_bias` where a row doesn't see a key; then there is
    neither `position` nor `time_table`.
    """
    FACTOR: tl.constexpr = 0.5 if FAST else 1.0
    work = tl.program_id(0)
    if work >= tl.load(count) * heads:
        return
    b, h, block = locate(work, items, heads)
    q_start, q_len = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    row0, row_end = rows_of(block, q_len, ROWS, time_table is None and bias_tiles is None)
    contexts, history_end = regions(num_contexts, num_targets, b, kv_len)
    shift = kv_len - q_len
    rows = row0 + tl.arange(0, ROWS)
    i = (rows + shift)[:, None]
    i_inside = tl.minimum(i, kv_len - 1)
    q_tile = load_rows(q, None, q_start, row0, row_end, q_row, h.to(tl.int64) * q_head, QK_DIM, QK_WIDTH, ROWS, True,
                       True)  # fmt: skip
    if time_table is not None:
        entry = first_entry(q_start, b, ROWS) + block
        earliest = tl.load(row_low + entry)
        latest = tl.load(row_high + entry)
        keys_entry = first_entry(kv_start, b, KEYS)
    acc = tl.zeros([ROWS, V_WIDTH], tl.float32)
    first, low, full_low, full_high, high, target_low, target_high = key_blocks(
        row0 + shift, row_end + shift, contexts, history_end, KEYS, GROUP, WINDOW, CAUSAL,
        num_targets is not None)  # fmt: skip
    if bias_tiles is not None:  # blocks with keys beyond the sequence's end alone need a mask: at most the last
        full_low = low
        full_high = low
        visits = cut_count(first, low, low, low, high, target_low, target_high)
        last = cut_block(visits - 1, first, low, low, low, high, target_low)
        inside = visits - ((visits > 0) & (last * KEYS + KEYS > kv_len)).to(tl.int32)
    for CUT in tl.static_range(2):
        if bias_tiles is not None:
            begin = inside if CUT else 0
            end = visits if CUT else inside
        elif CUT:
            begin = 0
            end = cut_count(first, low, full_low, full_high, high, target_low, target_high)
        else:
            begin = full_low
            end = full_high
        for index in tl.range(begin, end, num_stages=STAGES):
            if CUT or bias_tiles is not None:
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
            if bias_tiles is not None:
                tile = bias_tiles + tile_number(q_start, b, block, n, bias_per_row, BIAS_WIDE, ROWS, KEYS) * (
                    ROWS * KEYS)  # fmt: skip
                if BIAS_AHEAD == 1:  # while the products of scores run, without registers
                    prefetch_tile(tile, ROWS * KEYS)
                elif BIAS_AHEAD == 2:  # the next one, where this one is not the last
                    prefetch_tile(tile + tl.where(index + 1 < end, ROWS * KEYS, 0), ROWS * KEYS)
            k_tile = load_rows(k, k_descriptor, kv_start, n * KEYS, kv_len, k_row, h * k_head, QK_DIM, QK_WIDTH, KEYS,
                               CUT, False)  # fmt: skip
            x = product(q_tile, tl.trans(k_tile), None, PRECISION) * (alpha * FACTOR)
            if bias_tiles is not None:
                x += load_fragments(tile, ROWS, KEYS).to(tl.float32)  # what is hidden gets a weight of zero
            if time_table is not None:
                x = add_time_bias(x, i_inside, j_inside, kv_times + kv_start, row_times, kv_len, earliest, span_first,
                                  span_last, near, time_table, edges, near_edges, BUCKETS, FACTOR)  # fmt: skip
            if position is not None:
                x += position_bias(i_inside, j_inside, position, max_positions) * FACTOR
            if dense is not None:
                base = dense + b.to(tl.int64) * dense_batch + h.to(tl.int64) * dense_head
                x += dense_bias(base, rows[:, None], j, dense_row, (rows < q_len)[:, None] & (j < kv_len)) * FACTOR
            p = silu(x, FAST)
            if CUT:
                seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, num_contexts is not None,
                               num_targets is not None)  # fmt: skip
                p = tl.where(seen & (j < kv_len), p, 0.0)
            if HAS_DROPOUT:
                p *= kept(seed, b * heads + h, i, j, dropout)
            v_tile = load_rows(v, v_descriptor, kv_start, n * KEYS, kv_len, v_row, h * v_head, V_DIM, V_WIDTH, KEYS,
                               CUT, True)  # fmt: skip
            acc = product(p.to(v_tile.dtype), v_tile, acc, PRECISION)
    factor = scale
    if scales is not None:
        factor = tl.load(scales + b).to(tl.float32)
    d = tl.arange(0, V_WIDTH)
    r = tl.arange(0, ROWS)
    address = out + ((q_start + row0) * out_row + h * out_head) + r[:, None] * out_row + d[None, :]
    tl.store(address, (acc * factor).to(out.dtype.element_ty), (rows < row_end)[:, None] & (d < V_DIM)[None, :])
