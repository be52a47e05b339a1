"""Which buckets the distances of a tile may have: found once for a batch, for the kernel that stores a relative bias.

That kernel does little else, and 160 instructions of 64-bit arithmetic and logarithms were a fifth of all it did.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import bucket_span, first_entry
from genrec.attention.triton.kernels.schedule import locate
from genrec.attention.triton.kernels.stored import tile_number
from genrec.attention.triton.kernels.tiles import sequence

NEAR = tl.constexpr(1 << 16)
"""Of a span: distances fit into 32 bits."""
AHEAD = tl.constexpr(1 << 17)
"""Besides no key of the tile is later than any of its rows."""


@triton.jit(do_not_specialize=["per_row", "tiles"])
def span_kernel(
    spans, q_offsets, kv_offsets, items, count, row_low, row_high, key_low, key_high, per_row, tiles,
    BUCKETS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """first + 256 * last + NEAR + AHEAD of each tile, by its number; a program for a block of rows.

    No distance of 64 bits is in a bucket beyond 146.
    """
    if tl.program_id(0) >= tl.load(count):
        return
    b, _, m = locate(tl.program_id(0), items, 1)
    q_start, _ = sequence(q_offsets, b)
    kv_start, kv_len = sequence(kv_offsets, b)
    entry = first_entry(q_start, b, ROWS) + m
    earliest, latest = tl.load(row_low + entry), tl.load(row_high + entry)
    keys_entry = first_entry(kv_start, b, KEYS)
    blocks = tl.cdiv(kv_len, KEYS)
    if not WIDE:
        LARGER: tl.constexpr = ROWS if ROWS > KEYS else KEYS
        blocks = tl.minimum(blocks, (m // (LARGER // ROWS) + 1) * (LARGER // KEYS))
    number = tile_number(q_start, b, m, 0, per_row, WIDE, ROWS, KEYS)
    for start in range(0, blocks, CHUNK):
        n = start + tl.arange(0, CHUNK)
        there = n < blocks
        low = tl.load(key_low + keys_entry + n, there, 0)
        high = tl.load(key_high + keys_entry + n, there, 0)
        first, last, near = bucket_span(earliest, latest, low, high, BUCKETS)
        span = first + last * 256 + tl.where(near, NEAR, 0) + tl.where(near & (earliest >= high), AHEAD, 0)
        tl.store(spans + number + n, span, there & (number + n < tiles))


@triton.jit
def read_span(span):
    """(first, last, near, ahead) of what `span_kernel` stored."""
    return span & 255, (span >> 8) & 255, (span & NEAR) != 0, (span & AHEAD) != 0
