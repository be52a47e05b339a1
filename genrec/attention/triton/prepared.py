"""What the kernels need to know of a batch beforehand: the order of work, the span of times of each block.

It depends on offsets and timestamps only, the same in all layers of a model: the last batches are kept, so that one
forward and backward pass computes them once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from genrec.attention.triton.kernels.bias import extrema_kernel
from genrec.attention.triton.kernels.schedule import plan_kernel
from genrec.attention.triton.kernels.spans import span_kernel

_KEPT = 4
_CHUNK = 32
TOGETHER = 2, 1
"""Sequences that share a stretch of the list of rows, and of keys: see `plan_kernel`. More would take room in the L2
cache from each other."""


@dataclass(frozen=True)
class Places:
    """Of tiles of all sequences: see `kernels.stored`."""

    rows: int
    keys: int
    """Of a tile."""
    per_row: int
    wide: bool
    tiles: int


class Prepared:
    """Plans of one batch, made when they are asked for.

    Args:
        offsets: (B + 1,) of the queries and of the keys.
        times: Timestamps (T_kv,), query timestamps (T_q,) or None.
        totals: T_q, T_kv.
    """

    def __init__(
        self, offsets: tuple[Tensor, Tensor], times: tuple[Tensor | None, Tensor | None], totals: tuple[int, int]
    ) -> None:
        self.offsets, self.times, self.totals = offsets, times, totals
        self.batch = offsets[0].numel() - 1
        self._items: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        self._extrema: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        self._spans: dict[tuple[Places, int], Tensor] = {}

    def bound(self, of_keys: bool, block: int) -> int:
        """No less than the blocks of all sequences; known without a look at the device."""
        return self.totals[of_keys] // block + self.batch

    def items(self, of_keys: bool, block: int) -> tuple[Tensor, Tensor]:
        """(bound, 2) int32 sequences and blocks in the order of work, and (1,) int32 how many there are."""
        if (of_keys, block) not in self._items:
            offsets = self.offsets[of_keys]
            items = torch.empty(self.bound(of_keys, block), 2, dtype=torch.int32, device=offsets.device)
            count = torch.zeros(1, dtype=torch.int32, device=offsets.device)
            grid = (triton.cdiv(self.batch, _CHUNK),)
            plan_kernel[grid](
                offsets, items, count, self.batch,
                BLOCK=block, CHUNK=_CHUNK, LAST_FIRST=not of_keys, TOGETHER=TOGETHER[of_keys],
            )  # fmt: skip
            self._items[of_keys, block] = items, count
        return self._items[of_keys, block]

    def extrema(self, of_keys: bool, block: int, longest: int) -> tuple[Tensor, Tensor]:
        """Least and largest time of each block, int64; see `extrema_kernel`."""
        if (of_keys, block) not in self._extrema:
            device = self.offsets[0].device
            low = torch.empty(self.bound(of_keys, block) + 1, dtype=torch.int64, device=device)
            high = torch.empty_like(low)
            grid = (self.batch, min(64, triton.cdiv(longest, block)))
            extrema_kernel[grid](*self.times, *self.offsets, low, high, KEYS=of_keys, BLOCK=block)
            self._extrema[of_keys, block] = low, high
        return self._extrema[of_keys, block]

    def spans(self, places: Places, buckets: int, longest: tuple[int, int]) -> Tensor:
        """(tiles,) int32, the buckets of each tile: see `span_kernel`."""
        if (places, buckets) not in self._spans:
            spans = torch.empty(places.tiles, dtype=torch.int32, device=self.offsets[0].device)
            items, count = self.items(False, places.rows)
            extrema = *self.extrema(False, places.rows, longest[0]), *self.extrema(True, places.keys, longest[1])
            span_kernel[(self.bound(False, places.rows),)](
                spans, *self.offsets, items, count, *extrema, places.per_row, places.tiles,
                BUCKETS=buckets, WIDE=places.wide, ROWS=places.rows, KEYS=places.keys, CHUNK=128,
            )  # fmt: skip
            self._spans[places, buckets] = spans
        return self._spans[places, buckets]


_lock = threading.Lock()
_kept: OrderedDict[tuple[int, ...], tuple[tuple[int, ...], Prepared]] = OrderedDict()


def prepared_for(
    offsets: tuple[Tensor, Tensor],
    times: tuple[Tensor | None, Tensor | None],
    totals: tuple[int, int],
    reuse: bool,
) -> Prepared:
    """Plans of such a batch: a former one's where all tensors are the very same and unchanged."""
    tensors = [x for x in (*offsets, *times) if x is not None]
    cuda = offsets[0].is_cuda
    if not reuse or any(x.is_inference() for x in tensors) or (cuda and torch.cuda.is_current_stream_capturing()):
        return Prepared(offsets, times, totals)
    stream = torch.cuda.current_stream(offsets[0].device).cuda_stream if cuda else 0
    # The kept batch holds its tensors, so that an id can't be another's.
    key = (stream, *totals, *(0 if x is None else id(x) for x in (*offsets, *times)))
    versions = tuple(x._version for x in tensors)
    with _lock:
        found = _kept.get(key)
        if found is None or found[0] != versions:
            found = _kept[key] = versions, Prepared(offsets, times, totals)
        _kept.move_to_end(key)
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
        return found[1]
