# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""LightningModules for HSTU ranking and retrieval, and the baselines that they are compared with."""

from genrec.environment import require_torchrec

require_torchrec()

from genrec.models.base import SequenceRecommender
from genrec.models.losses import LossSum, Task
from genrec.models.ranking import HSTURanking, RankingModel
from genrec.models.retrieval import HSTURetrieval, RetrievalModel

__all__ = [
    "HSTURanking",
    "HSTURetrieval",
    "LossSum",
    "RankingModel",
    "RetrievalModel",
    "SequenceRecommender",
    "Task",
]
