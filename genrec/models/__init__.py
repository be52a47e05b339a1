# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""LightningModules for HSTU ranking and retrieval, and the baselines that they are compared with."""

from genrec.environment import require_torchrec

require_torchrec()

from genrec.models.base import SequenceRecommender
from genrec.models.baselines import MLPRanking, PopularityRecommender, SASRec
from genrec.models.losses import LossSum, Task
from genrec.models.ranking import HSTURanking, RankingModel
from genrec.models.retrieval import HSTURetrieval, RetrievalModel
from genrec.models.writer import PredictionWriter

__all__ = [
    "HSTURanking",
    "HSTURetrieval",
    "LossSum",
    "MLPRanking",
    "PopularityRecommender",
    "PredictionWriter",
    "RankingModel",
    "RetrievalModel",
    "SASRec",
    "SequenceRecommender",
    "Task",
]
