"""The two halves of an HSTU layer around its attention, swappable by name: plain torch here, fused kernels elsewhere.

An implementation is an object with the two methods of `LayerOps`. It gets the layer's modules rather than their
weights, so that a tensor-parallel linear can stand where a plain one stood.

`genrec.parallel.parallelize` puts such modules there, and an implementation must serve them:

* It may read the parameters of a module whose type is exactly `nn.Linear`, `nn.LayerNorm` or
  `genrec.layers.hstu.HeadNorm`, and do its work itself. Any other module it calls: communication is inside.
* Both linears are others (Megatron's, returning one tensor). A norm over all heads is too; `HeadNorm` and, without
  sequence parallelism, the input's LayerNorm stay what they are. So the SiLU, the gate, the dropout, and those norms
  can be fused under tensor parallelism as without; what must not be is a norm or the residual into a linear's kernel.
* H is then the number of this rank's heads, in u, v, q, k and a. With sequence parallelism x and what `gated_output`
  returns have this rank's tokens alone; u, v, q, k and a have all of them. So T differs between x and u.
* Random numbers of dropout come from torch's default generator of the device or of the CPU, in the forward pass: the
  layer has them differ by rank, since every rank drops of other heads.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerOps(Protocol):
    """What a layer backend offers."""

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, v, q, k = split(silu(linear(norm(x)))), SiLU on all four or on u only.

        Args:
            x: (T, D).
            norm: (T, D) -> (T, D).
            linear: (T, D) -> (T, H * (2 Dv + 2 Dqk)), head-major: within a head u, v, q, k.
            widths: (Dv, Dqk).
            silu_all: SiLU on all of u, v, q, k (the paper) or on u alone (production).

        Returns:
            u, v: (T, H, Dv); q, k: (T, H, Dqk); the last dimension is contiguous.
        """
        ...

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
        """x + linear(dropout(u * norm(a))), or with `concat` x + linear(dropout([u, a, u * norm(a)])) in each head.

        Args:
            x: (T, D), the residual.
            a: (T, H, Dv), the attention's output.
            u: (T, H, Dv), the gate.
            norm: (T, H * Dv) -> (T, H * Dv).
            linear: (T, H * Dv) or (T, H * 3 Dv) -> (T, D), head-major.
            concat: The production form.
            dropout: Probability, applied where `training`.
            training: As nn.Module.training.
        """
        ...


class TorchLayerOps:
    """Plain torch, any device and dtype."""

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `LayerOps.norm_linear_silu`."""
        dv, dqk = widths
        y = linear(norm(x))
        y = (F.silu(y) if silu_all else y).unflatten(-1, (-1, 2 * dv + 2 * dqk))
        u, v, q, k = y.split([dv, dv, dqk, dqk], dim=-1)
        return (u if silu_all else F.silu(u)), v, q, k

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
        """As `LayerOps.gated_output`."""
        gated = u * norm(a.flatten(1)).view_as(a)
        y = torch.cat([u, a, gated], dim=-1) if concat else gated
        return x + linear(F.dropout(y.flatten(1), dropout, training))


# Name -> "module:Class", imported when asked for.
LAYER_BACKENDS: dict[str, str] = {"torch": "genrec.layers.ops:TorchLayerOps"}


def get_layer_ops(name: str) -> LayerOps:
    """The layer backend of that name.

    Raises:
        ValueError: No such backend, or it can't be loaded; the message says why.
    """
    if name not in LAYER_BACKENDS:
        raise ValueError(f"Unknown layer backend '{name}'. Known: {', '.join(LAYER_BACKENDS)}.")
    module, _, attribute = LAYER_BACKENDS[name].partition(":")
    try:
        return cast(LayerOps, getattr(importlib.import_module(module), attribute)())
    except ImportError as error:
        raise ValueError(f"Layer backend '{name}' can't be loaded: {error}. Choose 'torch'.") from error
