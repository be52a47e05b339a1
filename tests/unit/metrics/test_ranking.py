"""AUC, GAUC, NE and the others against scikit-learn, plain loops and hand-made cases."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, roc_auc_score

from genrec.metrics import (
    AUC,
    GAUC,
    RMSE,
    Accuracy,
    Calibration,
    LogLoss,
    NormalizedEntropy,
    TaskMetrics,
)


def value(metric, *args):
    metric.update(*args)
    return metric.compute().item()


def rows(n=400, users=25, levels=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator)
    if levels:
        logits = (logits * levels).round() / levels
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).long()
    return logits, labels, torch.randint(0, users, (n,), generator=generator)


def pairwise_auc(scores, labels):
    """Share of (positive, negative) pairs in order, ties one half: the definition."""
    positive = [s for s, label in zip(scores, labels, strict=True) if label == 1]
    negative = [s for s, label in zip(scores, labels, strict=True) if label == 0]
    if not positive or not negative:
        return math.nan
    won = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    return won / (len(positive) * len(negative))


def loop_gauc(scores, labels, users):
    total = weight = 0.0
    for user in set(users):
        mine = [i for i, u in enumerate(users) if u == user]
        auc = pairwise_auc([scores[i] for i in mine], [labels[i] for i in mine])
        if not math.isnan(auc):
            total, weight = total + auc * len(mine), weight + len(mine)
    return total / weight if weight else math.nan


@pytest.mark.parametrize("levels", [None, 2])
def test_auc_is_scikit_learns(levels):
    logits, labels, _ = rows(levels=levels)
    metric = AUC()
    for part, label in zip(logits.split(37), labels.split(37), strict=True):
        metric.update(part, label)
    assert metric.compute().item() == pytest.approx(roc_auc_score(labels, logits), abs=1e-7)


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_auc_and_gauc_are_the_definition(cases):
    scores, labels, users = (list(column) for column in zip(*cases, strict=True))
    got = value(AUC(), torch.tensor(scores).float(), torch.tensor(labels))
    assert got == pytest.approx(pairwise_auc(scores, labels), abs=1e-6, nan_ok=True)
    got = value(GAUC(), torch.tensor(scores).float(), torch.tensor(labels), torch.tensor(users))
    assert got == pytest.approx(loop_gauc(scores, labels, users), abs=1e-6, nan_ok=True)


def test_equal_scores_count_one_half():
    assert value(AUC(), torch.zeros(4), torch.tensor([0, 1, 0, 1])) == 0.5
    assert value(AUC(), torch.tensor([0.1, 0.5, 0.5]), torch.tensor([0, 0, 1])) == 0.75


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.ones(3), torch.empty(0)])
def test_one_class_has_no_auc(labels):
    scores, users = torch.rand(len(labels)), torch.zeros(len(labels), dtype=torch.int64)
    assert math.isnan(value(AUC(), scores, labels))
    assert math.isnan(value(GAUC(), scores, labels, users))
    assert math.isnan(value(NormalizedEntropy(), scores, labels))


def test_a_nan_score_is_not_hidden():
    assert math.isnan(value(AUC(), torch.tensor([0.1, math.nan, 0.3]), torch.tensor([0, 1, 1])))


def test_gauc_by_hand():
    # User 7: AUC 1 over 2 rows; user 9: AUC 0.5 over 4 rows; user -1: one class only, left out.
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.5, 0.5, 0.9, 0.1])
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    users = torch.tensor([7, 7, 9, 9, 9, 9, -1, -1])
    assert value(GAUC(), scores, labels, users) == pytest.approx((1.0 * 2 + 0.5 * 4) / 6)


def test_gauc_sees_order_within_users_only():
    """Scores that tell users apart but not rows of a user raise AUC and leave GAUC at one half."""
    users = torch.arange(10).repeat_interleave(10)
    labels = (torch.arange(100) % 10 < users).long()
    assert value(AUC(), users.float(), labels) > 0.7
    assert value(GAUC(), users.float(), labels, users) == 0.5


def test_log_loss_is_scikit_learns():
    logits, labels, _ = rows()
    weights = torch.rand(400, generator=torch.Generator().manual_seed(1))
    expected = log_loss(labels, torch.sigmoid(logits.double()).numpy(), sample_weight=weights.numpy())
    assert value(LogLoss(), logits, labels, weights) == pytest.approx(expected, rel=1e-6)


def test_log_loss_of_extreme_logits_is_exact():
    assert value(LogLoss(), torch.tensor([200.0]), torch.tensor([0.0])) == 200.0


def test_ne_of_the_base_rate_is_one():
    labels = torch.tensor([1.0, 0, 0, 0])
    logits = torch.full((4,), math.log(0.25 / 0.75))
    assert value(NormalizedEntropy(), logits, labels) == pytest.approx(1.0)
    assert value(Calibration(), logits, labels) == pytest.approx(1.0)


def test_ne_is_log_loss_over_entropy():
    logits, labels, _ = rows()
    rate = labels.double().mean().item()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    expected = log_loss(labels, torch.sigmoid(logits.double()).numpy()) / entropy
    assert value(NormalizedEntropy(), logits, labels) == pytest.approx(expected, rel=1e-6)


def test_calibration_without_positives_is_nan():
    assert math.isnan(value(Calibration(), torch.zeros(3), torch.zeros(3)))


def test_rmse_and_accuracy_are_scikit_learns():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=50), generator.normal(size=50)
    got = value(RMSE(), torch.from_numpy(x), torch.from_numpy(y))
    assert got == pytest.approx(math.sqrt(mean_squared_error(y, x)), rel=1e-6)
    logits, classes = generator.normal(size=(50, 4)), generator.integers(0, 4, 50)
    got = value(Accuracy(), torch.from_numpy(logits), torch.from_numpy(classes))
    assert got == pytest.approx(accuracy_score(classes, logits.argmax(1)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"scores \(3,\), labels \(2,\)"):
        AUC().update(torch.rand(3), torch.ones(2))
    with pytest.raises(ValueError, match="0 or 1, got 2"):
        AUC().update(torch.rand(3), torch.tensor([0, 1, 2]))


def test_task_metrics():
    logits, labels, users = rows()
    metrics = TaskMetrics({"like": "binary", "items": "regression", "update": "multiclass"}, prefix="test/")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update("like", logits, labels.float(), users)
        metrics.update("items", logits, logits + 2)
        metrics.update("update", torch.eye(3), torch.tensor([0.0, 1.0, 0.0]))
        result = {key: metric.item() for key, metric in metrics.compute().items()}
    assert set(result) == {
        *(f"test/{name}/like" for name in ("auc", "gauc", "ne", "logloss", "calibration")),
        "test/rmse/items",
        "test/accuracy/update",
    }
    assert result["test/auc/like"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-7)
    assert result["test/rmse/items"] == pytest.approx(2.0)
    assert result["test/accuracy/update"] == pytest.approx(2 / 3)
    metrics.reset()
    assert all(math.isnan(metric.item()) for metric in metrics.compute().values())


def test_task_metrics_leave_out_rows_without_label_or_weight():
    metrics = TaskMetrics({"like": "binary"}, per_user=False)
    labels = torch.tensor([1.0, 0.0, math.nan, 1.0])
    metrics.update("like", torch.tensor([0.9, 0.1, 0.5, -9.0]), labels, weights=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    result = metrics.compute()
    assert result["auc/like"] == 1.0
    assert "gauc/like" not in result


def test_task_metrics_bad_input():
    with pytest.raises(ValueError, match="unknown kind 'x'"):
        TaskMetrics({"like": "x"})
    with pytest.raises(KeyError, match="Tasks: like"):
        TaskMetrics({"like": "binary"}).update("clik", torch.rand(1), torch.ones(1))
    with pytest.raises(ValueError, match="needs users"):
        TaskMetrics({"like": "binary"}).update("like", torch.rand(1), torch.ones(1))
