"""Negative items for the sampled softmax, and how often each is expected to be drawn."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

NegativeSampling = Literal["uniform", "popularity", "in_batch"]


class NegativeSampler(nn.Module):
    """Draws negative item ids, with replacement.

    * "uniform": every item alike.
    * "popularity": in proportion to given counts.
    * "in_batch": from the labels of the batch, hence by their popularity too, without counts.

    Args:
        num_items: V, the size of the catalogue.
        num_negatives: R, negatives of a row (or of all rows where they share them).
        sampling: How they are drawn.
        shared: One draw for all rows of a batch (one small product) or one for each row.
        counts: (V,) how often each item occurs, for "popularity" alone; kept in checkpoints. Items of count 0 are never
            drawn. None: `set_counts` gives them later.

    Raises:
        ValueError: An unknown sampling, or counts that don't fit.
    """

    counts: Tensor | None

    def __init__(
        self,
        num_items: int,
        num_negatives: int = 128,
        sampling: NegativeSampling = "uniform",
        shared: bool = True,
        counts: Tensor | None = None,
    ) -> None:
        super().__init__()
        if sampling not in ("uniform", "popularity", "in_batch"):
            raise ValueError(f"negative sampling must be uniform, popularity or in_batch, got '{sampling}'.")
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}.")
        self.num_items = num_items
        self.num_negatives = num_negatives
        self.sampling = sampling
        self.shared = shared
        by_count = sampling == "popularity"
        self.register_buffer("counts", torch.zeros(num_items, dtype=torch.float64) if by_count else None)
        self._cache: dict[torch.device, tuple[tuple[int, int], Tensor, Tensor]] = {}
        if by_count and counts is not None:
            self.set_counts(counts)

    @property
    def needs_counts(self) -> bool:
        """Whether it draws by popularity and has no counts yet."""
        return self.counts is not None and not bool(self.counts.any())

    def set_counts(self, counts: Tensor | None) -> None:
        """Give the counts.

        Raises:
            ValueError: None, another shape, negative ones, or all zero.
        """
        assert self.counts is not None
        if counts is None or counts.shape != (self.num_items,) or bool((counts < 0).any()) or not bool(counts.any()):
            raise ValueError(
                f"Sampling by popularity needs item_counts: ({self.num_items},) numbers >= 0, not all zero."
            )
        self.counts.copy_(counts)

    def _counts_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(V,) counts, none below that of the rarest item, and (V,) their running sum; kept for each device.

        Batches are prepared on the host while the buffer may be on a GPU.
        """
        assert self.counts is not None
        version = (self.counts._version, self.counts.data_ptr())
        if device not in self._cache or self._cache[device][0] != version:
            counts = self.counts.to(device)
            floor = counts[counts > 0].min() if bool(counts.any()) else counts.new_ones(())
            self._cache[device] = (version, counts.clamp(min=floor), counts.cumsum(0))
        return self._cache[device][1:]

    def sample(self, labels: Tensor) -> Tensor:
        """(R,) ids where rows share them, else (P, R), drawn from torch's default generator.

        Args:
            labels: (P,) the positive ids of the batch; "in_batch" draws from them.
        """
        shape = (self.num_negatives,) if self.shared else (labels.numel(), self.num_negatives)
        if self.sampling == "in_batch":
            if labels.numel() == 0:
                return labels.new_zeros(shape)
            return labels[torch.randint(labels.numel(), shape, device=labels.device)]
        if self.sampling == "uniform":
            return torch.randint(self.num_items, shape, device=labels.device)
        _, cumulative = self._counts_on(labels.device)
        point = torch.rand(shape, dtype=torch.float64, device=labels.device) * cumulative[-1]
        return torch.searchsorted(cumulative, point, right=True).clamp_(max=self.num_items - 1)

    def log_expected_count(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Log of R times the probability that a draw gives each of `ids`; fp32, of their shape.

        Args:
            ids: Item ids; ones that can't be drawn get the value of the rarest that can.
            labels: (P,) the positive ids of the batch, from which "in_batch" takes its frequencies.
        """
        if self.sampling == "uniform":
            return torch.full(ids.shape, math.log(self.num_negatives / self.num_items), device=ids.device)
        if self.sampling == "popularity":
            counts, cumulative = self._counts_on(ids.device)
            share = counts[ids] / cumulative[-1]
        else:
            counts = torch.bincount(labels, minlength=self.num_items).double()
            share = counts[ids].clamp(min=1.0) / max(labels.numel(), 1)
        return (share * self.num_negatives).log().float()
