# mypy: disable-error-code="no-untyped-def"
"""Position and time encodings: dropout(x * scale + tables' rows) in one pass, and the tables' gradients, no atomics.

A gradient of a table adds up the rows of the output's that share an index; with few buckets these are many. The rows
are sorted by index and cut into pieces of at most `PIECE` rows of one index; each piece is summed by a program of its
own, then the pieces of each index, always in the same order: the same bits in every run, and no program has much more
to do than another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec._ops import op
from genrec.layers.triton._launch import check, on_device, tile
from genrec.layers.triton.dropout import keep_mask, threshold

PIECE = 128


@triton.jit
def _encode(x_ptr, first_ptr, first_index, second_ptr, second_index, seed_ptr, out_ptr, rows, width, s_row, s_col,
            scale, thr, TABLES: tl.constexpr, DROPOUT: tl.constexpr,
            ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * s_row + col.to(tl.int64)[None, :] * s_col, mask=ok, other=0.0).to(tl.float32)
    x = x * scale
    if TABLES >= 1:
        at = tl.load(first_index + row, mask=row < rows, other=0).to(tl.int64)
        x += tl.load(first_ptr + at[:, None] * width + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if TABLES >= 2:
        at = tl.load(second_index + row, mask=row < rows, other=0).to(tl.int64)
        x += tl.load(second_ptr + at[:, None] * width + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if DROPOUT:
        kept = keep_mask(tl.load(seed_ptr), tl.program_id(1) * (COLS // 8), 0, row, thr, COLS)
        x = tl.where(kept, x * (65536.0 / (65536 - thr)), 0.0)
    tl.store(out_ptr + row[:, None] * width + col[None, :], x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _sum_pieces(grad_ptr, order_ptr, starts_ptr, piece_starts_ptr, owner_ptr, out_ptr, table_rows, width, s_row, s_col,
                PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Rows of one piece added up; a piece is named by its number, `owner` is its table row."""
    piece = tl.program_id(0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    owner = tl.load(owner_ptr + piece)
    if owner >= table_rows:
        return
    start = tl.load(starts_ptr + owner) + (piece - tl.load(piece_starts_ptr + owner)) * PIECE
    end = tl.minimum(start + PIECE, tl.load(starts_ptr + owner + 1))
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, PIECE, ROWS):
        place = start + first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + place, mask=place < end, other=0)
        ok = (place < end)[:, None] & (col < width)[None, :]
        ptrs = grad_ptr + row[:, None] * s_row + col.to(tl.int64)[None, :] * s_col
        total += tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)
    to = out_ptr + piece.to(tl.int64) * width + col
    tl.store(to, tl.sum(total, 0), mask=col < width)


@triton.jit
def _sum_owners(pieces_ptr, piece_starts_ptr, out_ptr, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The pieces of one table row added up."""
    owner = tl.program_id(0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start, end = tl.load(piece_starts_ptr + owner), tl.load(piece_starts_ptr + owner + 1)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(start, end, ROWS):
        piece = first + tl.arange(0, ROWS)
        ok = (piece < end)[:, None] & (col < width)[None, :]
        total += tl.load(pieces_ptr + piece[:, None] * width + col[None, :], mask=ok, other=0.0)
    at = out_ptr + owner.to(tl.int64) * width + col
    tl.store(at, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=col < width)


@op("genrec::add_encodings")
def add_encodings(
    x: Tensor, tables: Sequence[Tensor], indices: Sequence[Tensor], seed: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """dropout(x * scale + sum of tables[i][indices[i]]).

    Args:
        x: (T, D), any strides.
        tables: None, one or two of (rows, D).
        indices: (T,) int64 for each table, in its range.
        seed: (1,) int64 on x's device; None only where dropout is 0.
        scale: Of x.
        dropout: Probability, in [0, 1).

    Returns:
        (T, D) of x's dtype, contiguous.
    """
    check("add_encodings", x, *tables)
    if len(tables) > 2 or len(tables) != len(indices):
        raise ValueError(f"add_encodings takes up to two tables with an index each, got {len(tables)}, {len(indices)}.")
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if out.numel() == 0:
        return out
    thr = threshold(dropout)
    pairs = [(t.contiguous(), i.contiguous()) for t, i in zip(tables, indices, strict=True)]
    pairs += [(x, x)] * (2 - len(pairs))  # not read
    block, columns, warps = tile(min(width, 1024))
    with on_device(x):
        _encode[(triton.cdiv(rows, block), triton.cdiv(width, columns))](
            x, *pairs[0], *pairs[1], seed, out, rows, width, x.stride(0), x.stride(1), scale, thr,
            TABLES=len(tables), DROPOUT=thr > 0, ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip
    return out


@add_encodings.register_fake
def _(
    x: Tensor, tables: Sequence[Tensor], indices: Sequence[Tensor], seed: Tensor | None, scale: float, dropout: float
) -> Tensor:
    return x.new_empty(x.shape)


@op("genrec::sum_rows_by_index")
def sum_rows_by_index(grad: Tensor, index: Tensor, table_rows: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a table of which output row r read row index[r].

    Args:
        grad: (T, D), any strides.
        index: (T,) int64, in [0, table_rows).
        table_rows: Rows of the table.
        dtype: Of the result; the sums are fp32.

    Returns:
        (table_rows, D).
    """
    rows, width = grad.shape
    out = torch.empty(table_rows, width, dtype=dtype, device=grad.device)
    if rows == 0 or out.numel() == 0:
        return out.zero_()
    ordered, order = index.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(table_rows + 1, device=grad.device))
    piece_starts = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + PIECE - 1) // PIECE, 0, out=piece_starts[1:])
    pieces = rows // PIECE + min(table_rows, rows)  # at most; those beyond the last have table_rows as owner
    numbers = torch.arange(pieces, device=grad.device)
    owner = torch.searchsorted(piece_starts[1:].contiguous(), numbers, right=True)
    partial = torch.empty(pieces, width, dtype=torch.float32, device=grad.device)
    block, columns, warps = tile(min(width, 512))
    columns_grid = triton.cdiv(width, columns)
    with on_device(grad):
        _sum_pieces[(pieces, columns_grid)](
            grad, order, starts, piece_starts, owner, partial, table_rows, width, grad.stride(0), grad.stride(1),
            PIECE=PIECE, ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip
        _sum_owners[(table_rows, columns_grid)](
            partial, piece_starts, out, width, ROWS=block, COLS=columns, num_warps=warps
        )
    return out


@sum_rows_by_index.register_fake
def _(grad: Tensor, index: Tensor, table_rows: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(table_rows, grad.shape[1], dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    _, tables, indices, seed, ctx.scale, ctx.dropout = inputs
    ctx.sizes = [(table.shape[0], table.dtype) for table in tables]
    ctx.save_for_backward(seed, *indices)


def _differentiate(ctx, grad):
    seed, *indices = ctx.saved_tensors
    if threshold(ctx.dropout):
        grad = add_encodings(grad, [], [], seed, 1.0, ctx.dropout)
    tables = [sum_rows_by_index(grad, i, *size) for i, size in zip(indices, ctx.sizes, strict=True)]
    return grad * ctx.scale if ctx.scale != 1.0 else grad, tables, [None] * len(indices), None, None, None


add_encodings.register_autograd(_differentiate, setup_context=_setup)
