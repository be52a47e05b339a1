"""From the `data` section of a config to a data module, and from that to the arguments of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from genrec.config import ConfigError, DataConfig, RankingConfig, RecipeConfig, RetrievalConfig


def build_reader(data: DataConfig, kind: str) -> Any:
    """The reader that `data.name` names.

    Raises:
        ConfigError: It needs `data.path`, which is not set.
    """
    from genrec.data import readers
    from genrec.data.synthetic import Synthetic

    if data.name == "synthetic":
        return Synthetic(kind=kind, **asdict(data.synthetic))  # type: ignore[arg-type]
    if data.path is None:
        raise ConfigError(f"data.name={data.name} needs data.path, the file or folder of the data (docs/data.md).")
    if data.name == "movielens":
        return readers.MovieLens(data.path)
    if data.name == "amazon_sequences":
        return readers.AmazonSequences(data.path)
    if data.name == "amazon_ratings":
        return readers.AmazonRatings(data.path, **asdict(data.amazon))
    if data.name == "kuairand":
        return readers.KuaiRand(data.path, **asdict(data.kuairand))
    return readers.ParquetTable(data.path, **asdict(data.parquet))


def build_data(config: RecipeConfig) -> Any:
    """The data module of a recipe's config."""
    from genrec.data.datamodule import SequenceDataModule
    from genrec.data.splits import Split

    assert isinstance(config, RankingConfig | RetrievalConfig)
    data = config.data
    kind = "ranking" if isinstance(config, RankingConfig) else "retrieval"
    shared = (
        "max_seqlen", "batch_size", "eval_batch_size", "token_budget", "side_features", "contextual_features",
        "stochastic_length", "stochastic_selection", "tie_break", "remap_items", "cache_dir", "num_workers",
    )  # fmt: skip
    own = ("num_candidates", "min_history", "tasks") if kind == "ranking" else ("all_windows", "query_time", "actions")
    module = SequenceDataModule(
        build_reader(data, kind),
        kind,  # type: ignore[arg-type]
        seed=config.seed,
        **{name: getattr(data, name) for name in (*shared, *own)},
    )
    # The split has a seed of its own: runs of different seeds are tested on the same users.
    module.split = Split(**asdict(data.split))
    return module


def feature_arguments(data: Any) -> dict[str, Any]:
    """Arguments of a model's constructor that the data decides."""
    schema = data.schema
    # A ranking case is its history and the candidates after it.
    events = data.max_seqlen + (data.num_candidates if data.kind == "ranking" else 0)
    return {
        "num_items": schema.num_items,
        "max_seqlen": events,
        "action_feature": schema.action_feature,
        "num_actions": schema.num_actions,
        "side_features": schema.side_features,
        "contextual_features": schema.contextual_features,
    }


def task_arguments(data: Any) -> list[dict[str, Any]]:
    """The tasks of a ranking model: binary ones, and the numeric "value" as a regression."""
    return [{"name": name, "kind": "regression" if name == "value" else "binary"} for name in data.tasks]
