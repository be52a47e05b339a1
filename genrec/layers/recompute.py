"""Tensors that the backward pass makes again instead of keeping: a middle way between all and `recompute`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

RECOMPUTABLE = ("norm", "silu", "gate")
"""What `HSTUConfig.layer_recompute` may name: the first projection's input, its output where SiLU follows on all of it,
and the input of the second projection."""


def check_recompute(names: Sequence[str]) -> tuple[str, ...]:
    """`names` without repetitions.

    Raises:
        ValueError: A name that is not in `RECOMPUTABLE`.
    """
    unknown = [name for name in names if name not in RECOMPUTABLE]
    if unknown:
        raise ValueError(
            f"layer_recompute knows {', '.join(RECOMPUTABLE)}; got {', '.join(map(repr, unknown))}. "
            "For whole layers set recompute."
        )
    return tuple(dict.fromkeys(names))


class Recomputed:
    """Stands in the graph for a tensor, and makes it again when the backward pass asks.

    Args:
        tensor: The tensor; this object does not hold it.
        again: Makes it again, bit by bit the same. It is called without gradients, under the autocast of now. It must
            not hold `tensor` either.
    """

    def __init__(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self._key = _identity(tensor)
        self._again = again
        self._kept: Tensor | None = None
        kind = tensor.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def saved(self) -> AbstractContextManager[object]:
        """What runs inside, with the tensor still alive, keeps this object instead of the tensor.

        Without effect where nothing is saved, and under torch.compile, whose own planning decides what is kept.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def look(self) -> Tensor:
        """The tensor, made again and kept for the graph's own question after this one."""
        if self._kept is None:
            self._kept = self._make()
        return self._kept

    def _make(self) -> Tensor:
        kind, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            return self._again()

    def _take(self, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        tensor, self._kept = self._kept, None
        return (self._make() if tensor is None else tensor).as_strided(shape, stride)

    def _pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        if tensor.numel() == 0 or _identity(tensor) != self._key:
            return tensor
        shape, stride = tensor.shape, tensor.stride()
        return lambda: self._take(shape, stride)


def _identity(tensor: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device


def _unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()
