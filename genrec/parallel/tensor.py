"""The parts of an HSTU layer that a tensor-parallel rank holds: its heads, and what all ranks of the group share.

A rank holds a block of heads: their rows of f_1, their columns of f_2, their entries of the norm over A V. Three things
go across the heads, and therefore across the ranks: the norm's statistics, the sum that f_2 takes over the heads
(inside Megatron's linear), and the gradients of what all heads share. With sequence parallelism the tokens between two
layers are split over the group too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from genrec.attention import RelativeBias
from genrec.layers.hstu import RelativeBiasTables
from genrec.layers.tokens import TokenSequence

# torch 2.13 has new names for these two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...) of each rank -> (size * n, ...), in the order of the ranks; without a gradient."""
    everyone = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    _all_gather(everyone, x.contiguous(), group=group)
    return everyone


# Gradients of what all heads share ------------------------------------------------------------------------------------


class _SumGradient(torch.autograd.Function):
    """The input; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # A copy: others may read the gradient that came in.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, where each rank of the group goes on to use it in its own way: the gradient is the sum of theirs."""
    return _SumGradient.apply(x, group)  # type: ignore[no-any-return]


class SharedBiasTables(RelativeBiasTables):
    """`RelativeBiasTables` of which each rank uses whole copies with its own heads.

    Args:
        tables: Whose parameters these are.
        group: The tensor-parallel group.
    """

    def __init__(self, tables: RelativeBiasTables, group: ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.position_weight, self.time_weight, self.group = tables.position_weight, tables.time_weight, group

    def forward(self, tokens: TokenSequence) -> RelativeBias:
        """As `RelativeBiasTables.forward`."""
        bias = super().forward(tokens)
        tables = {
            name: sum_gradient(table, self.group)
            for name in ("position_weight", "time_weight")
            if (table := getattr(bias, name)) is not None
        }
        return replace(bias, **tables)


# The norm over all heads ----------------------------------------------------------------------------------------------


class _SplitNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) of rows whose columns are split evenly over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: ProcessGroup) -> Tensor:
        wide = x.to(_statistics_dtype(x))
        # Every rank's mean and variance, then those of all columns from them: as exact as two passes, in one message.
        own = torch.stack([wide.mean(-1), wide.var(-1, correction=0)])
        means, variances = gather_rows(own, group).unflatten(0, (-1, 2)).unbind(1)
        mean = means.mean(0)
        rstd = (variances.mean(0) + (means - mean).square().mean(0) + eps).rsqrt()
        y = ((wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).to(x.dtype)
        ctx.save_for_backward(x, mean, rstd)
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, mean, rstd = ctx.saved_tensors
        normed = (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        grad = grad.to(mean.dtype)
        means = torch.stack([grad.mean(-1), (grad * normed).mean(-1)])
        dist.all_reduce(means, group=ctx.group)
        along_one, along_normed = (means / dist.get_world_size(ctx.group)).unsqueeze(-1)
        return ((grad - along_one - normed * along_normed) * rstd.unsqueeze(-1)).to(x.dtype), None, None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype


class SplitLayerNorm(nn.Module):
    """LayerNorm over columns that are split evenly over a group.

    Args:
        weight: (columns of this rank,) or None.
        bias: As `weight`.
        eps: Added to the variance.
        group: The tensor-parallel group.
    """

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, eps: float, group: ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.group = weight, bias, eps, group

    def forward(self, x: Tensor) -> Tensor:
        """(T, columns of this rank) -> the same, normalised over the columns of all ranks."""
        y: Tensor = _SplitNorm.apply(x, self.eps, self.group)  # type: ignore[no-untyped-call]
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias


class SharedLayerNorm(nn.LayerNorm):
    """LayerNorm of which each rank sees other tokens, with sequence parallelism: its affine's gradients are summed.

    Args:
        norm: Whose parameters these are.
        group: The tensor-parallel group.
    """

    def __init__(self, norm: nn.LayerNorm, group: ProcessGroup) -> None:
        super().__init__(norm.normalized_shape, norm.eps, elementwise_affine=False)
        self.weight, self.bias, self.group = norm.weight, norm.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        weight = None if self.weight is None else sum_gradient(self.weight, self.group)
        bias = None if self.bias is None else sum_gradient(self.bias, self.group)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


# Random numbers -------------------------------------------------------------------------------------------------------


class HeadRandomness:
    """Hooks of a layer in whose forward pass each rank of the group draws random numbers of its own.

    The ranks of a group have one random state, so that dropout of what they all hold is the same dropout. All that a
    layer drops belongs to its heads, and each rank's heads are others: inside the layer the state is that of a seed
    that the ranks draw together and mix with their rank; after it, what it was.

    Args:
        group: The tensor-parallel group.
        active: Whether the layer drops anything in training.
    """

    def __init__(self, group: ProcessGroup, active: bool) -> None:
        self.group, self.active = group, active
        self._saved: list[tuple[Tensor, Tensor | None]] = []
        self._checked = False

    def enter(self, layer: nn.Module, inputs: Sequence[Any]) -> None:
        """Forward pre-hook.

        Raises:
            RuntimeError: The ranks of the group have other random states, or other batches.
        """
        if not (self.active and layer.training):
            return
        x: Tensor = inputs[0]
        seed = int(torch.randint(2**62, ()))
        if not self._checked:
            self._check(seed, x)
        self._saved.append((torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None))
        seed = (seed ^ (dist.get_rank(self.group) + 1) * 0x9E3779B97F4A7C15) & (2**63 - 1)
        torch.default_generator.manual_seed(seed)
        if x.is_cuda:
            with torch.cuda.device(x.device):
                torch.cuda.manual_seed(seed)

    def leave(self, layer: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        """Forward hook, also of a forward pass that failed."""
        if not self._saved:
            return
        host, device = self._saved.pop()
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, inputs[0].device)

    def _check(self, seed: int, x: Tensor) -> None:
        own = torch.tensor([seed, x.shape[0]], device=x.device)
        seeds, rows = gather_rows(own, self.group).view(-1, 2).T.tolist()
        if len(set(rows)) > 1:
            raise RuntimeError(
                f"The ranks of a tensor-parallel group read batches of {rows} tokens: give all of them the same batch, "
                "with samplers that count data-parallel ranks."
            )
        if len(set(seeds)) > 1:
            raise RuntimeError(
                "The ranks of a tensor-parallel group have different random states: seed them alike, with a seed that "
                "depends on the data-parallel rank alone."
            )
        self._checked = True


# Sequence parallel ----------------------------------------------------------------------------------------------------


class TokenSplit:
    """How the T tokens of a batch lie on the ranks between layers: blocks of ceil(T / size), the last ones padded.

    Args:
        group: The tensor-parallel group.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.total = 0

    @property
    def rows(self) -> int:
        """Tokens of a rank, padding included."""
        size = dist.get_world_size(self.group)
        return (self.total + size - 1) // size

    def padded(self, x: Tensor) -> Tensor:
        """(T, ...) -> (size * rows, ...)."""
        missing = self.rows * dist.get_world_size(self.group) - self.total
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def own(self, x: Tensor) -> Tensor:
        """(T, ...) -> (rows, ...), this rank's block."""
        return self.padded(x).narrow(0, dist.get_rank(self.group) * self.rows, self.rows).contiguous()

    def gathered(self, x: Tensor) -> Tensor:
        """(rows, ...) of each rank -> (T, ...)."""
        return gather_rows(x, self.group)[: self.total]

    def summed(self, x: Tensor) -> Tensor:
        """(T, ...) of each rank -> (rows, ...), this rank's block of their sum."""
        own = x.new_empty(self.rows, *x.shape[1:])
        _reduce_scatter(own, self.padded(x).contiguous(), group=self.group)
        return own

    def frozen(self) -> TokenSplit:
        """A copy that later batches don't change."""
        copy = TokenSplit(self.group)
        copy.total = self.total
        return copy


class _Move(torch.autograd.Function):
    """One of `TokenSplit`'s movements forward, and its transpose backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit, forward: str, backward: str) -> Tensor:
        ctx.split, ctx.backward_move = split.frozen(), backward
        return getattr(split, forward)(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return getattr(ctx.split, ctx.backward_move)(grad), None, None, None


def split_tokens(x: Tensor, split: TokenSplit) -> Tensor:
    """What every rank holds alike, (T, D) -> this rank's tokens, (rows, D)."""
    return _Move.apply(x, split, "own", "gathered")  # type: ignore[no-any-return]


def join_tokens(x: Tensor, split: TokenSplit) -> Tensor:
    """Each rank's tokens, (rows, D) -> all of them, (T, D), with which every rank does the same."""
    return _Move.apply(x, split, "gathered", "own")  # type: ignore[no-any-return]


def gather_tokens(x: Tensor, split: TokenSplit) -> Tensor:
    """Each rank's tokens, (rows, D) -> all of them, (T, D), with which every rank does its own."""
    return _Move.apply(x, split, "gathered", "summed")  # type: ignore[no-any-return]


def sum_tokens(x: Tensor, split: TokenSplit) -> Tensor:
    """Each rank's part of a sum, (T, D) -> the sum, at this rank's tokens, (rows, D)."""
    return _Move.apply(x, split, "summed", "gathered")  # type: ignore[no-any-return]
