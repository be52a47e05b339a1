"""Memory of lookup results, used again. A result of tens of megabytes that the system hands out anew each step costs
more in clearing its pages than in filling it."""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 20  # bytes; below, malloc keeps the memory itself
_KEPT = 6
_ALIGNMENT = 64

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32}


class BufferPool:
    """Blocks that are free again once the tensor over them is gone.

    At most six blocks wait for use; the largest are kept.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._loans: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor, as of torch.empty."""
        kind = np.dtype(_NUMPY[dtype])
        size = math.prod(shape) * kind.itemsize
        if size < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        start = -block.ctypes.data % _ALIGNMENT
        view = block[start : start + size].view(kind).reshape(shape)
        # The tensor keeps `view`, and nothing else does: when it goes, the block is free.
        key = id(view)
        self._loans[key] = (weakref.ref(view, lambda _: self._give_back(key)), block)
        return torch.from_numpy(view)

    def _take(self, size: int) -> np.ndarray:
        fitting = [i for i, block in enumerate(self._free) if size + _ALIGNMENT <= block.nbytes <= 4 * size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        # Batches differ a little in size: leave room, so that the next one fits too.
        return np.empty(size + size // 8 + _ALIGNMENT, dtype=np.uint8)

    def _give_back(self, key: int) -> None:
        _, block = self._loans.pop(key)
        self._free.append(block)
        if len(self._free) > _KEPT:
            self._free.pop(min(range(len(self._free)), key=lambda i: self._free[i].nbytes))


POOL = BufferPool()
