# mypy: disable-error-code="no-untyped-def"
"""Layer norm and group norm (`HeadNorm`), with the statistics saved for the backward pass.

    y = (x - mean) * rstd * weight + bias

A row of G groups is normalised group by group: G = 1 is layer norm, its affine one factor for each column; G = H is
`HeadNorm`, its affine one factor for each group. Statistics and sums are fp32 whatever the tensors are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec._ops import op
from genrec.layers.triton._launch import check, loop, on_device, tile

NO_AFFINE, BY_COLUMN, BY_GROUP = 0, 1, 2


@triton.jit
def load_affine(w_ptr, b_ptr, group, col, dim, AFFINE: tl.constexpr):
    """(weight, bias) of one group in fp32: [1, columns] by column, scalars by group."""
    if AFFINE == 1:
        at = group * dim + col
        w = tl.load(w_ptr + at, mask=col < dim, other=0.0).to(tl.float32)[None, :]
        b = tl.load(b_ptr + at, mask=col < dim, other=0.0).to(tl.float32)[None, :]
    elif AFFINE == 2:
        w = tl.load(w_ptr + group).to(tl.float32)
        b = tl.load(b_ptr + group).to(tl.float32)
    else:
        w = 1.0
        b = 0.0
    return w, b


@triton.jit
def statistics(x, ok, dim, eps):
    """(mean, 1 / sqrt(variance + eps)) of each row, in two passes over registers; x is 0 where not ok."""
    mean = tl.sum(x, 1) / dim
    centred = tl.where(ok, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / dim + eps)


@triton.jit
def input_gradient(dy, normed, rstd, w, ok, dim):
    """dx of y = normed * w + b, with dx = rstd * (g - mean(g) - normed * mean(g * normed)) and g = dy * w."""
    g = tl.where(ok, dy * w, 0.0)
    along = tl.sum(g * normed, 1) / dim
    return rstd[:, None] * (g - (tl.sum(g, 1) / dim)[:, None] - normed * along[:, None])


@triton.jit
def store_affine(dw_ptr, db_ptr, dw, db, program, group, groups, col, dim, AFFINE: tl.constexpr):
    """One program's sums, to its own row: (programs, groups * dim) by column, (programs, groups) by group."""
    if AFFINE == 1:
        at = (program * groups + group).to(tl.int64) * dim + col
        tl.store(dw_ptr + at, tl.sum(dw, 0), mask=col < dim)
        tl.store(db_ptr + at, tl.sum(db, 0), mask=col < dim)
    elif AFFINE == 2:
        tl.store(dw_ptr + program * groups + group, tl.sum(dw))
        tl.store(db_ptr + program * groups + group, tl.sum(db))


@triton.jit
def _forward(x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, rows, groups, dim, sx_row, sx_col, eps,
             AFFINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    col = tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < dim)[None, :]
    at = (group * dim + col).to(tl.int64)[None, :]
    x = tl.load(x_ptr + row[:, None] * sx_row + at * sx_col, mask=ok, other=0.0).to(tl.float32)
    mean, rstd = statistics(x, ok, dim, eps)
    w, b = load_affine(w_ptr, b_ptr, group, col, dim, AFFINE)
    y = (x - mean[:, None]) * rstd[:, None] * w + b
    tl.store(y_ptr + row[:, None] * groups * dim + at, y.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(mean_ptr + row * groups + group, mean, mask=row < rows)
    tl.store(rstd_ptr + row * groups + group, rstd, mask=row < rows)


@triton.jit
def _backward(dy_ptr, x_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, more_ptr, dx_ptr, dw_ptr, db_ptr, rows, groups, dim,
              sdy_row, sdy_col, sx_row, sx_col, sm_row, sm_col, MORE: tl.constexpr,
              AFFINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    program, group = tl.program_id(0), tl.program_id(1)
    col = tl.arange(0, COLS)
    at = (group * dim + col).to(tl.int64)[None, :]
    w, _ = load_affine(w_ptr, b_ptr, group, col, dim, AFFINE)
    dw = tl.zeros([ROWS, COLS], tl.float32)
    db = tl.zeros([ROWS, COLS], tl.float32)
    for block in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        ok = (row < rows)[:, None] & (col < dim)[None, :]
        x = tl.load(x_ptr + row[:, None] * sx_row + at * sx_col, mask=ok, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * sdy_row + at * sdy_col, mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row * groups + group, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row * groups + group, mask=row < rows, other=0.0)
        normed = tl.where(ok, (x - mean[:, None]) * rstd[:, None], 0.0)
        dx = input_gradient(dy, normed, rstd, w, ok, dim)
        if MORE:
            dx += tl.load(more_ptr + row[:, None] * sm_row + at * sm_col, mask=ok, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * groups * dim + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
        if AFFINE != 0:
            dw += dy * normed
            db += dy
    store_affine(dw_ptr, db_ptr, dw, db, program, group, groups, col, dim, AFFINE)


def affine_kind(weight: Tensor | None, groups: int, width: int) -> int:
    """Which affine a weight of this shape is; a layer norm of width 1 is by column, the same thing.

    Raises:
        ValueError: The weight fits neither.
    """
    if weight is None:
        return NO_AFFINE
    if weight.numel() == width:
        return BY_COLUMN
    if weight.numel() == groups:
        return BY_GROUP
    raise ValueError(f"A norm over {width} columns in {groups} groups can't have {weight.numel()} weights.")


@op("genrec::layer_norm")
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of a layer norm or group norm.

    Args:
        x: (T, G * width), any strides.
        weight: (G * width,), (G,) or None; `bias` the same.
        groups: G.
        eps: Added to the variance.
        dtype: Of y.

    Returns:
        y: (T, G * width), contiguous; mean and rstd: (T, G) fp32.
    """
    check("layer_norm", x, weight, bias)
    rows, width = x.shape
    dim = width // groups
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(rows, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean, rstd
    block, columns, warps = tile(dim, per_thread=32)
    with on_device(x):
        _forward[(triton.cdiv(rows, block), groups)](
            x, weight, bias, y, mean, rstd, rows, groups, dim, x.stride(0), x.stride(1), eps,
            AFFINE=affine_kind(weight, groups, width), ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


@layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), statistic, torch.empty_like(statistic)


@op("genrec::layer_norm_backward")
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of `layer_norm`; the last two are empty where there is no weight.

    `more`, (T, G * width), is added to dx: what reaches x on another way.
    """
    rows, width = x.shape
    groups = mean.shape[1]
    dim = width // groups
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    kind = affine_kind(weight, groups, width)
    cut = loop(x, dim, groups, 2 + (more is not None), 16, 64)
    affine = new_affine(cut.programs, weight, x)
    if dx.numel() == 0:
        affine.zero_()
    else:
        with on_device(x):
            _backward[(cut.programs, groups)](
                dy, x, weight, bias, mean, rstd, more, dx, *affine, rows, groups, dim,
                *dy.stride(), *x.stride(), *((0, 0) if more is None else more.stride()),
                MORE=more is not None, AFFINE=kind, ROWS=cut.rows, COLS=cut.columns, STAGES=cut.stages,
                num_warps=cut.warps,
            )  # fmt: skip
    return dx, *sum_affine(affine, weight, bias)


def new_affine(programs: int, weight: Tensor | None, x: Tensor) -> Tensor:
    """Room for the sums of weight and bias that each program writes, (2, programs, their size)."""
    size = 0 if weight is None else weight.numel()
    return torch.empty(2, programs, size, dtype=torch.float32, device=x.device)


def sum_affine(affine: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The programs' sums added up, in the dtypes of weight and bias; always in the same order."""
    dw, db = affine[0].sum(0), affine[1].sum(0)
    return (dw if weight is None else dw.to(weight.dtype)), (db if bias is None else db.to(bias.dtype))


def fake_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `sum_affine` returns, for tracing."""
    return tuple(x.new_empty(0, dtype=torch.float32) if p is None else torch.empty_like(p) for p in (weight, bias))  # type: ignore[return-value]


@layer_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *fake_affine(x, weight, bias)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx, dy, _mean, _rstd):
    _, weight, bias, *_ = saved = ctx.saved_tensors
    dx, dw, db = layer_norm_backward(dy, *saved)
    return dx, None if weight is None else dw, None if bias is None else db, None, None, None


layer_norm.register_autograd(_differentiate, setup_context=_setup)


class NormAndResidual(torch.autograd.Function):
    """(x, layer_norm(x)): where x goes on as the residual, the two gradients meet in the norm's backward kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Arguments as those of `layer_norm`."""
        y, mean, rstd = layer_norm(x, weight, bias, groups, eps, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, residual: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """(dx, dweight, dbias, None, ...)."""
        _, weight, bias, *_ = saved = ctx.saved_tensors
        dx, dw, db = layer_norm_backward(dy, *saved, residual)
        return dx, None if weight is None else dw, None if bias is None else db, None, None, None
