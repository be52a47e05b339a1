# mypy: disable-error-code="no-untyped-def"
"""Dropout whose mask is a function of (seed, row, column) alone.

The mask is never stored: the backward pass draws it again, and neither tile sizes nor the number of programs change it.
Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with 7 rounds gives 128 bits for a counter;
8 neighbouring columns share them, 16 bits each. So a probability is a multiple of 2**-16, and the kept values are
scaled by the probability that is drawn, not by the one that was asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def threshold(dropout: float) -> int:
    """How many of the 2**16 values drop an element.

    Raises:
        ValueError: The probability is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    return min(round(dropout * 65536), 65535)


def new_seed(device: torch.device) -> Tensor:
    """(1,) int64 from the device's default generator; it stays on the device, so nothing waits."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


@triton.jit
def keep_mask(seed, first, stream, row, threshold, COLS: tl.constexpr):
    """[rows, COLS] bool: what stays.

    Args:
        seed: int64.
        first: The first column's number over 8.
        stream: Number of an independent mask of the same rows.
        row: [rows] int64, counted over the whole tensor.
        threshold: As from the function above.
        COLS: How many columns, a power of two and at least 16.
    """
    zero = tl.zeros([row.shape[0], COLS // 8], tl.int32)
    eight = first + tl.arange(0, COLS // 8)[None, :] + zero
    low = (row & 0xFFFFFFFF).to(tl.int32)[:, None] + zero
    high = (row >> 32).to(tl.int32)[:, None] + zero
    a, b, c, d = tl.philox(seed, eight, zero + stream, low, high, 7)
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    bits = tl.interleave(words & 0xFFFF, words >> 16)
    return bits.to(tl.int32) >= threshold
