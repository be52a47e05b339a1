"""Metrics as functions of whole columns."""

from __future__ import annotations

import torch
from torch import Tensor


def area_under_roc(scores: Tensor, labels: Tensor) -> Tensor:
    """Exact area under the ROC curve: the chance that a positive row scores above a negative one, ties one half.

    Args:
        scores: (n,).
        labels: (n,) of 0 and 1.

    Returns:
        A fp64 scalar; NaN where only one class occurs.
    """
    if scores.numel() == 0:
        return torch.full((), torch.nan, dtype=torch.float64, device=scores.device)
    return grouped_auc(scores, labels)[0][0]


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Exact AUC within each group by the rank-sum formula, in one sort; equal scores count one half.

    Args:
        scores: (n,).
        labels: (n,) of 0 and 1.
        groups: (n,) integers; None: one group.

    Returns:
        (G,) fp64 AUC, NaN for groups of one class or with a score that is NaN; (G,) rows; (G,) the groups' numbers,
        ascending.
    """
    groups = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    numbers, group = torch.unique(groups, return_inverse=True)
    by_score = torch.argsort(scores, stable=True)
    order = by_score[torch.argsort(group[by_score], stable=True)]
    scores, labels, group = scores[order], labels[order].double(), group[order]

    # Rows of one group and one score form a run; each row's rank in its group is the mean rank of its run.
    new_run = torch.ones_like(group, dtype=torch.bool)
    new_run[1:] = (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])
    run = new_run.cumsum(0) - 1
    run_sizes = torch.bincount(run)
    mean_position = (run_sizes.cumsum(0) - run_sizes).double() + (run_sizes.double() + 1) / 2

    rows = torch.bincount(group, minlength=numbers.numel())
    before = rows.cumsum(0) - rows
    rank = mean_position[run] - before[group]
    zeros = labels.new_zeros(numbers.numel())
    positives = zeros.index_add(0, group, labels)
    rank_sum = zeros.index_add(0, group, labels * rank)
    pairs = positives * (rows - positives)
    pairs = pairs.masked_fill(zeros.index_add(0, group, scores.isnan().double()) > 0, 0)
    auc = torch.where(pairs > 0, (rank_sum - positives * (positives + 1) / 2) / pairs, torch.nan)
    return auc, rows, numbers
