"""HR@K, NDCG@K, MRR and Recall@K from the ranks of the relevant items, counted from 1.

A rank of 0 or less, or NaN, says that the item was not retrieved at all. Sums and counts are kept, so that a merge over
ranks of a data-parallel group is exact whatever each of them has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from genrec.metrics._states import check_same_length, ratio


class _RankMetric(Metric):
    """Mean over the cases of a gain in [0, 1] that a rank earns."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        # The states carry K in their names: torchmetrics merges members of a collection whose states look alike after
        # the first batch, and two K that both start with no hit would be merged for ever.
        self._gain, self._cases = f"gain_{name}", f"cases_{name}"
        self.add_state(self._gain, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._cases, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, ranks: Tensor, weights: Tensor | None = None) -> None:
        """Add cases.

        Args:
            ranks: (C,) rank of each case's target among the candidates, the best 1; 0 or less where it is absent.
            weights: (C,) weight of each case, or None for all ones.

        Raises:
            ValueError: Shapes differ.
        """
        check_same_length(ranks=ranks, weights=weights)
        self._add(self.gain(ranks), weights)

    def _add(self, gain: Tensor, weights: Tensor | None) -> None:
        gain = gain.double()
        total = gain.sum() if weights is None else (gain * weights).sum()
        cases = gain.new_tensor(gain.numel()) if weights is None else weights.double().sum()
        setattr(self, self._gain, getattr(self, self._gain) + total)
        setattr(self, self._cases, getattr(self, self._cases) + cases)

    def gain(self, ranks: Tensor) -> Tensor:
        """(C,) what each rank earns."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The mean gain; NaN where there was no case."""
        return ratio(getattr(self, self._gain), getattr(self, self._cases))


def _check_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"K must be at least 1, got {k}.")
    return k


def _within(ranks: Tensor, k: int) -> Tensor:
    return (ranks >= 1) & (ranks <= k)


class HitRate(_RankMetric):
    """HR@K: the share of cases whose target stands among the first K (rank K included).

    Args:
        k: K.
        options: Of `torchmetrics.Metric`.
    """

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__(f"hr_at_{_check_k(k)}", **options)
        self.k = k

    def gain(self, ranks: Tensor) -> Tensor:
        """1 for ranks 1 .. K."""
        return _within(ranks, self.k)


class NDCG(_RankMetric):
    """NDCG@K with one relevant item a case: mean of 1 / log2(rank + 1) for ranks 1 .. K, else 0.

    Args:
        k: K.
        options: Of `torchmetrics.Metric`.
    """

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__(f"ndcg_at_{_check_k(k)}", **options)
        self.k = k

    def gain(self, ranks: Tensor) -> Tensor:
        """1 / log2(rank + 1) for ranks 1 .. K."""
        return torch.where(_within(ranks, self.k), 1.0 / torch.log2(ranks.double().clamp(min=1) + 1), 0.0)


class MRR(_RankMetric):
    """Mean reciprocal rank, over the whole list or its first K.

    Args:
        k: Ranks after it earn nothing; None for all ranks.
        options: Of `torchmetrics.Metric`.
    """

    def __init__(self, k: int | None = None, **options: Any) -> None:
        super().__init__("mrr" if k is None else f"mrr_at_{_check_k(k)}", **options)
        self.k = k

    def gain(self, ranks: Tensor) -> Tensor:
        """1 / rank for ranks 1 .. K."""
        counted = ranks >= 1 if self.k is None else _within(ranks, self.k)
        return torch.where(counted, 1.0 / ranks.double().clamp(min=1), 0.0)


class Recall(_RankMetric):
    """Recall@K: the share of a case's relevant items that stand among the first K, averaged over the cases.

    With one relevant item a case it is HR@K. Cases without relevant items are not counted.

    Args:
        k: K.
        options: Of `torchmetrics.Metric`.
    """

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__(f"recall_at_{_check_k(k)}", **options)
        self.k = k

    def update(self, ranks: Tensor, num_relevant: Tensor | None = None) -> None:
        """Add cases.

        Args:
            ranks: (C,) or (C, R): the ranks of each case's relevant items; 0 or less for one that is absent, and to
                fill rows of cases with fewer.
            num_relevant: (C,) how many items are relevant to each case; None: R of each.

        Raises:
            ValueError: Shapes differ, or more items were found than are relevant.
        """
        found = _within(ranks.reshape(ranks.shape[0], -1), self.k)
        if num_relevant is None:
            num_relevant = torch.full((found.shape[0],), found.shape[1], device=found.device)
        hits = found.sum(dim=1)
        check_same_length(cases=hits, num_relevant=num_relevant)
        if bool((hits > num_relevant).any()):
            raise ValueError("A case has more items within K than num_relevant says are relevant.")
        counted = num_relevant > 0
        self._add(hits[counted] / num_relevant[counted].double(), None)


def retrieval_metrics(top_ks: Sequence[int] = (10, 50, 200), prefix: str = "") -> MetricCollection:
    """HR@K and NDCG@K for each K, and MRR, under the keys `<prefix>hr@10`, `<prefix>ndcg@10`, ..., `<prefix>mrr`.

    `update(ranks)` takes (C,) ranks counted from 1.
    """
    members: dict[str, Metric | MetricCollection] = {}
    for k in top_ks:
        members |= {f"hr@{k}": HitRate(k), f"ndcg@{k}": NDCG(k)}
    return MetricCollection({**members, "mrr": MRR()}, prefix=prefix or None, compute_groups=False)
