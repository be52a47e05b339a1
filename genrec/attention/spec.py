"""What an attention call asks for: the mask, the bias, and the summary by which a backend is chosen.

The words are those of the HSTU paper (arXiv 2402.17152): a sequence is `contexts | history | targets`, jagged over
the batch. `N` below is the longest sequence of a batch, `T` the number of rows of all its sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

BUCKET_WIDTH = 0.301
"""Width of a time bucket in units of ln(seconds): each bucket reaches e^0.301 = 1.35 times as far as the one before."""

BiasKind = Literal["none", "dense", "relative"]


@dataclass(frozen=True)
class AttentionMask:
    """Which key each query row sees. All counts are of the key sequence `contexts | history | targets`.

    * Contexts, the first `num_contexts` rows, see all contexts and all history.
    * History rows see the contexts and, causally, history; with `window` w only history rows j with i - j <= w
      (and j - i <= w where `causal` is False).
    * Targets, the last `num_targets` rows, see contexts, history, and causally their own group of
      `target_group_size` targets; never another group.

    Args:
        num_contexts: (B,) integers or None for no contexts.
        num_targets: (B,) integers or None for no targets.
        target_group_size: Targets of one group follow each other: group g holds targets
            [g * size, (g + 1) * size). 2 makes an (item, action) pair one group.
        window: Reach of history rows into history, in rows; None for all of it.
        causal: False lets history rows see later history rows too.
    """

    num_contexts: Tensor | None = None
    num_targets: Tensor | None = None
    target_group_size: int = 1
    window: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if self.target_group_size < 1:
            raise ValueError(f"target_group_size must be at least 1, got {self.target_group_size}.")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be None or at least 0, got {self.window}.")


@dataclass(frozen=True)
class RelativeBias:
    """Relative position and time bias, shared by the heads (HSTU paper, section 3.2; its `rab^{p,t}`).

    bias_ij = position_weight[j - i + M - 1] + time_weight[bucket(t'_i - t_j)], with i and j counted in the key
    sequence and bucket as in `time_bucket`.

    Args:
        position_weight: (2M - 1,) with M >= the longest key sequence, or None for no position term.
        time_weight: (number of buckets,), or None for no time term.
        timestamps: (T_kv,) int64, seconds (or any unit) of each key row. Needed with `time_weight`.
        query_timestamps: (T_q,) int64, t' of each query row. None: the time of the next row of the same sequence,
            the last row's own, as in the paper (the model may know *when* it is asked).
    """

    position_weight: Tensor | None
    time_weight: Tensor | None
    timestamps: Tensor | None
    query_timestamps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.position_weight is None and self.time_weight is None:
            raise ValueError("RelativeBias needs position_weight, time_weight or both.")
        if self.position_weight is not None and (
            self.position_weight.dim() != 1 or self.position_weight.numel() % 2 == 0
        ):
            raise ValueError(f"position_weight must have shape (2M - 1,), got {tuple(self.position_weight.shape)}.")
        if self.time_weight is not None:
            if self.timestamps is None:
                raise ValueError("RelativeBias with time_weight needs timestamps.")
            if self.timestamps.dtype != torch.int64:
                raise TypeError(f"timestamps must be int64, got {self.timestamps.dtype}.")

    @property
    def max_positions(self) -> int | None:
        """M, the longest key sequence that `position_weight` covers; None without a position term."""
        return None if self.position_weight is None else (self.position_weight.numel() + 1) // 2


@lru_cache(maxsize=16)
def _bucket_edges(num_buckets: int) -> tuple[int, ...]:
    """Smallest integer distance of each bucket but the first, computed once in fp64."""
    edges = []
    for bucket in range(1, num_buckets):
        power = BUCKET_WIDTH * bucket
        # exp(43.668) is about 2^63: no int64 distance reaches farther, so later edges are never met.
        edges.append(math.ceil(math.exp(power)) if power < 43.668 else torch.iinfo(torch.int64).max)
    return tuple(edges)


def time_bucket_edges(num_buckets: int, device: torch.device | str = "cpu") -> Tensor:
    """(num_buckets - 1,) int64: distance d lies in bucket b when edges[b - 1] <= d < edges[b].

    Every backend buckets by these integers, so that all agree exactly.
    """
    return torch.tensor(_bucket_edges(num_buckets), dtype=torch.int64, device=device)


def time_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """trunc(ln(max(|d|, 1)) / 0.301), clamped to the table, exact for every int64 distance.

    Args:
        distance: int64, any shape: t'_i - t_j.
        num_buckets: Length of the time table.

    Returns:
        int64 bucket indices in [0, num_buckets), of the same shape.
    """
    # |int64 min| overflows, and int64 max would meet edges that stand for none; one less falls into the same bucket.
    largest = torch.iinfo(torch.int64).max - 1
    magnitude = distance.clamp(min=-largest, max=largest).abs()
    return torch.bucketize(magnitude, time_bucket_edges(num_buckets, distance.device), right=True)


@dataclass(frozen=True)
class AttentionSpec:
    """The facts about a call by which a backend says whether it can serve it. Hashable; holds no tensor."""

    device: str
    dtype: torch.dtype
    num_heads: int
    qk_dim: int
    v_dim: int
    bias: BiasKind = "none"
    contexts: bool = False
    targets: bool = False
    target_group_size: int = 1
    window: int | None = None
    causal: bool = True
    dense_mask: bool = False
    cached_keys: bool = False
    """True where keys and queries have their own offsets: new tokens against a key-value cache."""
    tensor_scale: bool = False
    dropout: float = 0.0
    capability: tuple[int, int] | None = None
    """CUDA compute capability, None off CUDA."""
    needs_grad: bool = False
    deterministic: bool = False
