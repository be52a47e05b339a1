# mypy: disable-error-code="no-untyped-def"
"""SiLU and split of the projection: u, v, q, k from (T, H * (2 Dv + 2 Dqk)), head-major, and back.

Nothing is copied for the split: the parts are views, of the projection itself where it stays as it is. The backward
pass puts the four gradients together and applies the derivative of SiLU in one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec._ops import op
from genrec.layers.triton._launch import check, on_device, tile


@triton.jit
def _activate(y_ptr, z_ptr, rows, width, wide, first, raw_end, sy_row, sy_col,
              ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """z = the columns of each head from `first` on: silu, but as they are before column `raw_end`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    kept = wide - first
    ok = (row < rows)[:, None] & (col < kept)[None, :]
    at = (head * wide + first + col).to(tl.int64)[None, :]
    y = tl.load(y_ptr + row[:, None] * sy_row + at * sy_col, mask=ok, other=0.0).to(tl.float32)
    z = tl.where((first + col < raw_end)[None, :], y, y * tl.sigmoid(y))
    to = row[:, None] * (width // wide * kept) + (head * kept + col)[None, :]
    tl.store(z_ptr + to, z.to(z_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _merge_part(d_ptr, s_row, s_head, s_col, y_ptr, dy_ptr, row, rows, head, wide, base, dim, sy_row, sy_col, dy_row,
                SILU: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """One of the four parts of `_merge`: columns [base, base + dim) of a head."""
    col = tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < dim)[None, :]
    from_ptrs = d_ptr + row[:, None] * s_row + head.to(tl.int64) * s_head + col[None, :] * s_col
    d = tl.load(from_ptrs, mask=ok, other=0.0).to(tl.float32)
    at = (head * wide + base + col).to(tl.int64)[None, :]
    if SILU:
        y = tl.load(y_ptr + row[:, None] * sy_row + at * sy_col, mask=ok, other=0.0).to(tl.float32)
        s = tl.sigmoid(y)
        d = d * s * (1.0 + y * (1.0 - s))
    tl.store(dy_ptr + row[:, None] * dy_row + at, d.to(dy_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _merge(du, dv, dq, dk, y, dy, rows, width, v_dim, qk_dim, u_row, u_head, u_col, v_row, v_head, v_col,
           q_row, q_head, q_col, k_row, k_head, k_col, sy_row, sy_col,
           SILU: tl.constexpr, ROWS: tl.constexpr, V_COLS: tl.constexpr, QK_COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    wide = 2 * (v_dim + qk_dim)
    _merge_part(du, u_row, u_head, u_col, y, dy, row, rows, head, wide, 0, v_dim, sy_row, sy_col, width, False, V_COLS)
    _merge_part(dv, v_row, v_head, v_col, y, dy, row, rows, head, wide, v_dim, v_dim, sy_row, sy_col, width,
                SILU, V_COLS)  # fmt: skip
    _merge_part(dq, q_row, q_head, q_col, y, dy, row, rows, head, wide, 2 * v_dim, qk_dim, sy_row, sy_col, width,
                SILU, QK_COLS)  # fmt: skip
    _merge_part(dk, k_row, k_head, k_col, y, dy, row, rows, head, wide, 2 * v_dim + qk_dim, qk_dim, sy_row, sy_col,
                width, SILU, QK_COLS)  # fmt: skip


@op("genrec::activate_uvqk")
def activate_uvqk(y: Tensor, v_dim: int, qk_dim: int, keep_u: bool) -> Tensor:
    """SiLU of v, q and k of each head, in a tensor of their own.

    Args:
        y: (T, H * (2 Dv + 2 Dqk)), any strides.
        v_dim, qk_dim: Dv and Dqk.
        keep_u: u goes along, as it is, so that y need not live on.

    Returns:
        (T, H, Dv + 2 Dqk), or with keep_u (T, H, 2 Dv + 2 Dqk), contiguous.
    """
    check("activate_uvqk", y)
    wide = 2 * (v_dim + qk_dim)
    rows, width = y.shape
    first = 0 if keep_u else v_dim
    z = y.new_empty(rows, width // wide, wide - first)
    if z.numel() == 0:
        return z
    block, columns, warps = tile(min(wide - first, 1024))
    with on_device(y):
        _activate[(triton.cdiv(rows, block), width // wide, triton.cdiv(wide - first, columns))](
            y, z, rows, width, wide, first, v_dim, y.stride(0), y.stride(1),
            ROWS=block, COLS=columns, num_warps=warps,
        )  # fmt: skip
    return z


@activate_uvqk.register_fake
def _(y: Tensor, v_dim: int, qk_dim: int, keep_u: bool) -> Tensor:
    wide = 2 * (v_dim + qk_dim)
    return y.new_empty(y.shape[0], y.shape[1] // wide, wide - (0 if keep_u else v_dim))


@op("genrec::merge_uvqk")
def merge_uvqk(du: Tensor, dv: Tensor, dq: Tensor, dk: Tensor, y: Tensor | None) -> Tensor:
    """The gradient of the projection from those of its parts.

    Args:
        du: (T, H, Dv), with respect to u before its SiLU.
        dv: (T, H, Dv); dq, dk: (T, H, Dqk). Any strides, one dtype.
        y: (T, H * (2 Dv + 2 Dqk)), the projection, where v, q and k went through SiLU; else None.

    Returns:
        (T, H * (2 Dv + 2 Dqk)), contiguous.
    """
    check("merge_uvqk", du, dv, dq, dk, y)
    rows, heads, v_dim = dv.shape
    qk_dim = dq.shape[2]
    dy = dv.new_empty(rows, heads * 2 * (v_dim + qk_dim))
    if dy.numel() == 0:
        return dy
    block, v_columns, warps = tile(v_dim)
    qk_columns = tile(qk_dim)[1]
    with on_device(dv):
        _merge[(triton.cdiv(rows, block), heads)](
            du, dv, dq, dk, y, dy, rows, dy.shape[1], v_dim, qk_dim,
            *du.stride(), *dv.stride(), *dq.stride(), *dk.stride(), *((0, 0) if y is None else y.stride()),
            SILU=y is not None, ROWS=block, V_COLS=v_columns, QK_COLS=qk_columns, num_warps=warps,
        )  # fmt: skip
    return dy


@merge_uvqk.register_fake
def _(du: Tensor, dv: Tensor, dq: Tensor, dk: Tensor, y: Tensor | None) -> Tensor:
    return dv.new_empty(dv.shape[0], dv.shape[1] * 2 * (dv.shape[2] + dq.shape[2]))


class SplitActivated(torch.autograd.Function):
    """u, v, q, k of a projection: u before its SiLU, and SiLU on the others or on none of them.

    An autograd function and not one op: its results are views of one tensor, which an op's may not be.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v_dim: int, qk_dim: int, silu: bool, keep_u: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts, (T, H, Dv) or (T, H, Dqk), with contiguous columns."""
        ctx.save_for_backward(y if silu else None)
        whole = y.detach().unflatten(-1, (-1, 2 * (v_dim + qk_dim)))
        parts = [v_dim, v_dim, qk_dim, qk_dim]
        if not silu:
            u, v, q, k = whole.split(parts, -1)
            return u, v, q, k
        z = activate_uvqk(y, v_dim, qk_dim, keep_u)
        if keep_u:
            u, v, q, k = z.split(parts, -1)
        else:
            u = whole[..., :v_dim]
            v, q, k = z.split(parts[1:], -1)
        return u, v, q, k

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """(d projection, None, ...)."""
        (y,) = ctx.saved_tensors
        return merge_uvqk(*gradients, y), None, None, None, None
