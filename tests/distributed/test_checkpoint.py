"""Checkpoints of sharded runs over real gloo processes: exact resuming, resharding, one process and back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from genrec.parallel import checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded_runs import Run, holdings, merged

PLACEMENTS = ("row_wise", "table_wise", "column_wise")
OPTIMIZERS = ("adagrad", "rowwise_adagrad")


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    """The same tensors, to the last bit."""
    ours, theirs = merged(actual), merged(expected)
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different


def _resume(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    results = []
    for placement, optimizer, asynchronous in itertools.product(PLACEMENTS, OPTIMIZERS, (False, True)):
        path = f"{folder}/{placement}-{optimizer}-{asynchronous}.ckpt"
        run = Run(placement, optimizer, dynamic=optimizer == "adagrad")
        run.train(3)
        saved = holdings(run)
        checkpoint.save(path, run.checkpoint(), run.model, [run.optimizer], async_save=asynchronous)
        later, end = run.train(3), holdings(run)
        other = Run(placement, optimizer, dynamic=optimizer == "adagrad")
        other.train(1)
        other.resume(checkpoint.load(path, other.model, [other.optimizer]))
        results.append(
            {
                "saved": saved,
                "loaded": holdings(other),
                "later": [later, other.train(3)],
                "ends": [end, holdings(other)],
            }
        )
    return results


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    """Every placement and optimizer state, the schedule of the rates in mid-warmup, with and without async saving."""
    ranks = run_ranks(_resume, 2, str(tmp_path))
    for case in zip(*ranks, strict=True):
        assert case[0]["later"][0] == case[0]["later"][1]
        assert_equal([result["loaded"] for result in case], [result["saved"] for result in case])
        assert_equal([result["ends"][1] for result in case], [result["ends"][0] for result in case])
