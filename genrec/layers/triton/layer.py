"""`TritonLayerOps`: the two halves of an HSTU layer with fused kernels around the layer's own linear modules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from triton import knobs

from genrec.layers.hstu import HeadNorm
from genrec.layers.ops import apply_linear, note_use, project
from genrec.layers.recompute import Recomputed, check_recompute
from genrec.layers.triton._launch import DTYPES, MAX_WIDTH, check_machine
from genrec.layers.triton.dropout import new_seed, threshold
from genrec.layers.triton.encodings import add_encodings
from genrec.layers.triton.gate import ROOM, gated_product
from genrec.layers.triton.norm import NormAndResidual, layer_norm
from genrec.layers.triton.rows import place_rows, take_rows
from genrec.layers.triton.silu import BiasGradient, GradientRoom, Projection, SplitActivated


class _PlainNorm(NamedTuple):
    """What the kernels need to know of a norm module."""

    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float


class TritonLayerOps:
    """Fused kernels for fp32, bf16 and fp16 on an NVIDIA GPU (or under TRITON_INTERPRET=1, for tests).

    Modules that are not what they were, such as a norm with statistics over several ranks, are called as they are, and
    only what is left around them is fused; `genrec.layers.ops.layer_backends_used` tells.

    Raises:
        ImportError: This machine can't run the kernels; the message says why.
    """

    def __init__(self, recompute: Sequence[str] = ()) -> None:
        check_machine()
        self.recompute = check_recompute(recompute)

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `LayerOps.norm_linear_silu`; u is returned as it is before its SiLU."""
        self._check(x)
        plain = plain_norm(norm, x.shape[1])
        if plain is None:
            note_use("triton", f"input norm: by {type(norm).__name__}")
            normalise = partial(norm, x)
            normed = norm(x)
        else:
            note_use("triton", "input norm: fused, with the residual's gradient")
            dtype = _result_dtype(x)
            normalise = partial(_normed, x, plain, dtype)
            x, normed = NormAndResidual.apply(x, *plain, dtype)
        # Where v, q, k stay views of the projection there is nothing to save by making it again.
        again = silu_all and "silu" in self.recompute
        bias = BiasGradient() if _is_plain(linear) else None
        projection = linear if bias is None else partial(_projected, linear, bias)
        y, recomputed = project(normed, normalise, projection, "norm" in self.recompute, again)
        room = None if torch.compiler.is_compiling() else GradientRoom(y.shape[1], bias is not None)
        with nullcontext() if recomputed is None else recomputed.saved():
            u, v, q, k = SplitActivated.apply(y, *widths, silu_all, recomputed is not None, bias, room)
        if room is not None:
            setattr(u, ROOM, room)
        return x, u, v, q, k

    def gated_output(
        self,
        x: Tensor,
        a: Tensor,
        u: Tensor,
        norm: nn.Module,
        linear: nn.Module,
        concat: bool,
        dropout: float,
        training: bool,
    ) -> Tensor:
        """As `LayerOps.gated_output`; u is taken as it is before its SiLU."""
        self._check(a)
        p = dropout if training and threshold(dropout) > 0 else 0.0
        seed = new_seed(a.device) if p > 0.0 else None
        plain = plain_norm(norm, a.shape[1] * a.shape[2])
        normed = None
        if plain is None:
            note_use("triton", f"gate: fused, its norm by {type(norm).__name__}")
            normed, plain = norm(a.flatten(1)), _PlainNorm(None, None, 1, 0.0)
        else:
            note_use("triton", "gate: fused with its norm")
        product = partial(_gated, a, u, normed, plain, seed, p, concat, _result_dtype(a))
        gated = product()
        if "gate" not in self.recompute:
            return x + apply_linear(linear, gated)
        with Recomputed(gated, product).saved():
            return x + apply_linear(linear, gated)

    def place_rows(self, pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As `LayerOps.place_rows`."""
        self._check(*pool)
        note_use("triton", "tokens: placed")
        dtype = reduce(torch.promote_types, (part.dtype for part in pool))
        return place_rows([part.to(dtype) for part in pool], list(places))

    def take_rows(self, x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """As `LayerOps.take_rows`."""
        self._check(x)
        return take_rows(x, list(places))

    def add_encodings(
        self, x: Tensor, scale: float, encodings: Sequence[tuple[Tensor, Tensor]], dropout: float, training: bool
    ) -> Tensor:
        """As `LayerOps.add_encodings`."""
        p = dropout if training and threshold(dropout) > 0 else 0.0
        if not encodings and scale == 1.0 and p == 0.0:
            return x
        self._check(x)
        note_use("triton", "tokens: encodings fused")
        tables, indices = [weight for weight, _ in encodings], [index for _, index in encodings]
        return add_encodings(x, tables, indices, new_seed(x.device) if p > 0.0 else None, scale, p)

    @staticmethod
    def _check(*tensors: Tensor) -> None:
        for x in tensors:
            if x.dtype not in DTYPES:
                raise TypeError(
                    f"Layer backend 'triton' knows fp32, bf16 and fp16, got {x.dtype}. Choose layer_backend 'torch' "
                    "or 'auto'."
                )
            if not x.is_cuda and not torch.compiler.is_compiling() and not knobs.runtime.interpret:
                raise ValueError(
                    f"Layer backend 'triton' needs tensors on a GPU, these are on {x.device}. Move the model and its "
                    "batches there, or choose layer_backend 'torch' or 'auto'."
                )


def plain_norm(norm: nn.Module, width: int) -> _PlainNorm | None:
    """The norm's parameters where the kernels do the same as the module; None where the module itself must be called.

    That is a LayerNorm over all `width` columns or a HeadNorm, exactly these classes and without hooks, up to 16384
    columns in a group.
    """
    if _has_hooks(norm):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if (weight is None) != (bias is None):
        return None
    if type(norm) is nn.LayerNorm and norm.normalized_shape == (width,) and width <= MAX_WIDTH:
        return _PlainNorm(weight, bias, 1, norm.eps)
    if type(norm) is HeadNorm and width % norm.dim == 0 and norm.dim <= MAX_WIDTH:
        return _PlainNorm(weight, bias, width // norm.dim, norm.eps)
    return None


def _is_plain(linear: nn.Module) -> bool:
    """Whether the projection is a plain one with a bias, whose gradient may be computed on the way."""
    # What is compiled may not tell itself things on the side.
    plain = type(linear) is nn.Linear and linear.bias is not None and not _has_hooks(linear)
    return plain and not torch.compiler.is_compiling()


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _projected(linear: nn.Module, gradient: BiasGradient, x: Tensor) -> Tensor:
    return Projection.apply(x, linear.weight, linear.bias, gradient)  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: _PlainNorm, dtype: torch.dtype) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.groups, norm.eps, dtype)[0]


def _gated(
    a: Tensor,
    u: Tensor,
    normed: Tensor | None,
    norm: _PlainNorm,
    seed: Tensor | None,
    dropout: float,
    concat: bool,
    dtype: torch.dtype,
) -> Tensor:
    return gated_product(a, u, normed, norm.weight, norm.bias, seed, norm.groups, norm.eps, dropout, concat, True,
                         dtype)[0]  # fmt: skip


def _result_dtype(x: Tensor) -> torch.dtype:
    """What the projection after it reads: under autocast its dtype at once, instead of fp32 and a conversion."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
