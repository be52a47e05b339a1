# mypy: disable-error-code="no-untyped-def"
"""Moving rows: several tensors' rows each to its place in one, and back. What joins and splits jagged sequences.

Each row is read once and written once; plain torch would first write all rows one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from genrec._ops import op
from genrec.layers.triton._launch import check, on_device, tile


@triton.jit
def _move(from_ptr, to_ptr, index_ptr, rows, width, s_row, s_col,
          SCATTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """to[index[r]] = from[r] or to[r] = from[index[r]]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < width)[None, :]
    other = tl.load(index_ptr + row, mask=row < rows, other=0).to(tl.int64)
    source, target = (row, other) if SCATTER else (other, row)
    values = tl.load(from_ptr + source[:, None] * s_row + col.to(tl.int64)[None, :] * s_col, mask=ok, other=0.0)
    tl.store(to_ptr + target[:, None] * width + col[None, :], values.to(to_ptr.dtype.element_ty), mask=ok)


def _launch(source: Tensor, target: Tensor, index: Tensor, scatter: bool) -> None:
    """`_move` of all rows of `index`; `target` is contiguous."""
    rows, width = index.shape[0], source.shape[1]
    if rows == 0 or width == 0:
        return
    block, columns, warps = tile(min(width, 2048))
    with on_device(source):
        _move[(triton.cdiv(rows, block), triton.cdiv(width, columns))](
            source, target, index.contiguous(), rows, width, source.stride(0), source.stride(1),
            SCATTER=scatter, ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip


@op("genrec::place_rows")
def place_rows(pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows: out[places[i]] = pool[i].

    Args:
        pool: (T_i, D) each, of one dtype, any strides.
        places: (T_i,) int64 each; together they name each of the sum of T_i rows once.

    Returns:
        (sum of T_i, D), contiguous.
    """
    check("place_rows", *pool)
    out = pool[0].new_empty(sum(values.shape[0] for values in pool), pool[0].shape[1])
    for values, place in zip(pool, places, strict=True):
        _launch(values, out, place, scatter=True)
    return out


@place_rows.register_fake
def _(pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    return pool[0].new_empty(sum(values.shape[0] for values in pool), pool[0].shape[1])


@op("genrec::take_rows")
def take_rows(x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
    """The transpose of `place_rows`: x[places[i]] for each i.

    Args:
        x: (T, D), any strides.
        places: (T_i,) int64 each; together they name each row once.

    Returns:
        (T_i, D) each, contiguous.
    """
    check("take_rows", x)
    parts = [x.new_empty(place.shape[0], x.shape[1]) for place in places]
    for part, place in zip(parts, places, strict=True):
        _launch(x, part, place, scatter=False)
    return parts


@take_rows.register_fake
def _(x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(place.shape[0], x.shape[1]) for place in places]


def _keep_places(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1])


def _take(ctx, grad):
    return take_rows(grad, list(ctx.saved_tensors)), [None] * len(ctx.saved_tensors)


def _place(ctx, grads):
    return place_rows(grads, list(ctx.saved_tensors)), [None] * len(ctx.saved_tensors)


place_rows.register_autograd(_take, setup_context=_keep_places)
take_rows.register_autograd(_place, setup_context=_keep_places)
