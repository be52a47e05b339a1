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
from genrec.layers.triton._launch import check, loop, on_device, tile


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
    """One of the four parts of `_merge`, columns [base, base + dim) of a head; what it wrote, zeros beyond."""
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
    return d


@triton.jit
def _store_sum(sums_ptr, total, at, dim, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(sums_ptr + at + col, tl.sum(total, 0), mask=col < dim)


@triton.jit
def _merge(du, dv, dq, dk, y, dy, sums, rows, width, v_dim, qk_dim, u_row, u_head, u_col, v_row, v_head, v_col,
           q_row, q_head, q_col, k_row, k_head, k_col, sy_row, sy_col,
           SILU: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, V_COLS: tl.constexpr,
           QK_COLS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dy from its parts; with SUMS also this program's sums over its rows, (programs, width). du may be None: there
    already, and its sums too."""
    program, head = tl.program_id(0), tl.program_id(1)
    wide = 2 * (v_dim + qk_dim)
    u_sum = tl.zeros([ROWS, V_COLS], tl.float32)
    v_sum = tl.zeros([ROWS, V_COLS], tl.float32)
    q_sum = tl.zeros([ROWS, QK_COLS], tl.float32)
    k_sum = tl.zeros([ROWS, QK_COLS], tl.float32)
    for block in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        if du is not None:
            u = _merge_part(du, u_row, u_head, u_col, y, dy, row, rows, head, wide, 0, v_dim, sy_row, sy_col, width,
                            False, V_COLS)  # fmt: skip
            if SUMS:
                u_sum += u
        v = _merge_part(dv, v_row, v_head, v_col, y, dy, row, rows, head, wide, v_dim, v_dim, sy_row, sy_col, width,
                        SILU, V_COLS)  # fmt: skip
        q = _merge_part(dq, q_row, q_head, q_col, y, dy, row, rows, head, wide, 2 * v_dim, qk_dim, sy_row, sy_col,
                        width, SILU, QK_COLS)  # fmt: skip
        k = _merge_part(dk, k_row, k_head, k_col, y, dy, row, rows, head, wide, 2 * v_dim + qk_dim, qk_dim, sy_row,
                        sy_col, width, SILU, QK_COLS)  # fmt: skip
        if SUMS:
            v_sum += v
            q_sum += q
            k_sum += k
    if SUMS:
        at = program.to(tl.int64) * width + head * wide
        if du is not None:
            _store_sum(sums, u_sum, at, v_dim, V_COLS)
        _store_sum(sums, v_sum, at + v_dim, v_dim, V_COLS)
        _store_sum(sums, q_sum, at + 2 * v_dim, qk_dim, QK_COLS)
        _store_sum(sums, k_sum, at + 2 * v_dim + qk_dim, qk_dim, QK_COLS)


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
    block, columns, warps = tile(min(wide - first, 1024), per_thread=32)
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
def merge_uvqk(du: Tensor, dv: Tensor, dq: Tensor, dk: Tensor, y: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """The gradient of the projection from those of its parts, and its sum over the rows.

    Args:
        du: (T, H, Dv), with respect to u before its SiLU.
        dv: (T, H, Dv); dq, dk: (T, H, Dqk). Any strides, one dtype.
        y: (T, H * (2 Dv + 2 Dqk)), the projection, where v, q and k went through SiLU; else None.
        sums: The gradient of the projection's bias is wanted as well.

    Returns:
        (T, H * (2 Dv + 2 Dqk)), contiguous; and with `sums` its sum over T in fp32, else nothing, (0,).
    """
    check("merge_uvqk", du, dv, dq, dk, y)
    dy = dv.new_empty(dv.shape[0], dv.shape[1] * 2 * (dv.shape[2] + dq.shape[2]))
    return dy, _merge_into(dy, du, dv, dq, dk, y, sums)


def _merge_into(dy: Tensor, du: Tensor | None, dv: Tensor, dq: Tensor, dk: Tensor, y: Tensor | None,
                sums: bool) -> Tensor:  # fmt: skip
    """Fills dy, but for the part of a du that is None, and returns its sums, where that part is not set either."""
    rows, heads, v_dim = dv.shape
    qk_dim = dq.shape[2]
    width, read = max(v_dim, qk_dim), 3 if y is None else 6
    if du is None:  # 0.62 ms in the place of 0.72
        cut = loop(dv, width, heads, read, 16, 32, programs=6, most_stages=3)
    else:
        cut = loop(dv, width, heads, read + 1, 8, 64)
    v_columns, qk_columns = tile(v_dim)[1], tile(qk_dim)[1]
    partial = dv.new_empty(cut.programs if sums else 0, dy.shape[1], dtype=torch.float32)
    if dy.numel() == 0:
        partial.zero_()
    else:
        with on_device(dv):
            _merge[(cut.programs, heads)](
                du, dv, dq, dk, y, dy, partial, rows, dy.shape[1], v_dim, qk_dim,
                *((0, 0, 0) if du is None else du.stride()), *dv.stride(), *dq.stride(), *dk.stride(),
                *((0, 0) if y is None else y.stride()),
                SILU=y is not None, SUMS=sums, ROWS=cut.rows, V_COLS=v_columns, QK_COLS=qk_columns, STAGES=cut.stages,
                num_warps=cut.warps,
            )  # fmt: skip
    return partial.sum(0) if sums else partial.flatten()


@merge_uvqk.register_fake
def _(du: Tensor, dv: Tensor, dq: Tensor, dk: Tensor, y: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    width = dv.shape[1] * 2 * (dv.shape[2] + dq.shape[2])
    return dv.new_empty(dv.shape[0], width), dv.new_empty(width if sums else 0, dtype=torch.float32)


class BiasGradient:
    """Brings the gradient of the projection's bias from `SplitActivated`, where it is nearly free, to `Projection`."""

    def __init__(self) -> None:
        self._found: tuple[int, Tensor] | None = None

    def put(self, dy: Tensor, sums: Tensor) -> None:
        """`sums` are those of dy."""
        self._found = dy.data_ptr(), sums

    def take(self, dy: Tensor) -> Tensor:
        """The sum of dy over its rows."""
        found, self._found = self._found, None
        return found[1] if found is not None and found[0] == dy.data_ptr() else dy.sum(0)


class GradientRoom:
    """The gradient of the projection before it is whole: the gate's backward kernel, the first to run, makes it and
    writes the part of u where `SplitActivated` wants it, two passes over memory less than if that had to move it."""

    def __init__(self, width: int, sums: bool) -> None:
        self._width, self.sums = width, sums
        self._made: tuple[Tensor, Tensor, int] | None = None

    def make(self, u: Tensor) -> Tensor:
        """Room for the gradient of u, (T, H, Dv), with that of v, q, k behind each head's."""
        whole = u.new_empty(u.shape[0], self._width)
        return whole.unflatten(1, (u.shape[1], -1))[..., : u.shape[2]]

    def put(self, du: Tensor, sums: Tensor) -> None:
        """du, filled, is what `make` gave; `sums` are partial ones over rows, (n, H, Dv), where they are wanted."""
        self._made = du, sums, du._version

    def take(self, du: Tensor) -> tuple[Tensor, Tensor] | None:
        """(the whole, partial sums) where the gradient has come through unchanged, else None."""
        made, self._made = self._made, None
        if made is None or (made[0].data_ptr(), made[0].shape, made[0].stride(), made[2]) != (
            du.data_ptr(), du.shape, du.stride(), du._version
        ):  # fmt: skip
            return None
        return du.as_strided((du.shape[0], self._width), (self._width, 1)), made[1]


class Projection(torch.autograd.Function):
    """x @ weight^T + bias as nn.Linear computes it, whose bias takes its gradient from a `BiasGradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gradient: BiasGradient) -> Tensor:
        """x: (T, D); weight: (width, D) and bias: (width,), of x's dtype or wider (autocast's parameters)."""
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return torch.nn.functional.linear(x, weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """(dx, dweight, dbias, None)."""
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            dy @ weight if wanted[0] else None,
            dy.t() @ x if wanted[1] else None,
            ctx.gradient.take(dy) if wanted[2] else None,
            None,
        )


class SplitActivated(torch.autograd.Function):
    """u, v, q, k of a projection: u before its SiLU, and SiLU on the others or on none of them.

    An autograd function and not one op: its results are views of one tensor, which an op's may not be.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        v_dim: int,
        qk_dim: int,
        silu: bool,
        keep_u: bool,
        bias: BiasGradient | None = None,
        room: GradientRoom | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts, (T, H, Dv) or (T, H, Dqk), with contiguous columns."""
        ctx.bias, ctx.room = bias, room
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
        du, dv, dq, dk = gradients
        found = None if ctx.room is None else ctx.room.take(du)
        if found is None:
            dy, sums = merge_uvqk(du, dv, dq, dk, y, ctx.bias is not None)
        else:
            check("merge_uvqk", *gradients, y)
            dy, partial = found
            sums = _merge_into(dy, None, dv, dq, dk, y, ctx.bias is not None)
            if ctx.bias is not None:
                torch.sum(partial, 0, out=sums.unflatten(0, (du.shape[1], -1))[:, : du.shape[2]])
        if ctx.bias is not None:
            ctx.bias.put(dy, sums)
        return dy, *[None] * 6
