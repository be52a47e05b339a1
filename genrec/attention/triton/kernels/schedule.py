"""The order of work: sequences by length, longest first, so that a ragged batch ends evenly on all processors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_kernel(
    offsets, items, count, batch,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, LAST_FIRST: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """items: (n, 2) int32, the sequence and block of each piece of work; count: (1,) int32, how many there are.

    n is at least T // BLOCK + B. Under a causal mask the last block of rows (the first of keys) has the most to do:
    within a sequence LAST_FIRST puts the last block first. TOGETHER sequences of as many blocks share a stretch of the
    list, block by block, so that the last pieces of all are small ones; one after the other, half of the processors
    would idle while the last sequence's first blocks are computed.
    """
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = mine < batch
    length = tl.load(offsets + mine + 1, inside, 0) - tl.load(offsets + mine, inside, 0)
    blocks = tl.cdiv(length, BLOCK).to(tl.int32)
    before = tl.zeros([CHUNK], tl.int32)  # blocks of longer sequences
    rank = tl.zeros([CHUNK], tl.int32)  # among those of as many blocks, by length
    equals = tl.zeros([CHUNK], tl.int32)
    for chunk in range(0, batch, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        present = other < batch
        other_length = tl.load(offsets + other + 1, present, 0) - tl.load(offsets + other, present, 0)
        other_blocks = tl.cdiv(other_length, BLOCK).to(tl.int32)[None, :]
        before += tl.sum(tl.where(other_blocks > blocks[:, None], other_blocks, 0), 1)
        equal = (other_blocks == blocks[:, None]) & present[None, :]
        earlier = (other_length[None, :] > length[:, None]) | (
            (other_length[None, :] == length[:, None]) & (other[None, :] < mine[:, None])
        )
        rank += tl.sum((equal & earlier).to(tl.int32), 1)
        equals += tl.sum(equal.to(tl.int32), 1)
    place = rank % TOGETHER
    stride = tl.minimum(equals - (rank - place), TOGETHER)
    before += (rank - place) * blocks + place
    for n in range(0, tl.max(blocks, 0)):
        here = inside & (n < blocks)
        block = n + tl.zeros([CHUNK], tl.int32)
        if LAST_FIRST:
            block = blocks - 1 - n
        item = items + (before + n * stride) * 2
        tl.store(item, mine, here)
        tl.store(item + 1, block, here)
    tl.atomic_add(count, tl.sum(tl.where(inside, blocks, 0), 0), sem="relaxed")


@triton.jit
def locate(work, items, heads):
    """(sequence, head, block) of a piece of work; heads are neighbours, so that equal pieces run at the same time."""
    item = work // heads
    return tl.load(items + item * 2), work % heads, tl.load(items + item * 2 + 1)


@triton.jit
def rows_of(block, length, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """First row and end of a block. With HALVES, where the last block would be half empty or more, the first one has
    the half: its rows see few keys, so that empty ones beside them cost little."""
    row0 = block * ROWS
    end = row0 + ROWS
    if HALVES:
        spare = tl.where((length - 1) % ROWS < ROWS // 2, ROWS // 2, 0)
        row0 = tl.maximum(row0 - spare, 0)
        end -= spare
    return row0, tl.minimum(end, length)
