"""How the torch backend cuts a jagged batch: groups of like sequences, and tiles of rows within a group.

Sequences of a group are padded to its longest and aligned at their ends, so that the distance of a query and a key
is the same function of row and column for all of them, whatever their lengths, and with cached keys too. A tile is
some rows of a group against the columns that they can see. No block of memory is larger than a tile.

A plan depends on offsets, mask and times only, all of them the same in every layer: the last plan is kept, with its
time buckets, and the layers of one forward and backward pass share it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from genrec.attention.spec import BUCKET_WIDTH, AttentionMask, RelativeBias, time_bucket_edges

TILE_ELEMENTS = 2**19
"""Scores of a tile, all heads: large enough to pay for its calls, and its few copies stay near the caches."""
TILE_ROWS = 64
"""Fewest rows of a tile: shorter ones save no more work under a causal mask than they cost in calls."""
WASTE_ELEMENTS = 2**16
"""Padding that a group may hold: about what one more group costs."""
CACHED_ELEMENTS = 2**24
"""Terms (one for each query and key) that a plan keeps; beyond, tiles compute them whenever they need them."""


@dataclass(eq=False)
class Tile:
    """Rows [row0, row1) of a group against its columns [col0, col1)."""

    row0: int
    row1: int
    col0: int
    col1: int
    index: Tensor | None = None
    """(b, rows, cols) int32 time buckets, `num_buckets` where hidden; kept by the plan."""
    hidden: Tensor | None = None
    """(b, rows, cols) bool; kept by the plan where there are no time buckets."""


@dataclass(eq=False)
class Group:
    """b sequences, padded to q_len rows and kv_len columns, aligned at their ends."""

    sequences: list[int]
    members: Tensor
    """(b,) int64, the same on the device."""
    q_len: int
    kv_len: int
    q_rows: Tensor
    """(b * H * q_len,) rows of the (T * H, D) queries; padding points at a sequence's first row."""
    kv_rows: Tensor
    q_kept: Tensor | None
    """Positions in q_rows that are no padding; None for all."""
    kv_kept: Tensor | None
    tiles: list[Tile]


class Plan:
    """Groups and tiles of one batch."""

    def __init__(
        self,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        mask: AttentionMask | Tensor,
        times: tuple[Tensor, Tensor] | None,
        num_buckets: int,
        heads: int,
    ) -> None:
        self.q_starts, self.kv_starts = q_offsets.tolist(), kv_offsets.tolist()
        self.mask, self.times, self.num_buckets, self.heads = mask, times, num_buckets, heads
        self.device = q_offsets.device
        self.q_lens, self.kv_lens = _differences(self.q_starts), _differences(self.kv_starts)
        for q_len, kv_len in zip(self.q_lens, self.kv_lens, strict=True):
            if kv_len < q_len:
                raise ValueError(f"A sequence has {q_len} queries and {kv_len} keys: keys may not be fewer.")
        structured = mask if isinstance(mask, AttentionMask) else AttentionMask()
        self.contexts = None if structured.num_contexts is None else structured.num_contexts.tolist()
        self.targets = None if structured.num_targets is None else structured.num_targets.tolist()
        self.groups = [self._group(sequences) for sequences in self._partition()]
        terms = sum(
            len(group.sequences) * (tile.row1 - tile.row0) * (tile.col1 - tile.col0)
            for group in self.groups
            for tile in group.tiles
        )
        self.elements = terms * heads
        """Scores of the whole batch."""
        self.cached = terms <= CACHED_ELEMENTS

    def index(self, group: Group, tile: Tile) -> Tensor:
        """(b, rows, cols) int32 time bucket of each score; `num_buckets` where the mask hides it."""
        assert self.times is not None
        if tile.index is not None:
            return tile.index
        happened, asked = self.times
        q, kv = self._tokens(group, tile)
        distance = asked[q][:, :, None] - happened[kv][:, None, :]
        index = exact_bucket(distance, self.num_buckets)
        if self._hides_alike():
            index = index.masked_fill_(self.hidden(group, tile), self.num_buckets)
        if self.cached:
            tile.index = index
        return index

    def hidden(self, group: Group, tile: Tile) -> Tensor:
        """(b, rows, cols) bool, True where the mask hides the key; (b, H, rows, cols) for a dense mask of all heads."""
        if tile.hidden is not None:
            return tile.hidden
        if isinstance(self.mask, Tensor):
            heads = self.mask.shape[1]
            hidden = torch.ones(len(group.sequences), heads, tile.row1 - tile.row0, tile.col1 - tile.col0,
                                dtype=torch.bool, device=self.device)  # fmt: skip
            for local, sequence, inside, outside in self.windows(group, tile):
                hidden[(local, slice(None), *inside)] = ~self.mask[(sequence, slice(None), *outside)]
            hidden = hidden if heads > 1 else hidden[:, 0]
        else:
            hidden = ~self._visible(group, tile, self.mask)
        if self.cached and self.times is None:
            tile.hidden = hidden
        return hidden

    def _hides_alike(self) -> bool:
        return not (isinstance(self.mask, Tensor) and self.mask.shape[1] > 1)

    def hidden_by_head(self) -> bool:
        """Whether the mask differs between heads, so that it can't live in the time buckets."""
        return not self._hides_alike()

    def windows(self, group: Group, tile: Tile) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
        """For each sequence of a tile: its number in the group, in the batch, and its rows and columns that are no
        padding, first in the tile, then in the sequence's own (left-aligned) counting."""
        for local, sequence in enumerate(group.sequences):
            q_pad, kv_pad = group.q_len - self.q_lens[sequence], group.kv_len - self.kv_lens[sequence]
            row, col = max(tile.row0, q_pad), max(tile.col0, kv_pad)
            inside = slice(row - tile.row0, None), slice(col - tile.col0, None)
            outside = slice(row - q_pad, max(tile.row1, row) - q_pad), slice(col - kv_pad, max(tile.col1, col) - kv_pad)
            yield local, sequence, inside, outside

    def _partition(self) -> list[list[int]]:
        """Sequences of like lengths together, longest first, with little padding."""
        order = sorted(
            (b for b, n in enumerate(self.q_lens) if n), key=lambda b: (self.kv_lens[b], self.q_lens[b]), reverse=True
        )
        groups: list[list[int]] = []
        waste = widest = 0
        for b in order:
            q_len, kv_len = self.q_lens[b], self.kv_lens[b]
            if groups:
                rows, cols = max(widest, q_len), self.kv_lens[groups[-1][0]]
                waste += self.heads * (rows * cols - q_len * kv_len + (rows - widest) * cols * len(groups[-1]))
                size = (len(groups[-1]) + 1) * self.heads * min(rows, TILE_ROWS) * cols
                if waste <= WASTE_ELEMENTS and size <= TILE_ELEMENTS:
                    groups[-1].append(b)
                    widest = rows
                    continue
            groups.append([b])
            waste, widest = 0, q_len
        return groups

    def _group(self, sequences: list[int]) -> Group:
        q_len, kv_len = max(self.q_lens[b] for b in sequences), max(self.kv_lens[b] for b in sequences)
        q_rows, q_kept = self._rows(sequences, self.q_starts, q_len)
        kv_rows, kv_kept = self._rows(sequences, self.kv_starts, kv_len)
        rows = min(q_len, max(1, TILE_ELEMENTS // (len(sequences) * self.heads * kv_len)))
        if q_len >= 2 * TILE_ROWS:
            rows = min(rows, TILE_ROWS)
        members = torch.tensor(sequences, device=self.device)
        tiles = [
            Tile(row, min(row + rows, q_len), *self._columns(sequences, row, min(row + rows, q_len), q_len, kv_len))
            for row in range(0, q_len, rows)
        ]
        return Group(sequences, members, q_len, kv_len, q_rows, kv_rows, q_kept, kv_kept, tiles)

    def _columns(self, sequences: list[int], row0: int, row1: int, q_len: int, kv_len: int) -> tuple[int, int]:
        """The columns outside which no row of [row0, row1) sees anything."""
        if isinstance(self.mask, Tensor):
            return 0, kv_len
        shift = kv_len - q_len
        first, last = row0 + shift, row1 - 1 + shift
        in_contexts = self.contexts is not None and any(
            first < kv_len - self.kv_lens[b] + self.contexts[b] for b in sequences
        )
        reach = 0 if self.mask.causal else kv_len if self.mask.window is None else self.mask.window
        end = kv_len if in_contexts else min(kv_len, last + reach + 1)
        if self.mask.window is None or self.contexts is not None:
            return 0, end
        in_targets = self.targets is not None and any(last >= kv_len - self.targets[b] for b in sequences)
        return (0 if in_targets else max(0, first - self.mask.window)), end

    def _rows(self, sequences: list[int], starts: list[int], length: int) -> tuple[Tensor, Tensor | None]:
        """Rows of (T * H, D) for a padded (b, H, length), and which of them are no padding."""
        start = torch.tensor([starts[b] for b in sequences], device=self.device)
        size = torch.tensor([starts[b + 1] - starts[b] for b in sequences], device=self.device)
        local = torch.arange(length, device=self.device) - (length - size)[:, None]
        rows = (start[:, None] + local.clamp(min=0))[:, None, :] * self.heads
        rows = rows + torch.arange(self.heads, device=self.device)[:, None]
        if all(starts[b + 1] - starts[b] == length for b in sequences):
            return rows.flatten(), None
        real = (local >= 0)[:, None, :].expand(-1, self.heads, -1)
        return rows.flatten(), torch.nonzero(real.flatten()).squeeze(1)

    def _tokens(self, group: Group, tile: Tile) -> tuple[Tensor, Tensor]:
        """(b, rows) query and (b, cols) key rows of a tile in (T, ...)."""
        b, heads = len(group.sequences), self.heads
        q = group.q_rows.view(b, heads, group.q_len)[:, 0, tile.row0 : tile.row1] // heads
        kv = group.kv_rows.view(b, heads, group.kv_len)[:, 0, tile.col0 : tile.col1] // heads
        return q, kv

    def _visible(self, group: Group, tile: Tile, mask: AttentionMask) -> Tensor:
        """(b, rows, cols) bool."""
        lengths = torch.tensor([[self.q_lens[b], self.kv_lens[b]] for b in group.sequences], dtype=torch.int32,
                               device=self.device)  # fmt: skip
        q_len, kv_len = lengths[:, :1], lengths[:, 1:]
        row = torch.arange(tile.row0, tile.row1, dtype=torch.int32, device=self.device)
        col = torch.arange(tile.col0, tile.col1, dtype=torch.int32, device=self.device)
        i, j = row - group.q_len + kv_len, (col - group.kv_len + kv_len)[:, None, :]
        padding = (row < group.q_len - q_len)[:, :, None]
        i3 = i[:, :, None]
        visible = (j <= i3) if mask.causal else torch.ones((), dtype=torch.bool, device=self.device)
        if mask.window is not None:
            visible = visible & (i3 - j <= mask.window)
            if not mask.causal:
                visible = visible & (j - i3 <= mask.window)
        if mask.num_targets is not None:
            first = kv_len - mask.num_targets[group.members].int()[:, None]
            is_target, size = (i >= first)[:, :, None], mask.target_group_size
            group_i, group_j = (
                (i - first).div(size, rounding_mode="floor"),
                (j[:, 0] - first).div(size, rounding_mode="floor"),
            )
            own = (group_i[:, :, None] == group_j[:, None, :]) & (j <= i3)
            history = j < first[:, :, None]
            visible = torch.where(is_target, history | own, visible & history)
        if mask.num_contexts is not None:
            contexts = mask.num_contexts[group.members].int()[:, None]
            visible = visible | (j < contexts[:, :, None])
            known = history if mask.num_targets is not None else torch.ones((), dtype=torch.bool, device=self.device)
            visible = torch.where((i < contexts)[:, :, None], known, visible)
        return visible & (j >= 0) & ~padding


def exact_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """int32 `time_bucket`, several times faster: a logarithm finds the bucket or the one before it, then one
    comparison with the exact integer edge decides."""
    largest = torch.iinfo(torch.int64).max - 1
    magnitude = distance.clamp(min=-largest, max=largest).abs_()
    # fp32 errs by less than 1e-4 buckets, so that with 1e-3 taken off the guess is never too high, by less than 1 low.
    bucket = magnitude.float().clamp_(min=1).log_().div_(BUCKET_WIDTH).sub_(1e-3).int().clamp_(max=num_buckets - 1)
    next_edge = _next_edges(num_buckets, distance.device).index_select(0, bucket.view(-1))
    return bucket.add_(magnitude >= next_edge.view_as(magnitude))


@lru_cache(maxsize=16)
def _next_edges(num_buckets: int, device: torch.device) -> Tensor:
    """(num_buckets,) first distance of the bucket after each; the last has none that a distance could reach."""
    edges = time_bucket_edges(num_buckets, device)
    return torch.cat([edges, edges.new_tensor([torch.iinfo(torch.int64).max])])


_last = threading.local()


def plan_for(
    q_offsets: Tensor,
    kv_offsets: Tensor,
    mask: AttentionMask | Tensor,
    bias: Tensor | RelativeBias | None,
    heads: int,
) -> Plan:
    """The plan of such a call: the last one again where offsets, mask and times are the very same tensors."""
    times, asked, buckets = None, None, 0
    if isinstance(bias, RelativeBias) and bias.time_weight is not None:
        times, asked, buckets = bias.timestamps, bias.query_timestamps, bias.time_weight.numel()
    masks = (mask, None) if isinstance(mask, Tensor) else (mask.num_contexts, mask.num_targets)
    words = () if isinstance(mask, Tensor) else (mask.target_group_size, mask.window, mask.causal)
    tensors = (q_offsets, kv_offsets, *masks, times, asked)
    facts = (words, buckets, heads)
    last: _Kept | None = getattr(_last, "kept", None)
    if last is not None and last.facts == facts and last.holds(tensors):
        return last.plan
    pair = None
    if times is not None:
        pair = times, _next_row_times(times, q_offsets, kv_offsets) if asked is None else asked
    plan = Plan(q_offsets, kv_offsets, mask, pair, buckets, heads)
    _last.kept = _Kept(tensors, facts, plan)
    return plan


class _Kept:
    """A plan, and what it was made from."""

    def __init__(self, tensors: tuple[Tensor | None, ...], facts: tuple[object, ...], plan: Plan) -> None:
        self.tensors, self.facts, self.plan = tensors, facts, plan
        self.states = [self._state(tensor) for tensor in tensors]

    def holds(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether these are the same tensors, unchanged."""
        same = all(a is b for a, b in zip(self.tensors, tensors, strict=True))
        return same and all(map(self._unchanged, tensors, self.states))

    @staticmethod
    def _state(tensor: Tensor | None) -> Tensor | int | None:
        if tensor is None:
            return None
        # Inference tensors count no versions: their contents are compared.
        return tensor.clone() if tensor.is_inference() else tensor._version

    @staticmethod
    def _unchanged(tensor: Tensor | None, state: Tensor | int | None) -> bool:
        if tensor is None or not isinstance(state, Tensor):
            return tensor is None or tensor._version == state
        return torch.equal(tensor, state)


def _next_row_times(timestamps: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Tensor:
    """(T_q,) t' of each query row where nothing else is said: the next key row's time, the last row's own."""
    ends = kv_offsets[1:].long()
    q_lens, rows = q_offsets.diff(), int(q_offsets[-1])
    sequence = torch.repeat_interleave(q_lens, output_size=rows)
    to_end = q_offsets[1:].long()[sequence] - torch.arange(rows, device=timestamps.device)
    return timestamps[ends[sequence] - (to_end - 1).clamp(min=1)]


def _differences(starts: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]
