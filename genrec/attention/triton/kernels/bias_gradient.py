"""Gradients of the relative bias's two tables, from the gradient of a tile's scores.

Adding is by atomics, or, DETERMINISTIC, by loads and stores of a program that alone writes to its copy of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genrec.attention.triton.kernels.bias import bucket, far_distances, load_times, near_distances

SUMMED = tl.constexpr(8)
"""Buckets that a tile sums before it adds; what lies in others, the near distances, it adds one by one."""


@triton.jit
def add_to(address, value, mask, DETERMINISTIC: tl.constexpr):
    """Adds to memory."""
    if DETERMINISTIC:
        tl.store(address, tl.load(address, mask, 0.0) + value, mask)
    else:
        tl.atomic_add(address, value, mask, sem="relaxed")


@triton.jit
def add_scalar_to(address, value, DETERMINISTIC: tl.constexpr):
    """`add_to` of one number."""
    if DETERMINISTIC:
        tl.store(address, tl.load(address) + value)
    else:
        tl.atomic_add(address, value, sem="relaxed")


@triton.jit
def total(tile):
    """The sum of a tile."""
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def add_time_gradient(
    gradient, i, j, key_times, row_times, kv_len, base, first, last, near, into, edges, near_edges,
    BUCKETS: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Adds a tile's gradient of the scores to the time table's; arguments as in `time_bias`.

    Far buckets hold most entries of a tile: they are summed, each with one addition to memory.
    """
    if first == last:
        add_scalar_to(into + first, total(gradient), DETERMINISTIC)
    else:
        rows, keys = load_times(i, j, key_times, row_times, kv_len)
        if near:
            distance = near_distances(rows, keys, base)
            summed = first
            if not DETERMINISTIC:
                summed = tl.maximum(first, last - SUMMED + 1)
            for b in range(summed, last + 1):
                inside = (distance >= tl.load(near_edges + b)) & (distance < tl.load(near_edges + b + 1))
                add_scalar_to(into + b, total(tl.where(inside, gradient, 0.0)), DETERMINISTIC)
            if not DETERMINISTIC:  # noqa: SIM102 - known when it is compiled, the other isn't
                if summed > first:
                    place = bucket(distance, near_edges, BUCKETS)
                    # Threads may hold copies of an entry (small blocks do): `atomic_add` knows which of them adds.
                    tl.atomic_add(into + place, gradient, (place < summed) & (gradient != 0.0), sem="relaxed")
        else:
            for b in range(first, last + 1):
                distance = far_distances(rows, keys)
                inside = (distance >= tl.load(edges + b)) & (distance < tl.load(edges + b + 1))
                add_scalar_to(into + b, total(tl.where(inside, gradient, 0.0)), DETERMINISTIC)


@triton.jit
def add_position_gradient(
    gradient, offset, into, entries, OF_KEYS: tl.constexpr, DETERMINISTIC: tl.constexpr
):  # fmt: skip
    """Adds the sums along the diagonals of a tile; its first entry belongs to table entry `offset`.

    The tile is (keys, rows) where OF_KEYS, else (rows, keys), with at least as many of the first. Column e is turned
    up by e, so that a line holds one diagonal (and, from where it wraps, the one a whole tile away).
    """
    LINES: tl.constexpr = gradient.shape[0]
    x = tl.arange(0, LINES)
    turned = x[:, None] + tl.arange(0, gradient.shape[1])[None, :]
    sheared = tl.gather(gradient, turned & (LINES - 1), 0)
    direct = tl.sum(tl.where(turned < LINES, sheared, 0.0), 1)
    wrapped = tl.sum(tl.where(turned < LINES, 0.0, sheared), 1)
    if OF_KEYS:
        place = offset + x
        further = place - LINES
    else:
        place = offset - x
        further = place + LINES
    if DETERMINISTIC:
        tl.debug_barrier()
    add_to(into + place, direct, (place >= 0) & (place < entries), DETERMINISTIC)
    if DETERMINISTIC:
        tl.debug_barrier()
    add_to(into + further, wrapped, (further >= 0) & (further < entries), DETERMINISTIC)
    if DETERMINISTIC:
        tl.debug_barrier()
