"""Whole models under `HybridParallelStrategy` with tensor parallelism: the losses of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed import training
from tests.distributed.ranks import run_ranks

PRELOAD = ["megatron.core.tensor_parallel", "genrec.parallel.parallelize"]
STEPS = 50
# Norms and AdamW divide small numbers by their own size. With eps far below it, fp32 rounding, which another order of
# summation changes, grows over the steps: one process that starts 1e-7 off then ends up to 2e-2 off.
NORM: dict[str, Any] = {"norm_eps": 1e-3}
GROUP_NORM: dict[str, Any] = {"hstu_options": {**NORM, "group_norm": True}}
MODEL = {"eps": 1e-4, "num_layers": 2, "hstu_options": NORM}
TABLE_WISE, COLUMN_WISE = {"table_optimizer": "sgd"}, {"table_optimizer": "adagrad"}
CASES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "ranking, paper": ("ranking", "row_wise", False, {"form": "paper"}),
    "ranking, production, sequence parallel": ("ranking", "row_wise", True, {"form": "production"}),
    "ranking, table-wise": ("ranking", "table_wise", False, TABLE_WISE),
    "ranking, column-wise": ("ranking", "column_wise", False, COLUMN_WISE),
    "retrieval, paper, sequence parallel": ("retrieval", "row_wise", True, {"form": "paper"}),
    "retrieval, production": ("retrieval", "row_wise", False, {"form": "production"}),
    "retrieval, group norm": (
        "retrieval", "row_wise", False, {"form": "production", "relative_bias": "time", **GROUP_NORM}
    ),
    "retrieval, table-wise": ("retrieval", "table_wise", False, TABLE_WISE),
    "retrieval, column-wise": ("retrieval", "column_wise", False, COLUMN_WISE),
}  # fmt: skip


def _curves(rank: int, world_size: int, size: int) -> dict[str, list[float]]:
    return {
        name: training.train(
            kind,
            STEPS,
            {
                "sharding": sharding,
                "tensor_parallel_size": size,
                "sequence_parallel": parallel and size > 1,
                "pipeline": "none" if sharding == "row_wise" else "sparse_dist",
            },
            {**MODEL, **options},
        )
        for name, (kind, sharding, parallel, options) in CASES.items()
    }


@functools.cache
def curves(world_size: int, size: int) -> list[dict[str, list[float]]]:
    return run_ranks(_curves, world_size, size, preload=PRELOAD)


@pytest.mark.parametrize("case", list(CASES))
def test_losses_of_two_by_two_ranks_are_those_of_one_process(case):
    (alone,) = curves(1, 1)
    assert alone[case][-1] < 0.8 * alone[case][0], "it learns"
    for rank in curves(4, 2):
        assert rank[case] == pytest.approx(alone[case], rel=1e-4)
