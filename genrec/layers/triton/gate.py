# mypy: disable-error-code="no-untyped-def"
"""The gated product of equation (3): dropout(u * norm(a)), or dropout([u, a, u * norm(a)]) in each head.

One pass over a and u. The gate may come as it left the projection, with its SiLU done here: then silu(u) is never
written to memory, neither here nor for the backward pass. The norm may also have been done elsewhere (a norm whose
statistics span several ranks); `normed` is then its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec._ops import op, untraced
from genrec.layers.triton._launch import check, loop, on_device, three_at_once, tile
from genrec.layers.triton.dropout import keep_mask, threshold
from genrec.layers.triton.norm import (
    affine_kind,
    fake_affine,
    input_gradient,
    load_affine,
    new_affine,
    statistics,
    store_affine,
    sum_affine,
)

ROOM = "_gradient_room"
"""Attribute of a gate's tensor: the `silu.GradientRoom` where its gradient is wanted."""


@triton.jit
def _dropped(x, seed, stream, row, thr, COLS: tl.constexpr, DROPOUT: tl.constexpr):
    """dropout(x); its own transpose, so the backward pass calls it too. Every mask has a stream of its own."""
    if DROPOUT:
        x = tl.where(keep_mask(seed, 0, stream, row, thr, COLS), x * (65536.0 / (65536 - thr)), 0.0)
    return x


@triton.jit
def _forward(a_ptr, u_ptr, n_ptr, w_ptr, b_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr, rows, groups, dim,
             sa_row, sa_head, sa_col, su_row, su_head, su_col, sn_row, sn_col, eps, thr,
             HEAD: tl.constexpr, CONCAT: tl.constexpr, SILU: tl.constexpr, NORMED: tl.constexpr,
             AFFINE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    col = tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < dim)[None, :]
    head = ((group * dim + col) // HEAD).to(tl.int64)[None, :]
    inner = ((group * dim + col) % HEAD)[None, :]
    u = tl.load(u_ptr + row[:, None] * su_row + head * su_head + inner * su_col, mask=ok, other=0.0).to(tl.float32)
    if SILU:
        u = u * tl.sigmoid(u)
    if not NORMED or CONCAT:
        a = tl.load(a_ptr + row[:, None] * sa_row + head * sa_head + inner * sa_col, mask=ok, other=0.0).to(tl.float32)
    if NORMED:
        at = (group * dim + col).to(tl.int64)[None, :]
        n = tl.load(n_ptr + row[:, None] * sn_row + at * sn_col, mask=ok, other=0.0).to(tl.float32)
    else:
        mean, rstd = statistics(a, ok, dim, eps)
        tl.store(mean_ptr + row * groups + group, mean, mask=row < rows)
        tl.store(rstd_ptr + row * groups + group, rstd, mask=row < rows)
        w, b = load_affine(w_ptr, b_ptr, group, col, dim, AFFINE)
        n = (a - mean[:, None]) * rstd[:, None] * w + b
    seed = tl.load(seed_ptr) if DROPOUT else 0
    kind = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = 3 if CONCAT else 1
    y_ptrs = y_ptr + row[:, None] * (groups * dim * PARTS) + head * (HEAD * PARTS) + inner
    if CONCAT:
        tl.store(y_ptrs, _dropped(u, seed, group * 4, row, thr, COLS, DROPOUT).to(kind), mask=ok)
        tl.store(y_ptrs + HEAD, _dropped(a, seed, group * 4 + 1, row, thr, COLS, DROPOUT).to(kind), mask=ok)
    y = _dropped(u * n, seed, group * 4 + 2, row, thr, COLS, DROPOUT)
    tl.store(y_ptrs + (PARTS - 1) * HEAD, y.to(kind), mask=ok)


@triton.jit
def _backward(dy_ptr, a_ptr, u_ptr, n_ptr, w_ptr, b_ptr, seed_ptr, mean_ptr, rstd_ptr,
              da_ptr, du_ptr, dn_ptr, dw_ptr, db_ptr, sums_ptr, rows, groups, dim,
              sdy_row, sdy_col, sa_row, sa_head, sa_col, su_row, su_head, su_col, sn_row, sn_col, sdu_row, sdu_head,
              thr, HEAD: tl.constexpr, CONCAT: tl.constexpr, SILU: tl.constexpr, NORMED: tl.constexpr,
              AFFINE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
              STAGES: tl.constexpr):  # fmt: skip
    program, group = tl.program_id(0), tl.program_id(1)
    col = tl.arange(0, COLS)
    at = (group * dim + col).to(tl.int64)[None, :]
    head = ((group * dim + col) // HEAD).to(tl.int64)[None, :]
    inner = ((group * dim + col) % HEAD)[None, :]
    PARTS: tl.constexpr = 3 if CONCAT else 1
    w, b = load_affine(w_ptr, b_ptr, group, col, dim, AFFINE)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dw = tl.zeros([ROWS, COLS], tl.float32)
    db = tl.zeros([ROWS, COLS], tl.float32)
    u_sum = tl.zeros([ROWS, COLS], tl.float32)
    for block in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        ok = (row < rows)[:, None] & (col < dim)[None, :]
        dy_ptrs = dy_ptr + row[:, None] * sdy_row + (head * (HEAD * PARTS) + inner) * sdy_col
        dy = tl.load(dy_ptrs + (PARTS - 1) * HEAD * sdy_col, mask=ok, other=0.0).to(tl.float32)
        dy = _dropped(dy, seed, group * 4 + 2, row, thr, COLS, DROPOUT)
        u_ptrs = u_ptr + row[:, None] * su_row + head * su_head + inner * su_col
        raw = tl.load(u_ptrs, mask=ok, other=0.0).to(tl.float32)
        u = raw * tl.sigmoid(raw) if SILU else raw
        if NORMED:
            n = tl.load(n_ptr + row[:, None] * sn_row + at * sn_col, mask=ok, other=0.0).to(tl.float32)
            du = dy * n
            tl.store(dn_ptr + row[:, None] * (groups * dim) + at, (dy * u).to(dn_ptr.dtype.element_ty), mask=ok)
        else:
            a_ptrs = a_ptr + row[:, None] * sa_row + head * sa_head + inner * sa_col
            a = tl.load(a_ptrs, mask=ok, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row * groups + group, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row * groups + group, mask=row < rows, other=0.0)
            normed = tl.where(ok, (a - mean[:, None]) * rstd[:, None], 0.0)
            du = dy * (normed * w + b)
            if AFFINE != 0:
                dw += dy * u * normed
                db += dy * u
            da = input_gradient(dy * u, normed, rstd, w, ok, dim)
        if CONCAT:
            direct = tl.load(dy_ptrs, mask=ok, other=0.0).to(tl.float32)
            du += _dropped(direct, seed, group * 4, row, thr, COLS, DROPOUT)
            direct = tl.load(dy_ptrs + HEAD * sdy_col, mask=ok, other=0.0).to(tl.float32)
            direct = _dropped(direct, seed, group * 4 + 1, row, thr, COLS, DROPOUT)
            da = direct if NORMED else da + direct
        if SILU:
            s = tl.sigmoid(raw)
            du = du * s * (1.0 + raw * (1.0 - s))
        to = row[:, None] * (groups * dim) + at
        tl.store(du_ptr + row[:, None] * sdu_row + head * sdu_head + inner, du.to(du_ptr.dtype.element_ty), mask=ok)
        if sums_ptr is not None:
            u_sum += du
        if not NORMED or CONCAT:
            tl.store(da_ptr + to, da.to(da_ptr.dtype.element_ty), mask=ok)
    store_affine(dw_ptr, db_ptr, dw, db, program, group, groups, col, dim, AFFINE)
    if sums_ptr is not None:
        to = (program * groups + group).to(tl.int64) * dim + col
        tl.store(sums_ptr + to, tl.sum(u_sum, 0), mask=col < dim)


def _sizes(a: Tensor, groups: int) -> tuple[int, int, int, int]:
    """(rows, head width, groups, width of a group)."""
    rows, heads, head = a.shape
    return rows, head, groups, heads * head // groups


@op("genrec::gated_product")
def gated_product(
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    concat: bool,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd), y = dropout(u' * norm(a)) or dropout([u', a, u' * norm(a)]) by head, u' = silu(u) or u.

    Args:
        a, u: (T, H, Dv), any strides.
        normed: (T, H * Dv), norm(a) where it is computed elsewhere; then weight, bias and eps are not read.
        weight, bias: As in `layer_norm`.
        seed: (1,) int64 on a's device; None only where dropout is 0.
        groups: Groups of the norm: 1, or H.
        eps: Of the norm.
        dropout: Probability, in [0, 1).
        concat: The production form.
        silu: SiLU on u.
        dtype: Of y.

    Returns:
        y: (T, H * Dv) or (T, H * 3 Dv), contiguous; mean, rstd: (T, groups) fp32, not set where `normed` is given.
    """
    check("gated_product", a, u, normed, weight, bias)
    rows, head, groups, dim = _sizes(a, groups)
    width = groups * dim
    y = torch.empty(rows, width * (3 if concat else 1), dtype=dtype, device=a.device)
    mean, rstd = (torch.empty(rows, groups, dtype=torch.float32, device=a.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean, rstd
    n_strides = (0, 0) if normed is None else normed.stride()
    thr = threshold(dropout)
    block, columns, warps = tile(dim, per_thread=32)
    with on_device(a):
        _forward[(triton.cdiv(rows, block), groups)](
            a, u, normed, weight, bias, seed, y, mean, rstd, rows, groups, dim,
            *a.stride(), *u.stride(), *n_strides, eps, thr,
            HEAD=head, CONCAT=concat, SILU=silu, NORMED=normed is not None, DROPOUT=thr > 0,
            AFFINE=affine_kind(weight, groups, width), ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


@gated_product.register_fake
def _(
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    concat: bool,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, head = a.shape
    statistic = a.new_empty(rows, groups, dtype=torch.float32)
    y = a.new_empty(rows, heads * head * (3 if concat else 1), dtype=dtype)
    return y, statistic, torch.empty_like(statistic)


@op("genrec::gated_product_backward")
def gated_product_backward(
    dy: Tensor,
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    concat: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(da, du, dnormed, dweight, dbias); those of inputs that are missing or not read are empty."""
    du = u.new_empty(u.shape)
    da, dn, dw, db, _ = _backward_into(du, False, dy, a, u, normed, weight, bias, seed, mean, rstd, dropout, concat,
                                       silu)  # fmt: skip
    return da, du, dn, dw, db


def _backward_into(
    du: Tensor,
    sums: bool,
    dy: Tensor,
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    concat: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(da, dnormed, dweight, dbias, partial sums of du over rows (n, H, Dv)) of `gated_product_backward`, which fills
    du, of any strides but contiguous columns."""
    rows, head, groups, dim = _sizes(a, mean.shape[1])
    width = groups * dim
    da = a.new_empty(a.shape if normed is None or concat else 0)
    dn = a.new_empty(0) if normed is None else normed.new_empty(normed.shape)
    # The concatenated form has twice as much in registers.
    cut = loop(a, dim, groups, 5, 8, 128) if concat else loop(a, dim, groups, 3, 16, 64)
    affine = new_affine(cut.programs, weight, a)
    partial = torch.empty(cut.programs if sums else 0, *a.shape[1:], dtype=torch.float32, device=a.device)
    thr = threshold(dropout)
    if du.numel() == 0:
        affine.zero_(), partial.zero_()
    else:
        with on_device(a):
            _backward[(cut.programs, groups)](
                dy, a, u, normed, weight, bias, seed, mean, rstd, da, du, dn, *affine, partial if sums else None, rows,
                groups, dim, *dy.stride(), *a.stride(), *u.stride(), *((0, 0) if normed is None else normed.stride()),
                *du.stride()[:2], thr,
                HEAD=head, CONCAT=concat, SILU=silu, NORMED=normed is not None, DROPOUT=thr > 0,
                AFFINE=affine_kind(weight, groups, width), ROWS=cut.rows, COLS=cut.columns, STAGES=cut.stages,
                num_warps=cut.warps, **three_at_once(cut.warps),
            )  # fmt: skip
    return da, dn, *sum_affine(affine, weight, bias), partial


@gated_product_backward.register_fake
def _(
    dy: Tensor,
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    concat: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dn = a.new_empty(0) if normed is None else normed.new_empty(normed.shape)
    da = a.new_empty(a.shape if normed is None or concat else 0)
    return da, u.new_empty(u.shape), dn, *fake_affine(a, weight, bias)


def _setup(ctx, inputs, output) -> None:
    a, u, normed, weight, bias, seed, _, _, ctx.dropout, ctx.concat, ctx.silu, _ = inputs
    _, mean, rstd = output
    ctx.room = getattr(u, ROOM, None)
    ctx.save_for_backward(a, u, normed, weight, bias, seed, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx, dy, _mean, _rstd):
    _, _, normed, weight, bias, *_ = saved = ctx.saved_tensors
    inputs = [dy, *saved, ctx.dropout, ctx.concat, ctx.silu]
    if ctx.room is None or not untraced(inputs):
        da, du, dn, dw, db = gated_product_backward(*inputs)
    else:
        du = ctx.room.make(saved[1])
        da, dn, dw, db, sums = _backward_into(du, ctx.room.sums, *inputs)
        ctx.room.put(du, sums)
    given = [
        da if normed is None or ctx.concat else None,
        du,
        *(None if t is None else d for t, d in ((normed, dn), (weight, dw), (bias, db))),
    ]
    return *given, *[None] * 7


gated_product.register_autograd(_differentiate, setup_context=_setup)
