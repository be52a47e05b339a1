"""`HybridParallelStrategy` in real processes: the same training however many ranks there are."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from genrec.parallel import planner
from genrec.parallel._sequence_tables import SequenceTableSharder
from tests.distributed import training
from tests.distributed.ranks import run_ranks

# One accumulator a row has no meaning for shards of columns: there each element has its own.
SHARDINGS = {"row_wise": "rowwise_adagrad", "table_wise": "sgd", "column_wise": "adagrad", "data_parallel": "adam"}
STEPS = 50


def _curves(rank: int, world_size: int, shardings: list[str]) -> dict[str, list[float]]:
    if world_size == 2:  # as on a GPU, where sequences are looked up in pieces
        planner.SequenceTableSharder = functools.partial(SequenceTableSharder, 3)  # type: ignore[misc,assignment]
    return {
        f"{kind}/{sharding}": training.train(
            kind, STEPS, {"sharding": sharding}, {"table_optimizer": SHARDINGS[sharding]}
        )
        for kind in training.MODELS
        for sharding in shardings
    }


@functools.cache
def curves(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(_curves, world_size, list(SHARDINGS))


@pytest.mark.parametrize("kind", list(training.MODELS))
@pytest.mark.parametrize("sharding", list(SHARDINGS))
@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_are_those_of_one_process(kind, sharding, world_size):
    (alone,) = curves(1)
    expected = alone[f"{kind}/{sharding}"]
    assert expected[-1] < 0.8 * expected[0], "it learns"
    for rank in curves(world_size):
        assert rank[f"{kind}/{sharding}"] == pytest.approx(expected, rel=1e-4)
