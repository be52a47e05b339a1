"""What the launches of all kernels share: tile sizes, the number of programs, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs

MAX_WIDTH = 16384
"""Widest row that a program holds in registers; the documented limit of hidden sizes is half of it."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tile(width: int, per_thread: int = 16, threads: int = 128) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that holds whole rows of `width`; columns are a power of two.

    `threads`, more for wide rows, hold `per_thread` elements of each tensor of the tile in registers.
    """
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, min(64, threads * per_thread // columns))
    warps = max(1, min(16, rows * columns // (32 * per_thread)))
    return rows, columns, warps


_PROGRAMS = 4
"""Programs of a `loop` on each multiprocessor."""

_UNDER_WAY = 48 * 1024
"""Bytes of shared memory for what such a program loads ahead."""


class Loop(NamedTuple):
    """How the programs of a kernel share its rows: block after block, the next ones loaded while they work on one.

    Without that a program waits for memory, then memory for the program: a third of its speed was lost.
    """

    rows: int
    """Of a block."""
    columns: int
    warps: int
    stages: int
    """Blocks under way."""
    programs: int
    """For each group of columns."""


def loop(
    x: Tensor,
    width: int,
    groups: int,
    tensors: int,
    per_thread: int,
    threads: int,
    programs: int = _PROGRAMS,
    most_stages: int = 4,
) -> Loop:
    """A loop over the rows of `x` by blocks of `width` columns, of which a program reads `tensors` like x."""
    rows, columns, warps = tile(width, per_thread, threads)
    stages = max(1, min(most_stages, _UNDER_WAY // (tensors * rows * columns * x.element_size())))
    programs = max(1, min(-(-x.shape[0] // rows), -(-_processors(x.device) * programs // groups)))
    return Loop(rows, columns, warps, stages, programs)


def three_at_once(warps: int) -> dict[str, int]:
    """Launch options with which three programs of four warps fit a multiprocessor, where a kernel just misses that."""
    return {"maxnreg": 168} if warps == 4 and not knobs.runtime.interpret else {}


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    # On the CPU (the interpreter) three, so that a program has several blocks even in small tests.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x."""
    away = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if away else nullcontext()


def check(name: str, *tensors: Tensor | None) -> None:
    """Dtypes and devices that the kernels know.

    Raises:
        TypeError: Another dtype.
        ValueError: Tensors on several devices.
    """
    present = [t for t in tensors if t is not None]
    for t in present:
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: the Triton kernels know fp32, bf16 and fp16, not {t.dtype}; use backend 'torch'.")
        if t.device != present[0].device:
            raise ValueError(f"{name}: tensors on {present[0].device} and {t.device}; move them to one device.")


def check_machine() -> None:
    """Raise where no kernel could run.

    Raises:
        ImportError: No NVIDIA or AMD GPU, and no interpreter either.
    """
    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        raise ImportError("there is no GPU (for tests, TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly)")
