"""Dynamic tables under `HybridParallelStrategy`: the losses of one process, and of static tables from equal rows."""

from __future__ import annotations

from typing import Any

import pytest

from genrec.embedding import InitializerConfig
from tests.distributed import training
from tests.distributed.ranks import run_ranks

STEPS = 12


def _curves(rank: int, world_size: int) -> dict[str, list[float]]:
    curves = {}
    for kind in training.MODELS:
        for backend in ("fbgemm", "hkv"):
            start: dict[str, Any] = {"initializer": InitializerConfig("constant", value=0.1)}
            model = {"table_optimizer": "rowwise_adagrad", "embedding_tables": {"item": {"backend": backend, **start}}}
            curves[f"{kind}/{backend}"] = training.train(kind, STEPS, model=model)
        options = {"score": "lfu", "num_choices": 2}
        model = {"embedding_backend": "hkv", "embedding_options": options, "table_optimizer": "adam"}
        curves[f"{kind}/adam"] = training.train(kind, STEPS, model=model)
    return curves


def test_dynamic_tables_train_like_static_ones_on_any_number_of_ranks():
    (alone,) = run_ranks(_curves, 1)
    for rank in run_ranks(_curves, 2):
        for name, losses in rank.items():
            assert losses == pytest.approx(alone[name], rel=1e-5), name
        for kind in training.MODELS:
            assert rank[f"{kind}/hkv"] == pytest.approx(rank[f"{kind}/fbgemm"], rel=1e-6)
            assert rank[f"{kind}/adam"][-1] < rank[f"{kind}/adam"][0]
