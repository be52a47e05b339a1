"""The `torch` backend: every feature of the op on every device, in plain PyTorch; the reference for the others.

It is also what trains on a CPU, so it is written for speed there: sequences of like lengths are padded together in
tiles that fit the cache (`_tiles`), each tile is a few matrix products and fused element-wise passes, the mask is
folded into the bias, and gradients are written by hand. 16-bit inputs are computed in fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from genrec.attention._tiles import Group, Plan, Tile, plan_for
from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias

HIDDEN = -1e30
"""Added to a score that the mask hides: SiLU and its derivative are then exactly zero."""
SAVED_ELEMENTS = 2**23
"""Scores that one call keeps for its backward pass; larger batches compute them again."""


class TorchBackend:
    """Plain PyTorch on any device, fp64 to bf16, with every mask, bias and option of the op."""

    name = "torch"

    def available(self) -> str | None:
        """None: it runs wherever PyTorch does."""
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        """None for every floating-point dtype."""
        return None if spec.dtype.is_floating_point else f"dtype {spec.dtype} is not a floating-point one"

    @torch.compiler.disable
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        mask: AttentionMask | Tensor,
        bias: Tensor | RelativeBias | None,
        alpha: float,
        scale: float | Tensor,
        dropout: float,
        seed: int | None,
        deterministic: bool,
    ) -> Tensor:
        """As `AttentionBackend.__call__`.

        Raises:
            ValueError: A sequence has fewer keys than queries.
        """
        plan = plan_for(q_offsets, kv_offsets, mask, bias, q.shape[1])
        relative = bias if isinstance(bias, RelativeBias) else None
        call = _Call(plan, alpha, scale, dropout, seed, deterministic)
        return _Attention.apply(
            call, q, k, v,
            None if relative is None else relative.position_weight,
            None if relative is None else relative.time_weight,
            bias if isinstance(bias, Tensor) else None,
        )  # type: ignore[no-any-return]  # fmt: skip


@dataclass(frozen=True)
class _Call:
    plan: Plan
    alpha: float
    scale: float | Tensor
    dropout: float
    seed: int | None
    deterministic: bool

    def generator(self) -> torch.Generator | None:
        """Seeded anew in each pass, so that backward draws what forward drew."""
        if self.dropout == 0.0:
            return None
        assert self.seed is not None
        return torch.Generator(self.plan.device).manual_seed(self.seed)

    def factor(self, group: Group) -> float | Tensor:
        """Scale of a group, to multiply (b, H, q_len, Dv)."""
        if isinstance(self.scale, Tensor):
            return self.scale[group.members][:, None, None, None]
        return self.scale


@dataclass(frozen=True)
class _Tables:
    """The bias in the dtype of the computation."""

    position: Tensor | None
    time: Tensor | None
    """(num_buckets + 1,): the last entry hides."""
    dense: Tensor | None

    @staticmethod
    def of(position: Tensor | None, time: Tensor | None, dense: Tensor | None, dtype: torch.dtype) -> _Tables:
        """Tables for scores of `dtype`."""
        if time is not None:
            time = torch.cat([time.to(dtype), time.new_full((1,), HIDDEN, dtype=dtype)])
        return _Tables(None if position is None else position.to(dtype), time, dense)

    def add_to(self, scores: Tensor, plan: Plan, group: Group, tile: Tile) -> None:
        """Adds bias and mask to the (b, H, rows, cols) scores of a tile."""
        base: Tensor | None = None
        if self.time is not None:
            index = plan.index(group, tile)
            base = self.time.index_select(0, index.view(-1)).view(index.shape)
        if self.time is None or plan.hidden_by_head():
            hidden = plan.hidden(group, tile)
            if hidden.dim() == 4:
                scores.masked_fill_(hidden, HIDDEN)
            else:
                base = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, HIDDEN)
        if self.position is not None:
            first, count = self.reach(group, tile, self.position)
            cols = tile.col1 - tile.col0
            toeplitz = self.position[first : first + count].unfold(0, cols, 1).flip(0)
            base = toeplitz.expand(scores.shape[0], -1, -1) if base is None else base.add_(toeplitz)
        if base is not None:
            scores.add_(base[:, None])
        if self.dense is not None:
            for local, sequence, inside, outside in plan.windows(group, tile):
                part = self.dense[(sequence, slice(None), *outside)].to(scores.dtype)
                scores[(local, slice(None), *inside)] += part

    @staticmethod
    def reach(group: Group, tile: Tile, position: Tensor) -> tuple[int, int]:
        """The entries of the position table that a tile uses: the first one, for its last row and first column."""
        rows, cols = tile.row1 - tile.row0, tile.col1 - tile.col0
        middle = (position.numel() - 1) // 2
        return middle + group.q_len - group.kv_len + tile.col0 - (tile.row1 - 1), rows + cols - 1


class _Attention(torch.autograd.Function):
    """Forward and backward, group by group and tile by tile."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: _Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        dense: Tensor | None,
    ) -> Tensor:
        plan, dtype = call.plan, _compute_dtype(q.dtype)
        keep = any(ctx.needs_input_grad) and plan.elements <= SAVED_ELEMENTS
        saved: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            tables, generator = _Tables.of(position, time, dense, dtype), call.generator()
            out = torch.zeros(q.shape[0] * q.shape[1], v.shape[2], dtype=v.dtype, device=v.device)
            for group in plan.groups:
                padded = _Padded(call, group, q, k, v, dtype)
                result = torch.empty(*padded.q.shape[:2], v.shape[2], dtype=dtype, device=v.device)
                for tile in group.tiles:
                    scores = padded.scores(tables, tile)
                    weights = F.silu(scores, inplace=not keep)
                    if keep:
                        saved.append(scores)
                    if generator is not None:
                        weights.mul_(_kept(weights, call.dropout, generator))
                    result[:, tile.row0 : tile.row1] = torch.bmm(weights, padded.v[:, tile.col0 : tile.col1])
                _scatter(out, padded.by_sequence(result).mul_(call.factor(group)), group.q_rows, group.q_kept)
        ctx.call, ctx.kept = call, len(saved)
        ctx.save_for_backward(q, k, v, position, time, dense, *saved)
        return out.view(q.shape[0], q.shape[1], v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, dense, *saved = ctx.saved_tensors
        call: _Call = ctx.call
        dtype = _compute_dtype(q.dtype)
        gradients = _Gradients(q, k, v, position, time, dense, dtype, call.deterministic, ctx.needs_input_grad[1:])
        with torch.autocast(q.device.type, enabled=False):
            tables, generator = _Tables.of(position, time, dense, dtype), call.generator()
            scores_of = iter(saved)
            for group in call.plan.groups:
                padded = _Padded(call, group, q, k, v, dtype)
                d_padded = padded.by_sequence(_gather(d_out, group.q_rows, group.q_len, dtype))
                d_padded = d_padded.mul_(call.factor(group)).flatten(0, 1)
                dq = torch.empty_like(padded.q)
                dk, dv = torch.zeros_like(padded.k), torch.zeros_like(padded.v)
                for tile in group.tiles:
                    rows, cols = slice(tile.row0, tile.row1), slice(tile.col0, tile.col1)
                    scores = next(scores_of) if ctx.kept else padded.scores(tables, tile)
                    weights = F.silu(scores)
                    d_weights = torch.bmm(d_padded[:, rows], padded.v[:, cols].transpose(1, 2))
                    if generator is not None:
                        kept = _kept(weights, call.dropout, generator)
                        weights.mul_(kept)
                        d_weights.mul_(kept)
                    dv[:, cols] += torch.bmm(weights.transpose(1, 2), d_padded[:, rows])
                    d_scores = torch.ops.aten.silu_backward(d_weights, scores)
                    dq[:, rows] = torch.bmm(d_scores, padded.k[:, cols])
                    dk[:, cols] += torch.bmm(d_scores.transpose(1, 2), padded.q[:, rows])
                    gradients.add_bias(padded.by_sequence(d_scores), call.plan, group, tile)
                gradients.add(group, dq.mul_(call.alpha), dk, dv)
        return None, *gradients.results()


class _Padded:
    """q (times alpha), k and v of a group, (b * H, length, D)."""

    def __init__(self, call: _Call, group: Group, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self.plan, self.group = call.plan, group
        self.q = _gather(q, group.q_rows, group.q_len, dtype).mul_(call.alpha)
        self.k = _gather(k, group.kv_rows, group.kv_len, dtype)
        self.v = _gather(v, group.kv_rows, group.kv_len, dtype)

    def by_sequence(self, x: Tensor) -> Tensor:
        """(b * H, ...) as (b, H, ...)."""
        return x.view(len(self.group.sequences), -1, *x.shape[1:])

    def scores(self, tables: _Tables, tile: Tile) -> Tensor:
        """(b * H, rows, cols): alpha <q, k> + bias, very negative where hidden."""
        keys = self.k[:, tile.col0 : tile.col1].transpose(1, 2)
        scores = torch.bmm(self.q[:, tile.row0 : tile.row1], keys)
        tables.add_to(self.by_sequence(scores), self.plan, self.group, tile)
        return scores


class _Gradients:
    """Accumulates the gradients of all inputs over groups and tiles."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        dense: Tensor | None,
        dtype: torch.dtype,
        deterministic: bool,
        needed: tuple[bool, ...],
    ) -> None:
        self.inputs, self.needed = (q, k, v, position, time, dense), needed
        self.rows = [
            torch.zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=x.dtype, device=x.device) for x in (q, k, v)
        ]
        self.position = None if position is None or not needed[3] else torch.zeros_like(position, dtype=dtype)
        self.time = None
        if time is not None and needed[4]:
            # Many small terms fall into one bucket: their sum needs the digits.
            self.time = torch.zeros(time.numel() + 1, dtype=torch.float64, device=time.device)
        self.dense = None if dense is None or not needed[5] else torch.zeros_like(dense)
        self.sort = deterministic and q.is_cuda

    def add(self, group: Group, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """The rows of a group."""
        _scatter(self.rows[0], dq, group.q_rows, group.q_kept)
        _scatter(self.rows[1], dk, group.kv_rows, group.kv_kept)
        _scatter(self.rows[2], dv, group.kv_rows, group.kv_kept)

    def add_bias(self, d_scores: Tensor, plan: Plan, group: Group, tile: Tile) -> None:
        """What a tile's (b, H, rows, cols) gradient of the scores gives to the bias."""
        if self.dense is not None:
            for local, sequence, inside, outside in plan.windows(group, tile):
                part = d_scores[(local, slice(None), *inside)]
                part = part if self.dense.shape[1] > 1 else part.sum(0, keepdim=True)
                self.dense[(sequence, slice(None), *outside)] = part.to(self.dense.dtype)
        if self.position is None and self.time is None:
            return
        both = d_scores.sum(1) if d_scores.shape[1] > 1 else d_scores[:, 0]
        if self.time is not None:
            index, terms = plan.index(group, tile).view(-1), both.reshape(-1).double()
            if self.sort:
                self.time.index_put_((index.long(),), terms, accumulate=True)
            else:
                self.time += torch.bincount(index, terms, self.time.numel())
        if self.position is not None:
            first, count = _Tables.reach(group, tile, self.position)
            self.position[first : first + count] += _diagonal_sums(both.sum(0))

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs; None where none is needed."""
        found = [rows.view(x.shape) for rows, x in zip(self.rows, self.inputs[:3], strict=True) if x is not None]
        position, time = self.inputs[3], self.inputs[4]
        tables = [
            None if self.position is None or position is None else self.position.to(position.dtype),
            None if self.time is None or time is None else self.time[:-1].to(time.dtype),
            self.dense,
        ]
        return tuple(g if need else None for g, need in zip([*found, *tables], self.needed, strict=True))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _gather(x: Tensor, rows: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(T, H, D) -> (b * H, length, D)."""
    return x.flatten(0, 1).index_select(0, rows).view(-1, length, x.shape[2]).to(dtype)


def _scatter(into: Tensor, padded: Tensor, rows: Tensor, kept: Tensor | None) -> None:
    """Puts the rows of (..., length, D) that are no padding into (T * H, D)."""
    flat = padded.view(-1, into.shape[1])
    if kept is not None:
        flat, rows = flat.index_select(0, kept), rows.index_select(0, kept)
    into.index_copy_(0, rows, flat.to(into.dtype))


def _kept(like: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """0 with probability `dropout`, else 1 / (1 - dropout)."""
    # On a CPU uniform numbers come several times faster than Bernoulli ones.
    return torch.empty_like(like).uniform_(generator=generator).ge_(dropout).div_(1 - dropout)


def _diagonal_sums(x: Tensor) -> Tensor:
    """(rows, cols) -> (rows + cols - 1,): sums along the diagonals, from the last row's first entry on.

    Rows flipped and padded to rows + cols, the flat matrix read with rows one shorter has each diagonal in a column.
    """
    rows, cols = x.shape
    wide = F.pad(x.flip(0), (0, rows))
    return wide.view(-1)[: rows * (rows + cols - 1)].view(rows, rows + cols - 1).sum(0)
