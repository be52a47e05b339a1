"""AUC and GAUC, exact and aware of ties; normalised entropy, log loss and calibration; regression and class errors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from genrec.metrics._states import ColumnMetric, check_binary, check_same_length, ratio
from genrec.metrics.functional import area_under_roc, grouped_auc


class AUC(ColumnMetric):
    """Area under the ROC curve, exact: the chance that a positive row scores above a negative one, ties one half.

    Keeps every score and label (5 bytes a row). NaN where only one class was seen.
    """

    is_differentiable = False
    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_column("scores", torch.float32)
        self.add_column("labels", torch.uint8)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add rows: (n,) scores (probabilities or logits) and (n,) labels of 0 and 1.

        Raises:
            ValueError: Shapes differ, or a label is neither 0 nor 1.
        """
        check_same_length(scores=scores, labels=labels)
        check_binary(labels)
        self.append(scores=scores, labels=labels)

    def compute(self) -> Tensor:
        """The AUC."""
        return area_under_roc(self.column("scores"), self.column("labels")).float()


class GAUC(ColumnMetric):
    """AUC within each user, averaged with the users' numbers of impressions as weights.

    Users whose rows are of one class have no AUC and are left out. NaN where no user is left. Keeps 13 bytes a row.
    """

    is_differentiable = False
    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_column("scores", torch.float32)
        self.add_column("labels", torch.uint8)
        self.add_column("users", torch.int64)

    def update(self, scores: Tensor, labels: Tensor, users: Tensor) -> None:
        """Add rows: (n,) scores, (n,) labels of 0 and 1, and (n,) integer user ids.

        Raises:
            ValueError: Shapes differ, or a label is neither 0 nor 1.
        """
        check_same_length(scores=scores, labels=labels, users=users)
        check_binary(labels)
        self.append(scores=scores, labels=labels, users=users)

    def compute(self) -> Tensor:
        """The GAUC."""
        auc, rows, _ = grouped_auc(self.column("scores"), self.column("labels"), self.column("users"))
        counted = ~auc.isnan()
        weights = rows[counted].double()
        return ratio((auc[counted] * weights).sum(), weights.sum())


class _SumMetric(Metric):
    """A metric made of fp64 sums over the rows."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, *names: str, **options: Any) -> None:
        super().__init__(**options)
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add_to(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        """Add the weighted sum of (n,) `values` to the state `name`."""
        values = values.double()
        setattr(self, name, getattr(self, name) + (values if weights is None else values * weights).sum())


class LogLoss(_SumMetric):
    """Mean binary cross-entropy, in nats, from logits (exact where probabilities would round to 0 or 1)."""

    loss_sum: Tensor
    weight_sum: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__("loss_sum", "weight_sum", **options)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: (n,) logits, (n,) labels in [0, 1], (n,) weights or None.

        Raises:
            ValueError: Shapes differ.
        """
        check_same_length(logits=logits, labels=labels, weights=weights)
        loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
        self.add_to("loss_sum", loss, weights)
        self.add_to("weight_sum", torch.ones_like(loss), weights)

    def compute(self) -> Tensor:
        """The mean; NaN without rows."""
        return ratio(self.loss_sum, self.weight_sum)


class NormalizedEntropy(_SumMetric):
    """NE: log loss divided by the entropy of the base rate.

    Source: He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook".

    1 is what predicting the base rate for every row earns; less is better. NaN where only one class was seen.
    """

    loss_sum: Tensor
    label_sum: Tensor
    weight_sum: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__("loss_sum", "label_sum", "weight_sum", **options)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: (n,) logits, (n,) labels in [0, 1], (n,) weights or None.

        Raises:
            ValueError: Shapes differ.
        """
        check_same_length(logits=logits, labels=labels, weights=weights)
        loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
        self.add_to("loss_sum", loss, weights)
        self.add_to("label_sum", labels, weights)
        self.add_to("weight_sum", torch.ones_like(loss), weights)

    def compute(self) -> Tensor:
        """The NE."""
        rate = self.label_sum / self.weight_sum
        entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
        value = ratio(self.loss_sum / self.weight_sum, entropy)
        return torch.where(entropy > 0, value, torch.nan)


class Calibration(_SumMetric):
    """Mean predicted probability divided by the share of positives; 1 is calibrated. NaN without positives."""

    predicted_sum: Tensor
    positive_sum: Tensor
    higher_is_better: bool | None = None  # type: ignore[assignment]

    def __init__(self, **options: Any) -> None:
        super().__init__("predicted_sum", "positive_sum", **options)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: (n,) logits, (n,) labels in [0, 1], (n,) weights or None.

        Raises:
            ValueError: Shapes differ.
        """
        check_same_length(logits=logits, labels=labels, weights=weights)
        self.add_to("predicted_sum", logits.double().sigmoid(), weights)
        self.add_to("positive_sum", labels, weights)

    def compute(self) -> Tensor:
        """The ratio."""
        return torch.where(self.positive_sum > 0, ratio(self.predicted_sum, self.positive_sum), torch.nan)


class RMSE(_SumMetric):
    """Root of the mean squared error of a regression."""

    square_sum: Tensor
    weight_sum: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__("square_sum", "weight_sum", **options)

    def update(self, predictions: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: (n,) predictions, (n,) labels, (n,) weights or None.

        Raises:
            ValueError: Shapes differ.
        """
        check_same_length(predictions=predictions, labels=labels, weights=weights)
        square = (predictions.double() - labels.double()).square()
        self.add_to("square_sum", square, weights)
        self.add_to("weight_sum", torch.ones_like(square), weights)

    def compute(self) -> Tensor:
        """The root; NaN without rows."""
        return ratio(self.square_sum, self.weight_sum).sqrt()


class Accuracy(_SumMetric):
    """Share of rows whose best class is the label's."""

    correct_sum: Tensor
    weight_sum: Tensor
    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        super().__init__("correct_sum", "weight_sum", **options)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows: (n, classes) logits, (n,) class numbers, (n,) weights or None.

        Raises:
            ValueError: Shapes differ.
        """
        best = logits.argmax(dim=-1)
        check_same_length(best=best, labels=labels, weights=weights)
        correct = best == labels.long()
        self.add_to("correct_sum", correct, weights)
        self.add_to("weight_sum", torch.ones_like(correct), weights)

    def compute(self) -> Tensor:
        """The share; NaN without rows."""
        return ratio(self.correct_sum, self.weight_sum)
