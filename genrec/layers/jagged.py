"""Joining and splitting jagged tensors: rows (T, D) with offsets (B + 1,), sequence b being rows [o[b], o[b + 1]).

The places of rows are computed with a few integer operations on (T,); the rows themselves are moved by a layer backend,
each read and written once. Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genrec.layers.ops import get_layer_ops


def jagged_concat(
    parts: Sequence[Tensor], offsets: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sequence b of the result is sequence b of each part, one behind the other.

    Args:
        parts: (T_i, D) each.
        offsets: (B + 1,) each.
        backend: A layer backend.

    Returns:
        Rows (sum of T_i, D) and offsets (B + 1,).

    Raises:
        ValueError: Not as many offsets as parts, or of other lengths.
    """
    places, joined = concat_places(offsets, [part.shape[0] for part in parts])
    return get_layer_ops(backend).place_rows(parts, places), joined


def jagged_split(x: Tensor, offsets: Sequence[Tensor], rows: Sequence[int], *, backend: str = "auto") -> list[Tensor]:
    """The reverse of `jagged_concat`.

    Args:
        x: (sum of T_i, D).
        offsets: (B + 1,) of each part.
        rows: T_i; given, since reading the last offset would wait for a GPU.
        backend: A layer backend.

    Returns:
        (T_i, D) each.

    Raises:
        ValueError: Not as many offsets as parts, offsets of other lengths, or rows that don't add up to x's.
    """
    if sum(rows) != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, its parts would have {' + '.join(map(str, rows))}.")
    places, _ = concat_places(offsets, rows)
    return get_layer_ops(backend).take_rows(x, places)


def jagged_interleave(
    first: Tensor, first_offsets: Tensor, second: Tensor, second_offsets: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sequence b is first, second, first, second, ... of b; what one of them has more of follows at the end.

    Args:
        first: (T_1, D), for example items.
        first_offsets: (B + 1,).
        second: (T_2, D), for example their actions, which candidates lack.
        second_offsets: (B + 1,).
        backend: A layer backend.

    Returns:
        Rows (T_1 + T_2, D) and offsets (B + 1,).

    Raises:
        ValueError: Offsets of other lengths.
    """
    _check([first_offsets, second_offsets], 2)
    joined = first_offsets + second_offsets
    places = []
    for number, (rows, own, other) in enumerate(
        [(first.shape[0], first_offsets, second_offsets), (second.shape[0], second_offsets, first_offsets)]
    ):
        sequence, local = _coordinates(own, rows)
        # The k-th of the first has k of the second before it, the k-th of the second k + 1 of the first, if there are.
        places.append(joined[sequence] + local + torch.minimum(local + number, other.diff()[sequence]))
    return get_layer_ops(backend).place_rows([first, second], places), joined


def concat_places(offsets: Sequence[Tensor], rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Where `jagged_concat` puts each part's rows, (T_i,) int64 each, and the offsets of the result."""
    _check(offsets, len(rows))
    joined = torch.stack(list(offsets)).sum(0)
    places, before = [], torch.zeros_like(joined[:-1])
    for own, count in zip(offsets, rows, strict=True):
        sequence, local = _coordinates(own, count)
        places.append((joined[:-1] + before)[sequence] + local)
        before = before + own.diff()
    return places, joined


def _coordinates(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(T,) the sequence of each row, and the row's number in it."""
    sequence = torch.repeat_interleave(offsets.diff(), output_size=rows)
    return sequence, torch.arange(rows, device=offsets.device) - offsets[sequence]


def _check(offsets: Sequence[Tensor], parts: int) -> None:
    if not offsets or len(offsets) != parts or len({o.shape for o in offsets}) > 1:
        raise ValueError(
            f"Each part needs offsets, all of one length; got {parts} parts and offsets of shapes "
            f"{', '.join(str(tuple(o.shape)) for o in offsets)}."
        )


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] where no row is named twice: the gradient is copied to its rows, not added up.

    Args:
        x: (T, D).
        index: (n,) int64, all different.

    Returns:
        (n, D).
    """
    return _SelectRows.apply(x, index)  # type: ignore[no-any-return]


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_put_((index,), grad), None


def where_true(chosen: Tensor, count: int | None = None) -> Tensor:
    """The indices at which `chosen` is true, in order: `torch.nonzero` that is told how many and need not ask a GPU.

    Args:
        chosen: (T,) bool.
        count: How many are true; None to ask.

    Returns:
        (count,) int64.

    Raises:
        RuntimeError: There are not `count` of them. On a GPU the kernels that follow fail.
    """
    if count is None:
        return torch.nonzero(chosen).squeeze(1)
    torch._assert_async(chosen.sum() == count, f"{count} labels don't fit the batch's num_targets")
    place = torch.where(chosen, chosen.cumsum(0) - 1, count)
    found = place.new_zeros(count + 1)
    return found.scatter_(0, place, torch.arange(chosen.shape[0], device=chosen.device))[:count]
