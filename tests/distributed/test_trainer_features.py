"""Every feature of the stock Trainer under the strategy, with and without a pipeline, on one rank and on two."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from genrec.parallel import HybridParallelStrategy
from tests.distributed import training
from tests.distributed.ranks import run_ranks

STEPS = 7
FEATURES: dict[str, Callable[..., dict[str, Any]]] = {}


def feature(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    FEATURES[function.__name__] = function
    return function


class Seen(L.Callback):
    """What callbacks see of a run: batches, validations, gradient norms."""

    def __init__(self) -> None:
        self.users: list[int] = []
        self.validations: list[int] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        assert batch.features.keys() == module.tables.feature_names, "a real batch, prepared once"
        self.users.append(int(batch.features["item"].values().sum()))

    def on_validation_end(self, trainer, module):
        self.validations.append(trainer.global_step)

    def on_before_zero_grad(self, trainer, module, optimizer):
        # Called before a new step: the gradients are those of the last one, clipped.
        grads = [p.grad for p in module.body.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))


def fit(pipeline: str, kind: str = "ranking", model: dict[str, Any] | None = None, steps: int = STEPS,
        callbacks: tuple = (), **options: Any) -> tuple[L.Trainer, dict[str, Any]]:  # fmt: skip
    losses, seen = training.Losses(), Seen()
    build, rows = training.MODELS[kind]
    run = training.trainer(
        HybridParallelStrategy(pipeline=pipeline, sharding="row_wise"),
        **{"max_epochs": 2, "callbacks": [losses, seen, *callbacks], "limit_val_batches": 0, **options},
    )
    run.fit(build(**(model or {})), datamodule=training.Batches(rows, steps))
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    return run, {
        "losses": losses.values, "batches": losses.batches, "step": run.global_step, "validations": seen.validations,
        "norms": seen.norms, "rates": rates, "users": seen.users,
    }  # fmt: skip


@feature
def plain(pipeline: str) -> dict[str, Any]:
    return fit(pipeline)[1] | {"expected": {"batches": [*range(STEPS)] * 2, "step": 2 * STEPS}}


@feature
def mid_epoch_validation(pipeline: str) -> dict[str, Any]:
    run, facts = fit(pipeline, val_check_interval=3, limit_val_batches=1.0, num_sanity_val_steps=1)
    facts["val_loss"] = float(run.callback_metrics["val/loss"])
    # One more for the sanity check. Validation leaves the training as it is.
    same = facts["losses"] == pytest.approx(fit(pipeline)[1]["losses"], rel=1e-6)
    facts["same"] = same
    return facts | {"expected": {"validations": [0, 3, 6, 10, 13], "step": 14, "same": True}}


@feature
def retrieval_validation(pipeline: str) -> dict[str, Any]:
    run, facts = fit(pipeline, "retrieval", val_check_interval=0.5, limit_val_batches=1.0)
    facts["val"] = [float(run.callback_metrics[name]) for name in ("val/loss", "val/hr@5", "val/mrr")]
    return facts | {"expected": {"validations": [3, 6, 10, 13]}}


@feature
def accumulation(pipeline: str) -> dict[str, Any]:
    _, facts = fit(pipeline, accumulate_grad_batches=3)
    # Batches 0-2, 3-5 and the last one alone, in each epoch.
    return facts | {"expected": {"batches": [*range(STEPS)] * 2, "step": 6}}


@feature
def clipping(pipeline: str) -> dict[str, Any]:
    _, facts = fit(pipeline, gradient_clip_val=0.05)
    facts["clipped"] = max(facts["norms"]) <= 0.05 * 1.001 and min(facts["norms"]) > 0.04
    return facts | {"expected": {"clipped": True, "step": 14}}


@feature
def schedule(pipeline: str) -> dict[str, Any]:
    model = {"schedule": "linear", "warmup_steps": 2, "final_factor": 0.1}
    _, facts = fit(pipeline, model=model)
    # The tables too.
    facts["factors"] = [round(facts["rates"][0] / 0.01, 6), round(facts["rates"][-1] / 0.05, 6)]
    return facts | {"expected": {"factors": [0.1, 0.1]}}


@feature
def max_steps(pipeline: str) -> dict[str, Any]:
    _, facts = fit(pipeline, max_steps=9, max_epochs=-1)
    return facts | {"expected": {"step": 9, "batches": [*range(STEPS), 0, 1]}}


@feature
def limits(pipeline: str) -> dict[str, Any]:
    run, facts = fit(pipeline, limit_train_batches=4, limit_val_batches=1, max_epochs=3)
    facts["val"] = run.num_val_batches
    return facts | {"expected": {"step": 12, "batches": [*range(4)] * 3, "val": [1]}}


@feature
def limit_as_a_share(pipeline: str) -> dict[str, Any]:
    return fit(pipeline, limit_train_batches=0.5)[1] | {"expected": {"step": 6, "batches": [0, 1, 2] * 2}}


@feature
def fast_dev_run(pipeline: str) -> dict[str, Any]:
    run, facts = fit(pipeline, fast_dev_run=2)
    facts["val"] = run.num_val_batches
    return facts | {"expected": {"step": 2, "batches": [0, 1], "val": [2]}}


@feature
def overfit_batches(pipeline: str) -> dict[str, Any]:
    _, facts = fit(pipeline, overfit_batches=2)
    facts["repeats"] = facts["users"][:2] == facts["users"][2:]
    return facts | {"expected": {"step": 4, "batches": [0, 1] * 2, "repeats": True}}


@feature
def bf16_mixed(pipeline: str) -> dict[str, Any]:
    _, facts = fit(pipeline, precision="bf16-mixed")
    full = fit(pipeline)[1]["losses"]
    facts["near"] = facts["losses"] == pytest.approx(full, rel=0.05, abs=0.05)
    facts["differs"] = facts["losses"] != pytest.approx(full, rel=1e-5)
    return facts | {"expected": {"near": True, "differs": True, "step": 14}, "tolerance": 0.05}


@feature
def early_stopping(pipeline: str) -> dict[str, Any]:
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0, mode="min")
    _, facts = fit(pipeline, callbacks=(stop,), val_check_interval=3, limit_val_batches=1.0, max_epochs=5)
    return facts | {"expected": {"step": 6, "validations": [3, 6]}}


@feature
def loggers_and_rates(pipeline: str) -> dict[str, Any]:
    import torch.distributed as dist

    where = [tempfile.mkdtemp()]
    dist.broadcast_object_list(where)
    loggers = [CSVLogger(where[0], name="csv"), TensorBoardLogger(where[0], name="tensorboard")]
    _, facts = fit(
        pipeline, callbacks=(LearningRateMonitor("step"),), logger=loggers, log_every_n_steps=1,
        limit_val_batches=1.0, model={"schedule": "linear", "warmup_steps": 2},
    )  # fmt: skip
    dist.barrier()
    with (Path(where[0]) / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    facts["logged_steps"] = [int(row["step"]) for row in rows if row["train/loss"]]
    facts["columns"] = sorted({"train/loss", "val/loss", "lr-CombinedOptimizer/dense"} - set(rows[0]))
    facts["events"] = bool(list((Path(where[0]) / "tensorboard").rglob("events*")))
    return facts | {"expected": {"logged_steps": [*range(2 * STEPS)], "events": True}}


@feature
def validate_test_predict(pipeline: str) -> dict[str, Any]:
    run, facts = fit(pipeline, limit_val_batches=1.0)
    module, data = run.lightning_module, training.Batches(training.ranking_rows, STEPS, cases=5)
    facts["val"] = run.validate(module, datamodule=data, verbose=False)[0]
    facts["test"] = run.test(module, datamodule=data, verbose=False)[0]
    predictions = run.predict(module, datamodule=data)
    facts["predicted"] = sorted(int(user) for part in predictions for user in part["user_id"])
    size, rank = run.strategy.data_parallel_size, run.strategy.data_parallel_rank
    facts["own"] = sorted(user for user in range(rank, 5, size) for _ in range(1 + user % 2))
    facts["agrees"] = facts["predicted"] == facts["own"]
    fresh = training.trainer(HybridParallelStrategy(sharding="row_wise"))
    facts["untrained"] = fresh.test(training.ranking_model(), datamodule=data, verbose=False)[0]
    return facts | {"expected": {"agrees": True}}


@feature
def manual_hooks_run_once(pipeline: str) -> dict[str, Any]:
    """A module whose transfer hook must not run twice, and a model that draws in it."""
    calls = []

    class Counting(training.Batches):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            calls.append(1)
            return self.trainer.lightning_module.prepare_batch(batch)

    losses = training.Losses()
    from genrec.callbacks import StepSeed

    run = training.trainer(
        HybridParallelStrategy(pipeline=pipeline, sharding="row_wise"), callbacks=[losses, StepSeed(3)], max_epochs=2
    )
    model = training.retrieval_model(loss="sampled_softmax", num_negatives=8, dropout=0.1)
    data = Counting(training.retrieval_rows, STEPS)
    run.fit(model, datamodule=data)
    calls_before = len(calls)
    vanished = "on_before_batch_transfer" not in vars(data)
    facts = {"losses": losses.values, "batches": losses.batches, "calls": calls_before, "vanished": vanished}
    evaluated = 2 * (4 // run.strategy.data_parallel_size)
    # Each rank draws its own negatives, so that the curve depends on the number of ranks.
    return facts | {"expected": {"calls": 2 * STEPS + evaluated, "vanished": True}, "tolerance": None}


def _run_all(rank: int, world_size: int, pipelines: list[str]) -> dict[str, Any]:
    return {f"{name}/{pipeline}": run(pipeline) for name, run in FEATURES.items() for pipeline in pipelines}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(_run_all, 1, ["none"])[0]


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_ranks(_run_all, 2, ["none", "base", "sparse_dist"])


@pytest.mark.parametrize("pipeline", ["none", "base", "sparse_dist"])
@pytest.mark.parametrize("name", list(FEATURES))
def test_feature(name, pipeline, alone, together):
    reference = alone[f"{name}/none"]
    plain = together[0][f"{name}/none"]
    for rank in together:
        facts = rank[f"{name}/{pipeline}"]
        for key, value in reference["expected"].items():
            assert reference[key] == value, f"{key} of one process"
        for key, value in facts["expected"].items():
            assert facts[key] == value, key
        assert facts["losses"] == pytest.approx(plain["losses"], rel=1e-6), "a pipeline changes nothing"
        tolerance = facts.get("tolerance", 1e-4)
        if tolerance:
            apart = 0.05 if tolerance > 1e-3 else 0.0
            assert facts["losses"] == pytest.approx(reference["losses"], rel=tolerance, abs=apart)
        for key in ("val", "test", "untrained", "val_loss", "factors"):
            if key in facts and tolerance:
                assert facts[key] == pytest.approx(reference[key], rel=1e-3, nan_ok=True), key
