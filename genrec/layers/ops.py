"""What an HSTU model computes beside its attention, swappable by name: plain torch here, fused kernels elsewhere.

The two halves of a layer around its attention, and the tokens' way into the first one. An implementation is an object
with the methods of `LayerOps`. It gets the layer's modules rather than their
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
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genrec.layers.recompute import Recomputed, check_recompute

log = logging.getLogger(__name__)


class LayerOps(Protocol):
    """What a layer backend offers. Its constructor takes `recompute`, a sequence of names of `RECOMPUTABLE`."""

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, and u, v, q, k = split(silu(linear(norm(x)))), SiLU on all four or on u only.

        Args:
            x: (T, D).
            norm: (T, D) -> (T, D).
            linear: (T, D) -> (T, H * (2 Dv + 2 Dqk)), head-major: within a head u, v, q, k. It may return a pair, the
                result and a bias still to be added or None, as Megatron's linear layers do.
            widths: (Dv, Dqk).
            silu_all: SiLU on all of u, v, q, k (the paper) or on u alone (production).

        Returns:
            x as it came, for `gated_output` (the gradients of its two uses may then be added up where the norm's is
            computed); u, v: (T, H, Dv); q, k: (T, H, Dqk); the last dimension is contiguous. u is for the same
            implementation's `gated_output` alone: its SiLU may be left to that.
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
            x: (T, D), the residual, from `norm_linear_silu`.
            a: (T, H, Dv), the attention's output.
            u: (T, H, Dv), the gate, from `norm_linear_silu`.
            norm: (T, H * Dv) -> (T, H * Dv).
            linear: (T, H * Dv) or (T, H * 3 Dv) -> (T, D), head-major; it may return a pair.
            concat: The production form.
            dropout: Probability, applied where `training`.
            training: As nn.Module.training.
        """
        ...

    def place_rows(self, pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """One tensor of all rows: out[places[i]] = pool[i].

        Args:
            pool: (T_i, D) each, of one dtype.
            places: (T_i,) int64 each; together they name each of the sum of T_i rows once.
        """
        ...

    def take_rows(self, x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """x[places[i]] for each i; together the places name each row of x, (T, D), once."""
        ...

    def add_encodings(
        self, x: Tensor, scale: float, encodings: Sequence[tuple[Tensor, Tensor]], dropout: float, training: bool
    ) -> Tensor:
        """dropout(x * scale + the sum of weight[index]) over the encodings' (weight, index).

        Args:
            x: (T, D).
            scale: Of x.
            encodings: Up to two tables (rows, D), such as those of positions and of ages, each with (T,) int64 rows.
            dropout: Probability, applied where `training`.
            training: As nn.Module.training.
        """
        ...


def apply_linear(linear: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """linear(x), with the bias added that Megatron's linear layers may return beside the result."""
    y = linear(x)
    if isinstance(y, tuple):
        y, bias = y
        return y if bias is None else y + bias
    return y


class TorchLayerOps:
    """Plain torch, any device and dtype."""

    def __init__(self, recompute: Sequence[str] = ()) -> None:
        self.recompute = check_recompute(recompute)

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `LayerOps.norm_linear_silu`."""
        dv, dqk = widths
        note_use("torch")
        y = self._activated(x, norm, linear, silu_all).unflatten(-1, (-1, 2 * dv + 2 * dqk))
        u, v, q, k = y.split([dv, dv, dqk, dqk], dim=-1)
        return x, (u if silu_all else F.silu(u)), v, q, k

    def _activated(self, x: Tensor, norm: nn.Module, linear: nn.Module, silu_all: bool) -> Tensor:
        """linear(norm(x)), with `silu_all` after SiLU."""
        if not self.recompute:
            y = apply_linear(linear, norm(x))
            return F.silu(y) if silu_all else y

        def normalise() -> Tensor:
            normed = norm(x)
            # As autocast would, but here, so that what the projection keeps is the very tensor made again.
            enabled = torch.is_autocast_enabled(x.device.type) and normed.dtype != torch.float64
            return normed.to(torch.get_autocast_dtype(x.device.type)) if enabled else normed

        y, recomputed = project(normalise(), normalise, linear, "norm" in self.recompute, "silu" in self.recompute)
        if not silu_all:
            return y
        if recomputed is None:
            return F.silu(y)
        with recomputed.saved():
            return F.silu(y)

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

        def product_and_linear(a: Tensor, u: Tensor) -> Tensor:
            gated = u * norm(a.flatten(1)).view_as(a)
            y = torch.cat([u, a, gated], dim=-1) if concat else gated
            return apply_linear(linear, F.dropout(y.flatten(1), dropout, training))

        if "gate" in self.recompute and torch.is_grad_enabled():
            return x + checkpoint(product_and_linear, a, u, use_reentrant=False)
        return x + product_and_linear(a, u)

    def place_rows(self, pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As `LayerOps.place_rows`."""
        values = torch.cat(list(pool))
        return torch.empty_like(values).index_copy(0, torch.cat(list(places)), values)

    def take_rows(self, x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """As `LayerOps.take_rows`."""
        return [x.index_select(0, place) for place in places]

    def add_encodings(
        self, x: Tensor, scale: float, encodings: Sequence[tuple[Tensor, Tensor]], dropout: float, training: bool
    ) -> Tensor:
        """As `LayerOps.add_encodings`."""
        x = x if scale == 1.0 else x * scale
        for weight, index in encodings:
            x = x + F.embedding(index, weight)
        return F.dropout(x, dropout, training)


def project(
    normed: Tensor,
    normalise: Callable[[], Tensor],
    linear: Callable[[Tensor], Any],
    again_normed: bool,
    again_projected: bool,
) -> tuple[Tensor, Recomputed | None]:
    """(linear(normed), what stands for it in the graph where it is to be made again).

    Args:
        normed: The normalised input.
        normalise: Makes it again.
        linear: As in `LayerOps`.
        again_normed: Don't keep `normed` for the backward pass.
        again_projected: Don't keep the result for the backward pass of what follows.
    """
    source = Recomputed(normed, normalise) if again_normed else None
    if source is None:
        y = apply_linear(linear, normed)
        return y, Recomputed(y, partial(apply_linear, linear, normed)) if again_projected else None
    with source.saved():
        y = apply_linear(linear, normed)
    return y, Recomputed(y, lambda: apply_linear(linear, source.look())) if again_projected else None


SMALL = 32_768
"""Tokens below which "auto" takes plain torch, by default; see docs/performance.md."""


def small_batch() -> int:
    """Tokens below which "auto" takes plain torch: GENREC_LAYER_SMALL, else `SMALL`; 0 for never.

    Raises:
        ValueError: The variable holds no number.
    """
    said = os.environ.get("GENREC_LAYER_SMALL", str(SMALL))
    if not said.isdecimal():
        raise ValueError(f"GENREC_LAYER_SMALL must be a number of tokens, got '{said}'.")
    return int(said)


class AutoLayerOps:
    """The Triton kernels for tensors that they know on a GPU, plain torch for all else. Logs each choice once.

    A GPU is done with a small batch before Python has started the next kernel. There the fewest and cheapest launches
    win, and those are PyTorch's own: see `small_batch`. Compiled graphs take the kernels whatever the size, since a
    choice by size would split them.
    """

    def __init__(self, recompute: Sequence[str] = ()) -> None:
        self._small = small_batch()
        self._torch = TorchLayerOps(recompute)
        self._reason = why_not("triton")
        self._triton = None if self._reason else get_layer_ops("triton", recompute)

    def _choose(self, x: Tensor, rows: int | None = None) -> LayerOps:
        """For tokens x, (T, D), or so many rows like them."""
        reason = self._reason
        if not reason and not x.is_cuda:
            reason = f"the tokens are on the {x.device.type}"
        if not reason and x.dtype == torch.float64:
            reason = "its kernels don't know fp64"
        if not torch.compiler.is_compiling():
            if not reason and (x.shape[0] if rows is None else rows) < self._small:
                reason = f"batches of fewer than {self._small} tokens are faster without"
            _log_choice("torch" if reason else "triton", reason or "")
        return self._torch if reason or self._triton is None else self._triton

    def norm_linear_silu(
        self, x: Tensor, norm: nn.Module, linear: nn.Module, widths: tuple[int, int], silu_all: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `LayerOps.norm_linear_silu`."""
        return self._choose(x).norm_linear_silu(x, norm, linear, widths, silu_all)

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
        return self._choose(x).gated_output(x, a, u, norm, linear, concat, dropout, training)

    def place_rows(self, pool: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As `LayerOps.place_rows`."""
        return self._choose(pool[0], sum(part.shape[0] for part in pool)).place_rows(pool, places)

    def take_rows(self, x: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """As `LayerOps.take_rows`."""
        return self._choose(x).take_rows(x, places)

    def add_encodings(
        self, x: Tensor, scale: float, encodings: Sequence[tuple[Tensor, Tensor]], dropout: float, training: bool
    ) -> Tensor:
        """As `LayerOps.add_encodings`."""
        return self._choose(x).add_encodings(x, scale, encodings, dropout, training)


@lru_cache(maxsize=16)
def _log_choice(name: str, passed_over: str) -> None:
    """Logged once for each different choice."""
    log.info("Layer backend: %s%s", name, f" (not triton: {passed_over})" if passed_over else "")


# Name -> "module:Class", imported when asked for.
LAYER_BACKENDS: dict[str, str] = {
    "triton": "genrec.layers.triton:TritonLayerOps",
    "torch": "genrec.layers.ops:TorchLayerOps",
    "auto": "genrec.layers.ops:AutoLayerOps",
}

_used: defaultdict[str, set[str]] = defaultdict(set)


def note_use(name: str, *notes: str) -> None:
    """Keep for the run's report that backend `name` has served, and what it did how."""
    if not torch.compiler.is_compiling():
        _used[name].update(notes)


def layer_backends_used() -> dict[str, list[str]]:
    """Backends that served a layer since `forget_layer_use`, each with what it fused and what it left to a module."""
    return {name: sorted(notes) for name, notes in sorted(_used.items())}


def forget_layer_use() -> None:
    """Start `layer_backends_used` anew, as each run does."""
    _used.clear()


@dataclass(frozen=True)
class LayerBackendReport:
    """One line of `python -m genrec.backends`."""

    name: str
    reason: str | None
    """None where the backend can run here, else why not."""


def report() -> list[LayerBackendReport]:
    """A line for each layer backend but "auto", in the order in which "auto" tries them."""
    return [LayerBackendReport(name, why_not(name)) for name in LAYER_BACKENDS if name != "auto"]


def why_not(name: str) -> str | None:
    """None where layer backend `name` can run here, else the reason."""
    try:
        get_layer_ops(name)
    except ValueError as error:
        return str(error.__cause__ or error)
    return None


def get_layer_ops(name: str, recompute: Sequence[str] = ()) -> LayerOps:
    """The layer backend of that name.

    Args:
        name: "auto", "triton", "torch" or another of `LAYER_BACKENDS`.
        recompute: As `HSTUConfig.layer_recompute`.

    Raises:
        ValueError: No such backend, it can't be loaded, or not on this machine; the message says why.
    """
    if name not in LAYER_BACKENDS:
        raise ValueError(f"Unknown layer backend '{name}'. Known: {', '.join(LAYER_BACKENDS)}.")
    module, _, attribute = LAYER_BACKENDS[name].partition(":")
    try:
        return cast(LayerOps, getattr(importlib.import_module(module), attribute)(recompute=recompute))
    except ImportError as error:
        raise ValueError(f"Layer backend '{name}' can't be loaded: {error}. Choose 'torch' or 'auto'.") from error
