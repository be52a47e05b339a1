"""What the launches of all kernels share: tile sizes, the number of programs, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from triton import knobs

MAX_WIDTH = 16384
"""Widest row that a program holds in registers; the documented limit of hidden sizes is half of it."""

STAGES = 2
"""Row blocks that a backward kernel's program has under way: it loads the next while it works on one."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tile(width: int, per_thread: int = 16, max_rows: int = 64) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that holds whole rows of `width`; columns are a power of two.

    Four warps, more for wide rows. A thread holds `per_thread` elements of each tensor of the tile in registers: 16, or
    8 (one 16 byte load of 16 bit numbers) in kernels that hold up to ten such tensors and should still leave room for
    several programs on each multiprocessor.
    """
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, min(max_rows, 128 * per_thread // columns))
    warps = max(1, min(16, rows * columns // (32 * per_thread)))
    return rows, columns, warps


def programs_for(x: Tensor, blocks: int, groups: int, sums: bool) -> int:
    """Programs that share `blocks` row blocks. Where each has sums of its own to store, no more than run at a time."""
    return max(1, min(blocks, -(-_processors(x.device) * 4 // groups))) if sums else max(1, blocks)


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
