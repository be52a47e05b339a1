"""All metrics of a multi-task ranking model, each under `<metric>/<task>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from genrec.metrics.ranking import AUC, GAUC, RMSE, Accuracy, Calibration, LogLoss, NormalizedEntropy

TaskKind = Literal["binary", "multiclass", "regression"]

_BY_KIND: dict[str, dict[str, type[Metric]]] = {
    "binary": {
        "auc": AUC,
        "gauc": GAUC,
        "ne": NormalizedEntropy,
        "logloss": LogLoss,
        "calibration": Calibration,
    },
    "multiclass": {"accuracy": Accuracy},
    "regression": {"rmse": RMSE},
}


class TaskMetrics(nn.Module):
    """The metrics of each task: AUC, GAUC, NE, log loss and calibration of binary ones, accuracy of classes, RMSE.

    Args:
        tasks: Name of each task -> "binary", "multiclass" or "regression".
        prefix: Put before every key of `compute`, for example "val/".
        per_user: With GAUC, for which `update` then needs the users.

    Raises:
        ValueError: An unknown kind.
    """

    def __init__(self, tasks: Mapping[str, TaskKind], prefix: str = "", per_user: bool = True) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.per_user = per_user
        self.prefix = prefix
        for name, kind in tasks.items():
            if kind not in _BY_KIND:
                raise ValueError(f"Task '{name}': unknown kind '{kind}'. Known: {', '.join(_BY_KIND)}.")
        # A list and not a ModuleDict: a task may be called anything, also what a module has as an attribute.
        self.members = nn.ModuleList(
            nn.ModuleDict({metric: cls() for metric, cls in _BY_KIND[kind].items() if per_user or cls is not GAUC})
            for kind in tasks.values()
        )

    def metrics(self) -> dict[str, Metric]:
        """Every metric by its key, for example `val/auc/like`."""
        return {
            f"{self.prefix}{metric}/{task}": member
            for task, members in zip(self.tasks, self.members, strict=True)
            for metric, member in members.items()  # type: ignore[operator]
        }

    def update(
        self, task: str, outputs: Tensor, labels: Tensor, users: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add rows of one task.

        Args:
            task: Its name.
            outputs: (n,) logits of a binary task, (n, classes) logits, or (n,) predictions of a regression.
            labels: (n,). Rows whose label is NaN are not counted.
            users: (n,) user of each row; needed with `per_user` by binary tasks.
            weights: (n,) weight of each row, or None. Rows of weight 0 are not counted; AUC and GAUC know no other
                weights.

        Raises:
            KeyError: No such task.
            ValueError: Users are missing, or shapes differ.
        """
        if task not in self.tasks:
            raise KeyError(f"Unknown task '{task}'. Tasks: {', '.join(self.tasks)}.")
        keep = ~labels.isnan() if labels.is_floating_point() else torch.ones_like(labels, dtype=torch.bool)
        if weights is not None:
            keep &= weights != 0
        outputs, labels = outputs[keep], labels[keep]
        weights = None if weights is None else weights[keep]
        users = None if users is None else users[keep]
        for member in self.members[list(self.tasks).index(task)].values():  # type: ignore[operator, union-attr]
            if isinstance(member, GAUC):
                if users is None:
                    raise ValueError(f"GAUC of task '{task}' needs users; without them set per_user=False.")
                member.update(outputs, labels, users)
            elif isinstance(member, AUC):
                member.update(outputs, labels)
            else:
                member.update(outputs, labels, weights)

    def compute(self) -> dict[str, Tensor]:
        """Every metric's value by its key."""
        return {key: metric.compute() for key, metric in self.metrics().items()}

    def reset(self) -> None:
        """Forget all rows."""
        for metric in self.metrics().values():
            metric.reset()
