"""The bias of a tile: dense from memory, or the relative one from the tile's own positions and times.

Time buckets are exact for every int64 distance: they are decided by the integer edges of `time_bucket_edges`. Most
tiles lie far from the diagonal, where all their distances fall into one to three buckets; these cost a comparison or
two an element. The others look the bucket up: a logarithm names the bucket or the one before it, an edge decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.memory import gather
from genrec.attention.triton.kernels.tiles import EMULATED

BUCKETS_PER_OCTAVE = tl.constexpr(2.3028145533551)
"""ln 2 / 0.301"""
DOUBT = tl.constexpr(1e-3)
"""In buckets; ten times the error of a logarithm in fp32."""
NEAR = tl.constexpr(1 << 30)
"""Distances below fit into 32 bits."""
FAR = tl.constexpr((1 << 63) - 2)
"""The largest distance that `time_bucket` knows."""
FEW = tl.constexpr(3)
"""Edges that a tile compares with one by one, rather than look its buckets up."""


@triton.jit
def load_times(i, j, key_times, row_times, kv_len):
    """t' of the rows i and t of the keys j, both counted in the key sequence and inside of it."""
    if row_times is None:
        asked = tl.load(key_times + tl.minimum(i + 1, kv_len - 1))
    else:
        asked = tl.load(row_times + i)
    return asked, tl.load(key_times + j)


@triton.jit
def extrema_kernel(kv_times, q_times, q_offsets, kv_offsets, low, high, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Least and largest time of each block of keys (or t' of each block of rows) of each sequence.

    Block n of sequence b is entry `first_entry` + n.
    """
    b = tl.program_id(0)
    q_start = tl.load(q_offsets + b).to(tl.int64)
    kv_start = tl.load(kv_offsets + b).to(tl.int64)
    q_len = (tl.load(q_offsets + b + 1) - q_start).to(tl.int32)
    kv_len = (tl.load(kv_offsets + b + 1) - kv_start).to(tl.int32)
    if KEYS:
        entry = first_entry(kv_start, b, BLOCK)
        length = kv_len
    else:
        entry = first_entry(q_start, b, BLOCK)
        length = q_len
    for block in range(tl.program_id(1), tl.cdiv(length, BLOCK), tl.num_programs(1)):
        place = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), length - 1)
        if KEYS:
            times = tl.load(kv_times + kv_start + place)
        elif q_times is None:
            times = tl.load(kv_times + kv_start + tl.minimum(place + kv_len - q_len + 1, kv_len - 1))
        else:
            times = tl.load(q_times + q_start + place)
        tl.store(low + entry + block, tl.min(times, 0))
        tl.store(high + entry + block, tl.max(times, 0))


@triton.jit
def first_entry(start, b, BLOCK: tl.constexpr):
    """Where a sequence's blocks begin in a list that holds the blocks of all, each sequence's rounded up."""
    return start // BLOCK + b


@triton.jit
def bucket_span(row_low, row_high, key_low, key_high, BUCKETS: tl.constexpr):
    """(first, last, near): all buckets of a tile lie in [first, last]; near: its distances fit into 32 bits."""
    least = row_low - key_high
    most = row_high - key_low
    apart = tl.maximum(tl.maximum(least, -most), 1)
    widest = tl.maximum(tl.maximum(most, -least), 1)
    first = tl.log2(apart.to(tl.float32)) * BUCKETS_PER_OCTAVE - DOUBT
    last = tl.log2(widest.to(tl.float32)) * BUCKETS_PER_OCTAVE + DOUBT
    first = tl.minimum(tl.maximum(first, 0.0), BUCKETS - 1).to(tl.int32)
    last = tl.minimum(last, BUCKETS - 1).to(tl.int32)
    # Halves don't overflow: where the whole may have, nothing is known of the buckets.
    overflow = (row_high // 2 - key_low // 2 > FAR // 2 - 2) | (row_low // 2 - key_high // 2 < 2 - FAR // 2)
    first = tl.where(overflow, 0, first)
    last = tl.where(overflow, BUCKETS - 1, last)
    return first, last, (widest < NEAR) & (overflow == 0)


@triton.jit
def near_distances(rows, keys, base):
    """|rows - keys| in 32 bits, for tiles whose distances stay below NEAR; base is a time of the tile."""
    return tl.abs((rows - base).to(tl.int32) - (keys - base).to(tl.int32))


@triton.jit
def reaches(rows, keys, edge):
    """|rows - keys| >= edge, in 32 bits and for an edge above zero: one comparison without a sign, of what lies beyond
    -edge with all that lies between the two."""
    return (rows + (edge - 1) - keys).to(tl.uint32, bitcast=True) > ((edge - 1) * 2).to(tl.uint32, bitcast=True)


@triton.jit
def far_distances(rows, keys):
    """|rows - keys|, int64, as `time_bucket` clamps them."""
    apart = tl.maximum(rows - keys, -FAR)
    return tl.minimum(tl.where(apart < 0, -apart, apart), FAR)


@triton.jit
def log2(x):
    """Logarithm of fp32 numbers from 0 on, good to 1e-5; the hardware's own where there is one."""
    if EMULATED:
        return tl.log2(tl.maximum(x, 1.0))
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)  # fmt: skip


@triton.jit
def bucket(distance, near_edges, BUCKETS: tl.constexpr):
    """Bucket of near distances; edges[b] is the first distance of bucket b, and the largest number behind the last."""
    guess = tl.maximum((log2(distance.to(tl.float32)) * BUCKETS_PER_OCTAVE - DOUBT).to(tl.int32), 0)
    if BUCKETS < 75:  # 2^31 lies in bucket 71
        guess = tl.minimum(guess, BUCKETS - 1)
    return guess + (distance >= gather(near_edges, guess + 1)).to(tl.int32)


@triton.jit
def add_time_bias(
    x, i, j, key_times, row_times, kv_len, base, first, last, near, table, edges, near_edges,
    BUCKETS: tl.constexpr, FACTOR: tl.constexpr, ALONE: tl.constexpr = False,
):  # fmt: skip
    """x + FACTOR * time_weight[bucket(t'_i - t_j)] of a tile.

    Loops over buckets keep the code short; the tiles that look their buckets up are the few near the diagonal. ALONE is
    for a kernel that does nothing else, where instructions count; beside products of matrices registers do.
    """
    if near & (last - first > FEW):
        rows, keys = load_times(i, j, key_times, row_times, kv_len)
        x += gather(table, bucket(near_distances(rows, keys, base), near_edges, BUCKETS)) * FACTOR
    else:
        weight = tl.load(table + first) * FACTOR
        x += weight
        if first < last:
            rows, keys = load_times(i, j, key_times, row_times, kv_len)
            if near:
                if ALONE:
                    near_rows, near_keys = (rows - base).to(tl.int32), (keys - base).to(tl.int32)
                else:
                    distance = near_distances(rows, keys, base)
                for b in range(first + 1, last + 1):
                    next_weight = tl.load(table + b) * FACTOR
                    edge = tl.load(near_edges + b)
                    if ALONE:
                        far = reaches(near_rows, near_keys, edge)
                    else:
                        far = distance >= edge
                    x = tl.where(far, x + (next_weight - weight), x)
                    weight = next_weight
            else:
                for b in range(first + 1, last + 1):
                    next_weight = tl.load(table + b) * FACTOR
                    far = far_distances(rows, keys) >= tl.load(edges + b)
                    x = tl.where(far, x + (next_weight - weight), x)
                    weight = next_weight
    return x


@triton.jit
def position_bias(i, j, table, max_positions):
    """position_weight[j - i + M - 1] of rows i and keys j inside the sequence."""
    return gather(table, j - i + (max_positions - 1))


@triton.jit
def dense_bias(base, row, j, row_stride, seen):
    """The dense bias of rows (counted from the first query) and keys j, where `seen`."""
    return tl.load(base + row.to(tl.int64) * row_stride + j, seen, 0.0).to(tl.float32)
