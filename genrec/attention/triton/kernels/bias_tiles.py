"""The relative bias of all visited tiles of a batch, once for all heads and kept in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import FEW, add_time_bias
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, query_blocks, visible
from genrec.attention.triton.kernels.memory import gather, gather_at, near_times
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.spans import read_span
from genrec.attention.triton.kernels.stored import (
    LARGEST,
    fragment_diagonals,
    fragment_entries,
    hidden_bias,
    tile_number,
)
from genrec.attention.triton.kernels.tiles import EMULATED, regions, sequence


@triton.jit
def finite_half(x):
    """fp16, no farther than LARGEST; NaN stays NaN."""
    if EMULATED:
        x = tl.where(x > LARGEST, LARGEST, x)
        return tl.where(x < -LARGEST, -LARGEST, x).to(tl.float16)
    else:
        return tl.inline_asm_elementwise("cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16,
                                         is_pure=True, pack=2)  # fmt: skip


@triton.jit
def simple_tile(
    tile, i0, j0, key_times, row_times, base, first, last, position, first_place, time_table, near_edges,
    FACTOR: tl.constexpr, OF_KEYS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of one bucket, or of a few where all of it is inside a sequence and no key later than any row.

    Its rows begin at i0, keys at j0, diagonals at entry `first_place` of the position table; base is a time of the
    tile. It is computed in one piece: what elements have in common, diagonals and times, is loaded once.
    """
    COLUMNS: tl.constexpr = ROWS if OF_KEYS else KEYS
    e = tl.arange(0, ROWS * KEYS)
    if time_table is None:
        store_lines(tile, e, diagonals(position, first_place, e, FACTOR, OF_KEYS, COLUMNS))
    elif first == last:
        bias = diagonals(position, first_place, e, FACTOR, OF_KEYS, COLUMNS) + tl.load(time_table + first) * FACTOR
        store_lines(tile, e, bias)
    elif first + 1 == last:
        bias = few_edges(e, i0, j0, key_times, row_times, base, first, last, position, first_place, time_table,
                         near_edges, FACTOR, OF_KEYS, COLUMNS, 1)  # fmt: skip
        store_lines(tile, e, bias)
    else:
        bias = few_edges(e, i0, j0, key_times, row_times, base, first, last, position, first_place, time_table,
                         near_edges, FACTOR, OF_KEYS, COLUMNS, FEW)  # fmt: skip
        store_lines(tile, e, bias)


@triton.jit
def few_edges(
    e, i0, j0, key_times, row_times, base, first, last, position, first_place, time_table, near_edges,
    FACTOR: tl.constexpr, OF_KEYS: tl.constexpr, COLUMNS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The numbers e of a tile of two buckets or more, up to so many EDGES between them.

    No loop: a value that goes around in one gets another layout, and goes through shared memory to its place.
    """
    x, y = fragment_entries(e, COLUMNS)
    near_rows = near_times(row_times + i0, y if OF_KEYS else x, base)
    near_keys = near_times(key_times + j0, x if OF_KEYS else y, base)
    weight = tl.load(time_table + first) * FACTOR
    bias = diagonals(position, first_place, e, FACTOR, OF_KEYS, COLUMNS) + weight
    for n in tl.static_range(EDGES):
        bucket = tl.minimum(first + 1 + n, last)  # the last one again adds nothing
        next_weight = tl.load(time_table + bucket) * FACTOR
        reached = near_rows - tl.load(near_edges + bucket)
        bias = add_from(bias, reached, near_keys, next_weight - weight)
        weight = next_weight
    return bias


@triton.jit
def add_from(x, a, b, more):
    """x + more where a >= b, else x. A comparison and an addition: of many conditions the compiler makes words of bits,
    three times as many instructions."""
    if EMULATED:
        return tl.where(a >= b, x + more, x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.s32 p, $2, $3; mov.f32 $0, $1; @p add.f32 $0, $1, $4; }", "=&f,f,r,r,f",
            [x, a, b, more], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip


@triton.jit
def diagonals(position, first_place, e, FACTOR: tl.constexpr, OF_KEYS: tl.constexpr, COLUMNS: tl.constexpr):
    """The position's share of the numbers e of a tile."""
    if position is None:
        return tl.zeros(e.shape, tl.float32)
    else:
        apart = fragment_diagonals(e, COLUMNS)
        return gather_at(position + first_place, -apart if OF_KEYS else apart) * FACTOR


@triton.jit
def tile_by_lines(
    tile, i0, j0, key_times, row_times, kv_len, base, first, last, near, position, max_positions, time_table, edges,
    near_edges, whole, contexts, history_end, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, OF_KEYS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, LINES: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_CONTEXTS: tl.constexpr, HAS_TARGETS: tl.constexpr,
):  # fmt: skip
    """Any tile, so many LINES at a time; where it isn't seen as a `whole`, `hidden_bias` for what is hidden."""
    COLUMNS: tl.constexpr = ROWS if OF_KEYS else KEYS
    e = tl.arange(0, LINES * COLUMNS)
    x, y = fragment_entries(e, COLUMNS)
    for line in range(0, KEYS if OF_KEYS else ROWS, LINES):
        i = i0 + (y if OF_KEYS else line + x)
        j = j0 + (line + x if OF_KEYS else y)
        bias = tl.zeros([LINES * COLUMNS], tl.float32)
        if position is not None:  # beyond a sequence it doesn't matter which entry is taken
            place = tl.minimum(tl.maximum(j - i + (max_positions - 1), 0), 2 * max_positions - 2)
            bias = gather(position, place) * FACTOR
        if time_table is not None:
            bias = add_time_bias(bias, tl.minimum(i, kv_len - 1), tl.minimum(j, kv_len - 1), key_times, row_times,
                                 kv_len, base, first, last, near, time_table, edges, near_edges, BUCKETS, FACTOR,
                                 ALONE=True)  # fmt: skip
        if whole:
            store_lines(tile + line * COLUMNS, e, bias)
        else:
            seen = visible(i, j, contexts, history_end, GROUP, WINDOW, CAUSAL, HAS_CONTEXTS, HAS_TARGETS)
            tl.store(tile + line * COLUMNS + e, tl.where(seen, stored_bias(bias, tile), hidden_bias(tile)))


@triton.jit
def stored_bias(bias, tile):
    """As it is stored in `tile`."""
    return finite_half(bias) if tile.dtype.element_ty == tl.float16 else bias


@triton.jit
def store_lines(tile, e, bias):
    """Neighbouring lanes have neighbouring numbers e of the tile: stored as they come, 16 bytes at once."""
    tl.store(tile + e, stored_bias(bias, tile))


@triton.jit(do_not_specialize=["parts", "bias_per_row", "tiles", "max_positions"])
def bias_kernel(
    bias_tiles, q_offsets, kv_offsets, items, count, num_contexts, num_targets,
    position, time_table, edges, near_edges, kv_times, q_times, spans, parts, bias_per_row, tiles, max_positions,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BUCKETS: tl.constexpr, FAST: tl.constexpr,
    OF_KEYS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Tiles as the kernel that loads them has them: (KEYS, ROWS) where OF_KEYS, a program for a block of keys and every
    so many of the row blocks that it visits; else (ROWS, KEYS), for a block of rows. With FAST half the bias, as `silu`
    wants it. Tiles of rows have `hidden_bias` where a row doesn't see a key.

    Of tiles that are not simple so many LINES are computed at a time. A tile beyond `tiles`, where only wrong lengths
    lead, is written to the last one's place.
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
    key_times, row_times = None, None
    if time_table is not None:
        key_times = kv_times + kv_start
        # t' of row i is the time of key i + 1, of which the last row has none.
        row_times = key_times + 1 if q_times is None else q_times + (q_start - shift)
    if OF_KEYS:
        first, low, full_low, full_high, high, target_low, target_high = query_blocks(
            block * KEYS, tl.minimum(block * KEYS + KEYS, kv_len), contexts, history_end, kv_len, q_len, ROWS, KEYS,
            GROUP, WINDOW, CAUSAL, num_targets is not None)  # fmt: skip
    else:
        first, low, full_low, full_high, high, target_low, target_high = key_blocks(
            block * ROWS + shift, tl.minimum(block * ROWS + ROWS, q_len) + shift, contexts, history_end, KEYS, GROUP,
            WINDOW, CAUSAL, num_targets is not None)  # fmt: skip
    visits = cut_count(first, low, low, low, high, target_low, target_high)
    for index in range(part, visits, parts):
        other = cut_block(index, first, low, low, low, high, target_low)
        if OF_KEYS:
            m, n = other, block
        else:
            m, n = block, other
        number = tl.minimum(tile_number(q_start, b, m, n, bias_per_row, WIDE, ROWS, KEYS), tiles - 1)
        tile = bias_tiles + number * (ROWS * KEYS)
        i0, j0 = m * ROWS + shift, n * KEYS
        entries = 2 * max_positions - 1
        first_place = j0 - i0 + (max_positions - 1)
        whole = True
        if not OF_KEYS:
            whole = (n >= full_low) & (n < full_high)
        simple = (position is None) | (first_place >= ROWS - 1) & (first_place + KEYS <= entries)
        base, span_first, span_last, near = 0, 0, 0, True
        if time_table is not None:
            span_first, span_last, near, ahead = read_span(tl.load(spans + number))
            inside = (i0 + ROWS < kv_len + (q_times is not None)) & (j0 + KEYS <= kv_len)
            few = ahead & (span_last - span_first <= FEW) & inside
            simple = simple & ((span_first == span_last) | few)
            base = tl.load(key_times + j0)
        if simple & whole:
            simple_tile(tile, i0, j0, key_times, row_times, base, span_first, span_last, position, first_place,
                        time_table, near_edges, FACTOR, OF_KEYS, ROWS, KEYS)  # fmt: skip
        else:
            tile_by_lines(tile, i0, j0, key_times, None if q_times is None else row_times, kv_len, base, span_first,
                          span_last, near, position, max_positions, time_table, edges, near_edges, whole, contexts,
                          history_end, BUCKETS, FACTOR, OF_KEYS, ROWS, KEYS, LINES, GROUP, WINDOW, CAUSAL,
                          num_contexts is not None, num_targets is not None)  # fmt: skip
