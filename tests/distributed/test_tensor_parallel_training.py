"""Whole models under `HybridParallelStrategy` with tensor parallelism: the losses of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed import training
from tests.distributed.ranks import run_ranks

PRELOAD = ["megatron.core.tensor_parallel", "genrec.parallel.parallelize"]
STEPS = 50
# The rate is low enough that fp32 rounding, which another order of summation changes, doesn't grow over the steps.
MODEL = {"learning_rate": 0.003, "num_layers": 2}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"form": "paper"},
    "production": {"form": "production"},
    "group norm": {"form": "production", "group_norm": True, "relative_bias": "both"},
}
CASES = [(kind, form) for kind in training.MODELS for form in FORMS]


def _curves(rank: int, world_size: int, size: int) -> dict[Any, list[float]]:
    return {
        (kind, form, parallel): training.train(
            kind,
            STEPS,
            {"sharding": "row_wise", "tensor_parallel_size": size, "sequence_parallel": parallel},
            {**MODEL, **FORMS[form]},
        )
        for kind, form in CASES
        for parallel in ((False, True) if size > 1 else (False,))
    }


@functools.cache
def curves(world_size: int, size: int) -> list[dict[Any, list[float]]]:
    return run_ranks(_curves, world_size, size, preload=PRELOAD)


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_losses_of_two_by_two_ranks_are_those_of_one_process(kind, form, sequence_parallel):
    (alone,) = curves(1, 1)
    expected = alone[kind, form, False]
    assert expected[-1] < 0.8 * expected[0], "it learns"
    for rank in curves(4, 2):
        assert rank[kind, form, sequence_parallel] == pytest.approx(expected, rel=1e-4)
