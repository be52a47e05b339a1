"""Scoring a whole catalogue in chunks: the exact rank of a target, and the best items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "other": 1 << 27}
"""Scores held at once."""


class Seen(NamedTuple):
    """Items to leave out, as pairs. Sorted by case.

    Attributes:
        case: (n,) int64 case (row of the queries).
        item: (n,) int64 item that the case has seen; repeats are fine.
    """

    case: Tensor
    item: Tensor


def seen_items(item_ids: Tensor, seq_offsets: Tensor, rows: Tensor, further: JaggedTensor | None = None) -> Seen:
    """What each case has seen: the items of its sequence up to its own row.

    Args:
        item_ids: (T,) items of the batch.
        seq_offsets: (B + 1,).
        rows: (C,) row of each case, ascending.
        further: For each sequence, items seen by all its cases though they are not among its rows.
    """
    sequence = torch.searchsorted(seq_offsets, rows, right=True) - 1
    case, index = _ranges(seq_offsets[sequence], rows + 1 - seq_offsets[sequence])
    if further is None:
        return Seen(case, item_ids[index])
    offsets = further.offsets()
    more_case, more_index = _ranges(offsets[sequence], offsets.diff()[sequence])
    case, order = torch.cat([case, more_case]).sort(stable=True)
    return Seen(case, torch.cat([item_ids[index], further.values()[more_index]])[order])


def _ranges(first: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each of some ranges its number and its elements, one after the other."""
    number = torch.repeat_interleave(lengths)
    within = torch.arange(number.numel(), device=first.device) - (lengths.cumsum(0) - lengths)[number]
    return number, first[number] + within


def target_ranks(
    query: Tensor, items: Tensor, targets: Tensor, *, bias: Tensor | None = None, seen: Seen | None = None
) -> Tensor:
    """Rank of each case's target among all items, counted from 1, exactly and deterministically.

    Ties are counted against the target: items of an equal score stand before it. A seen item never stands before it.
    The target itself is never left out, even where it has been seen. A score that is not a number ranks last.

    Args:
        query: (C, D).
        items: (V, D).
        targets: (C,) int64.
        bias: (V,) or None.
        seen: Items that don't compete, or None.

    Returns:
        (C,) int64.
    """
    ranks = torch.empty_like(targets)
    for part, scores in _score_chunks(query, items, bias, seen=None):
        own = scores.gather(1, targets[part, None])
        if seen is not None:
            _leave_out(scores, part, seen)
            scores.scatter_(1, targets[part, None], own)
        ranks[part] = torch.where(own.isnan().squeeze(1), items.shape[0], (scores >= own).sum(dim=1))
    return ranks


def top_items(
    query: Tensor, items: Tensor, k: int, *, bias: Tensor | None = None, seen: Seen | None = None
) -> tuple[Tensor, Tensor]:
    """The k best items of each case; items of equal scores stand in any order.

    Args:
        query: (C, D).
        items: (V, D).
        k: How many.
        bias: (V,) or None.
        seen: Items to leave out, or None.

    Returns:
        (C, k) int64 ids, best first, and (C, k) scores. Where fewer than k items are left, the id is -1 and the score
        -inf.
    """
    ids = torch.full((query.shape[0], k), -1, dtype=torch.int64, device=query.device)
    best = query.new_full((query.shape[0], k), -torch.inf)
    available = min(k, items.shape[0])
    for part, scores in _score_chunks(query, items, bias, seen):
        values, found = scores.topk(available, dim=1)
        best[part, :available] = values
        ids[part, :available] = found.masked_fill(values == -torch.inf, -1)
    return ids, best


def _score_chunks(
    query: Tensor, items: Tensor, bias: Tensor | None, seen: Seen | None
) -> Iterator[tuple[slice, Tensor]]:
    budget = _CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "other"]
    rows = max(budget // items.shape[0], 1)
    for start in range(0, query.shape[0], rows):
        part = slice(start, min(start + rows, query.shape[0]))
        scores = query[part] @ items.t()
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            _leave_out(scores, part, seen)
        yield part, scores


def _leave_out(scores: Tensor, part: slice, seen: Seen) -> None:
    bounds = torch.searchsorted(seen.case, torch.tensor([part.start, part.stop], device=seen.case.device)).tolist()
    here = slice(*bounds)
    scores[seen.case[here] - part.start, seen.item[here]] = -torch.inf
