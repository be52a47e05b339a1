"""torchmetrics classes of the field: HR@K, NDCG@K, MRR, Recall@K; AUC, GAUC, NE, log loss, calibration."""

from genrec.metrics.functional import area_under_roc, grouped_auc
from genrec.metrics.ranking import (
    AUC,
    GAUC,
    RMSE,
    Accuracy,
    Calibration,
    LogLoss,
    NormalizedEntropy,
)
from genrec.metrics.retrieval import MRR, NDCG, HitRate, Recall, retrieval_metrics
from genrec.metrics.tasks import TaskMetrics

__all__ = [
    "AUC",
    "GAUC",
    "MRR",
    "NDCG",
    "RMSE",
    "Accuracy",
    "Calibration",
    "HitRate",
    "LogLoss",
    "NormalizedEntropy",
    "Recall",
    "TaskMetrics",
    "area_under_roc",
    "grouped_auc",
    "retrieval_metrics",
]
