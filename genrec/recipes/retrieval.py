"""Train and test a retrieval model: `python -m genrec.recipes.retrieval [--config NAME|PATH] [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from genrec.config import RetrievalConfig
from genrec.recipes import _run
from genrec.recipes._data import build_data, feature_arguments


def build_model(config: RetrievalConfig, data: Any) -> Any:
    """The model of a config, sized by the data."""
    from genrec.models import HSTURetrieval, PopularityRecommender, SASRec

    model, loss, evaluation = config.model, config.loss, config.evaluation
    arguments = {
        **feature_arguments(data),
        **_run.common_arguments(config, encoder=model.name != "popularity"),
        "loss": loss.name,
        "num_negatives": loss.num_negatives,
        "negative_sampling": loss.negative_sampling,
        "shared_negatives": loss.shared_negatives,
        "logq_correction": loss.logq_correction,
        "similarity": model.similarity,
        "output_norm": model.output_norm,
        "temperature": model.temperature,
        "item_bias": model.item_bias,
        "filter_seen": evaluation.filter_seen,
        "top_ks": evaluation.top_ks,
        "predict_k": evaluation.predict_k,
    }
    if model.name == "hstu":
        arguments |= _run.hstu_arguments(config)
    if model.name == "popularity":
        arguments["item_counts"] = data.item_counts
        config.trainer.max_epochs = 1
    cls = {"hstu": HSTURetrieval, "sasrec": SASRec, "popularity": PopularityRecommender}[model.name]
    return _run.construct(model.class_path, cls, arguments, model.options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return _run.main("retrieval", RetrievalConfig, build_data, build_model, argv)


if __name__ == "__main__":
    sys.exit(main())
