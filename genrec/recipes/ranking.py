"""Train and test a ranking model: `python -m genrec.recipes.ranking [--config NAME|PATH] [--help] [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from genrec.config import RankingConfig
from genrec.recipes import _run
from genrec.recipes._data import build_data, feature_arguments, task_arguments


def build_model(config: RankingConfig, data: Any) -> Any:
    """The model of a config, sized by the data."""
    from genrec.models import HSTURanking, MLPRanking

    model = config.model
    arguments = {
        **feature_arguments(data),
        **_run.common_arguments(config, encoder=model.name == "hstu"),
        "tasks": task_arguments(data),
        "action_mode": model.action_mode,
        "side_mode": model.side_mode,
        "head_hidden_dims": model.head_hidden_dims,
        "head_activation": model.head_activation,
        "head_dropout": model.head_dropout,
        "output_norm": model.output_norm,
        "per_user_metrics": model.per_user_metrics,
    }
    if model.name == "hstu":
        arguments |= _run.hstu_arguments(config)
    cls = {"hstu": HSTURanking, "mlp": MLPRanking}[model.name]
    return _run.construct(model.class_path, cls, arguments, model.options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return _run.main("ranking", RankingConfig, build_data, build_model, argv)


if __name__ == "__main__":
    sys.exit(main())
