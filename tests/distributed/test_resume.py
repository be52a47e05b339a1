"""A run of the stock Trainer over two ranks, its batches prepared ahead, stopped in mid-epoch and taken on."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from genrec.callbacks import LoaderPosition, StepSeed
from genrec.data import SequenceDataModule
from genrec.data.synthetic import Synthetic
from genrec.models import HSTURetrieval
from genrec.parallel import HybridParallelStrategy
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded_runs import holdings, merged
from tests.distributed.training import Losses, trainer

EPOCHS, STEPS = 2, 8
"""Of `STEPS` batches each."""


class SaveAt(L.Callback):
    """Saves after one training step."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _fit(folder: str, pipeline: str, *callbacks: L.Callback, resume: str | None = None) -> dict[str, Any]:
    """Losses, and all weights and optimizer states at the end; dropout and sampled negatives draw in each step."""
    torch.manual_seed(3)
    synthetic = Synthetic(kind="retrieval", num_users=16 * STEPS, num_items=40, events_per_user=20)
    data = SequenceDataModule(synthetic, "retrieval", max_seqlen=12, batch_size=8, cache_dir=folder, seed=1)
    model = HSTURetrieval(
        data.schema.num_items, hidden_dim=16, max_seqlen=12, num_layers=1, num_heads=2, dropout=0.2, input_dropout=0.2,
        loss="sampled_softmax", num_negatives=8, table_optimizer="adagrad", table_learning_rate=0.05,
        schedule="cosine", warmup_steps=3, learning_rate=0.01,
    )  # fmt: skip
    losses = Losses()
    run = trainer(
        HybridParallelStrategy(pipeline=pipeline, sharding="row_wise"), max_epochs=EPOCHS, val_check_interval=5,
        limit_val_batches=1, callbacks=[StepSeed(5), LoaderPosition(), losses, *callbacks],
    )  # fmt: skip
    run.fit(model, data, ckpt_path=resume)
    assert run.global_step == EPOCHS * STEPS
    held = SimpleNamespace(model=model, dims={}, optimizer=run.strategy.optimizers[0])
    return {"losses": losses.values, "end": holdings(held)}


def _both(rank: int, world_size: int, folder: str, cases: list[tuple[str, int]]) -> list[dict[str, Any]]:
    results = []
    for pipeline, step in cases:
        path = f"{folder}/{pipeline}-{step}.ckpt"
        whole = _fit(folder, pipeline, SaveAt(step, path))
        results.append({"whole": whole, "rest": _fit(folder, pipeline, resume=path)})
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What each rank has, by pipeline and by the step that was saved, which is a random one of an epoch's middle."""
    folder: Path = tmp_path_factory.mktemp("resume")
    draw = random.Random()
    # One in the first epoch, one in the second, never an epoch's last.
    steps = [draw.randrange(1, STEPS), STEPS + draw.randrange(1, STEPS)]
    cases = [("sparse_dist", steps[0]), ("sparse_dist", steps[1]), ("none", steps[0])]
    ranks = run_ranks(_both, 2, str(folder), cases, preload=["genrec.parallel.checkpoint", "genrec.data.datamodule"])
    return dict(zip(cases, (list(case) for case in zip(*ranks, strict=True)), strict=True))


def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(runs):
    for (pipeline, step), ranks in runs.items():
        whole, rest = ranks[0]["whole"]["losses"], ranks[0]["rest"]["losses"]
        assert len(whole) == EPOCHS * STEPS
        assert rest == whole[step:], (pipeline, step)
        expected, actual = (merged([rank[name]["end"] for rank in ranks]) for name in ("whole", "rest"))
        assert actual.keys() == expected.keys()
        different = [key for key in actual if not torch.equal(actual[key], expected[key])]
        assert not different, (pipeline, step, different)


def test_the_pipeline_changes_nothing(runs):
    plain, *piped = sorted(runs, key=lambda case: case[0] != "none")
    for case in piped:
        losses = runs[case][0]["whole"]["losses"]
        assert losses == pytest.approx(runs[plain][0]["whole"]["losses"], rel=1e-6)
