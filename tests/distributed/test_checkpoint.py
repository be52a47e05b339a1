"""Checkpoints of sharded runs over real gloo processes: exact resuming, resharding, one process and back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from genrec.models import HSTURetrieval
from genrec.parallel import checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded_runs import Run, holdings, merged

PLACEMENTS = ("row_wise", "table_wise", "column_wise")
OPTIMIZERS = ("adagrad", "rowwise_adagrad")
PRELOAD = ["megatron.core.tensor_parallel", "genrec.parallel.parallelize", "genrec.parallel.checkpoint"]


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
        run.save(path, async_save=asynchronous)
        later, end = run.train(3), holdings(run)
        other = Run(placement, optimizer, dynamic=optimizer == "adagrad")
        other.train(1)
        other.load(path)
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


CASES = [("adagrad", True), ("rowwise_adagrad", False)]


def _hold(rank: int, world: int, folder: str, saved: str | None, split: int, placements: list[str]) -> list[Any]:
    """For each case: load (or start), say what the ranks hold, save, train on."""
    results = []
    for (optimizer, dynamic), placement in zip(CASES, placements, strict=True):
        run = Run(placement, optimizer, dynamic, split)
        if saved is None:
            run.train(3)
        else:
            run.load(f"{saved}-{optimizer}.ckpt")
        held = holdings(run)
        run.save(f"{folder}/{world}-{split}-{optimizer}.ckpt")
        results.append({"held": held, "losses": run.train(2)})
    return results


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """A run that moves over 1, 2, 4 (tensor parallel 2), 2 (tensor parallel 2) and 1 ranks, with other placements."""
    folder, saved, results = tmp_path_factory.mktemp("chain"), None, []
    for world, split, placements in (
        (1, 1, ["row_wise", "table_wise"]),
        (2, 1, ["column_wise", "row_wise"]),
        (4, 2, ["row_wise", "row_wise"]),
        (2, 2, ["table_wise", "table_wise"]),
        (1, 1, ["row_wise", "row_wise"]),
    ):
        ranks = run_ranks(_hold, world, str(folder), saved, split, placements, preload=PRELOAD)
        results.append([list(case) for case in zip(*ranks, strict=True)])
        saved = f"{folder}/{world}-{split}"
    return folder, results


def test_resharding_keeps_weights_and_optimizer_states(chain: tuple[Path, list[list[Any]]]):
    _, results = chain
    for link in results[1:]:
        for case, first in zip(link, results[0], strict=True):
            assert_equal([rank["held"] for rank in case], [rank["held"] for rank in first])
            for rank in case:
                assert rank["losses"] == pytest.approx(first[0]["losses"], rel=1e-5)


def _from_file(rank: int, world: int, folder: str, split: int) -> list[Any]:
    results = []
    for optimizer, dynamic in CASES:
        run = Run("row_wise", optimizer, dynamic, split)
        run.load(f"{folder}/auto-{optimizer}.ckpt")
        results.append({"held": holdings(run), "losses": run.train(2)})
    return results


def test_one_process_takes_a_sharded_run_on_and_gives_it_back(chain: tuple[Path, list[list[Any]]], capsys: Any):
    """A folder of 4 ranks becomes a file for strategy "auto", whose file goes on on 4 ranks."""
    folder, results = chain
    for number, (optimizer, dynamic) in enumerate(CASES):
        first = results[0][number][0]
        assert checkpoint.main([f"{folder}/4-2-{optimizer}.ckpt", f"{folder}/whole-{optimizer}.ckpt"]) == 0
        assert "step 3, epoch 0" in capsys.readouterr().out
        run = Run(None, optimizer, dynamic)
        run.resume(torch.load(f"{folder}/whole-{optimizer}.ckpt", weights_only=True), tensors=True)
        assert_equal([without_steps(holdings(run))], [first["held"]])
        torch.save(run.file(), f"{folder}/auto-{optimizer}.ckpt")
        before = {key: value.clone() for key, value in tensors(run.model.state_dict())}
        assert run.train(2) == pytest.approx(first["losses"], rel=1e-5)
        model = HSTURetrieval.load_from_checkpoint(f"{folder}/4-2-{optimizer}.ckpt")
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        # A folder also loads into the unsharded module without a file.
        direct = Run(None, optimizer, dynamic)
        direct.train(1)
        direct.load(f"{folder}/4-2-{optimizer}.ckpt")
        assert_equal([without_steps(holdings(direct))], [first["held"]])
        assert direct.train(2) == pytest.approx(first["losses"], rel=1e-5)
    for number, case in enumerate(zip(*run_ranks(_from_file, 4, str(folder), 2, preload=PRELOAD), strict=True)):
        first = results[0][number][0]
        assert_equal([rank["held"] for rank in case], [first["held"]])
        assert case[0]["losses"] == pytest.approx(first["losses"], rel=1e-5)


def tensors(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in state.items() if isinstance(value, torch.Tensor)]


def without_steps(held: dict[str, Any]) -> dict[str, Any]:
    """torch's Adagrad counts steps, which FBGEMM's does not, for a decay of the rate that genrec never uses."""
    return {key: value for key, value in held.items() if not (key.endswith(".step") and "tables." in key)}
