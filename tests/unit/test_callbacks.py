"""Curves, files of a run, seeds of steps."""

import json
import math
import os
from types import SimpleNamespace

import torch

from genrec.callbacks import RunFolder, StepSeed, draw_curves, read_curves


def test_curves_of_a_resumed_run_are_joined(tmp_path):
    """The later file wins where steps were repeated; empty cells and steps of other metrics are no points."""
    first, second = tmp_path / "version_0" / "metrics.csv", tmp_path / "version_1" / "metrics.csv"
    for path in (first, second):
        path.parent.mkdir()
    first.write_text("epoch,step,train/loss,val/auc\n0,9,1.0,\n0,9,,0.5\n1,19,0.9,\n")
    second.write_text("epoch,step,train/loss\n1,19,0.8\n2,29,0.7\n")
    os.utime(first, (1, 1))
    assert read_curves(tmp_path) == {"train/loss": {9: 1.0, 19: 0.8, 29: 0.7}, "val/auc": {9: 0.5}}


def test_curves_are_drawn(tmp_path):
    draw_curves({"train/loss": {1: 1.0, 2: 0.5}, "val/loss": {2: 0.6}, "val/auc": {2: 0.7}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_from_nothing(tmp_path):
    draw_curves({}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_files_of_a_run(tmp_path):
    folder = RunFolder(tmp_path / "run", "seed: 1\n")
    folder.start({"seed": 1})
    folder.finish({"test/b": math.nan, "test/a": 0.5, "test/c": math.inf}, {"seed": 1, "used": ["torch"]})
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 1\n"
    text = (tmp_path / "run/metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0) == {"test/a": 0.5, "test/b": None, "test/c": None}
    assert list(json.loads(text)) == ["test/a", "test/b", "test/c"]
    assert json.loads((tmp_path / "run/environment.json").read_text())["used"] == ["torch"]
    assert not list((tmp_path / "run").glob("*.part"))


def trainer_of(rank, **strategy):
    return SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(**strategy))


def test_ranks_that_share_a_batch_draw_alike():
    seeds = [StepSeed(1).seed_of(trainer_of(rank, data_parallel_rank=rank // 2), 0) for rank in range(4)]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert seeds[2] == StepSeed(1).seed_of(trainer_of(1), 0)


def draws(seed, rank, batches, skipped=0):
    """First random number of each batch; `skipped` draws of validation come between."""
    callback, trainer, numbers = StepSeed(seed), trainer_of(rank), []
    callback.on_train_start(trainer, None)
    for index in range(batches):
        numbers.append(torch.rand(()).item())
        callback.on_train_batch_end(trainer, None, None, None, index)
        torch.rand(skipped)
        callback.on_validation_end(trainer, None)
    return numbers, callback.state_dict()


def test_seeds_of_steps():
    numbers, state = draws(1, 0, 6)
    assert len(set(numbers)) == 6
    assert draws(1, 0, 6, skipped=7)[0] == numbers
    assert not set(draws(1, 1, 6)[0]) & set(numbers)
    assert not set(draws(2, 0, 6)[0]) & set(numbers)
    assert state == {"batches": 6}


def test_a_resumed_run_draws_what_comes_next():
    numbers, _ = draws(5, 0, 4)
    _, state = draws(5, 0, 2)
    callback, trainer = StepSeed(5), trainer_of(0)
    callback.load_state_dict(state)
    callback.on_train_start(trainer, None)
    assert torch.rand(()).item() == numbers[2]
