"""Losses as (sum, count) pairs: a data-parallel run divides by the count of all ranks, not by each rank's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TaskKind = Literal["binary", "multiclass", "regression"]


@dataclass(frozen=True)
class LossSum:
    """A loss before it is divided.

    Attributes:
        total: Sum of the losses of all labels, times their weights.
        count: Sum of the labels' weights: how many labels there are where the weights are ones.
        weight: Factor of this loss in the sum over losses.
    """

    total: Tensor
    count: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """total / count; zero where there are no labels."""
        return self.total / torch.where(self.count > 0, self.count, torch.ones_like(self.count))


@dataclass(frozen=True)
class Task:
    """One thing that a ranking model predicts of a candidate.

    Args:
        name: Used in metric names: `val/auc/<name>`.
        kind: "binary" (one logit), "multiclass" (a logit for each class) or "regression" (one value).
        num_classes: Number of classes of a multi-class task.
        weight: Factor of the task's loss.
    """

    name: str
    kind: TaskKind = "binary"
    num_classes: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "multiclass", "regression"):
            raise ValueError(f"Task '{self.name}': kind must be binary, multiclass or regression, got '{self.kind}'.")
        if (self.kind == "multiclass") != (self.num_classes > 1):
            raise ValueError(
                f"Task '{self.name}': a multiclass task needs num_classes >= 2 and no other has it; got kind "
                f"'{self.kind}' with {self.num_classes}."
            )

    @property
    def num_outputs(self) -> int:
        """Logits of the task."""
        return self.num_classes


def multi_task_loss(
    logits: Mapping[str, Tensor], labels: Tensor, tasks: Sequence[Task], label_weights: Tensor | None = None
) -> dict[str, LossSum]:
    """The loss of each task: binary cross-entropy on logits, cross-entropy, or squared error.

    Args:
        logits: Of each task by name: (P,), or (P, classes) for multi-class ones.
        labels: (P, tasks) float; class indices for multi-class tasks. NaN: no label, which counts nothing.
        tasks: The tasks.
        label_weights: (P,) or None for ones.
    """
    rows = logits[tasks[0].name].shape[0]
    if labels.shape != (rows, len(tasks)):
        raise ValueError(
            f"labels must have a row for each of the {rows} candidates and a column for each of the {len(tasks)} "
            f"tasks, got {tuple(labels.shape)}."
        )
    weights = torch.ones_like(labels[:, 0]) if label_weights is None else label_weights.to(labels.dtype)
    losses = {}
    for index, task in enumerate(tasks):
        label = labels[:, index]
        known = ~label.isnan()
        weight = weights * known
        each = _task_losses(task, logits[task.name].float(), label.nan_to_num())
        losses[task.name] = LossSum((each * weight).sum(), weight.sum(), task.weight)
    return losses


def _task_losses(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    if task.kind == "multiclass":
        return F.cross_entropy(logits, labels.long(), reduction="none")
    return F.mse_loss(logits, labels.to(logits.dtype), reduction="none")
