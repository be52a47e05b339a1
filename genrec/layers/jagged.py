"""Joining and splitting jagged tensors: rows (T, D) with offsets (B + 1,), sequence b being rows [o[b], o[b + 1]).

The places of rows are computed with a few integer operations on (T,); the rows themselves are moved by a layer backend,
each read and written once. Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

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
