"""The strategy where things are uneven or go wrong, with dynamic tables, and its plans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelSummary

from genrec.models import PredictionWriter
from genrec.parallel import HybridParallelStrategy
from tests.distributed import training
from tests.distributed.ranks import run_ranks


class Uneven(training.Batches):
    """Rank r of W has `train[r]` training batches, and the evaluation cases of its list."""

    def __init__(self, rows: Any, train: list[int], cases: list[list[int]], sized: bool = True) -> None:
        super().__init__(rows, max(train))
        self.train, self.split, self.sized = train, cases, sized

    def train_dataloader(self) -> Any:
        rank, size = self.place
        own = [self.rows(list(range(8))[rank::size], step) for step in range(self.train[rank])]
        return training.loader(own) if self.sized else Unsized(own)

    def evaluation(self) -> Any:
        own = self.split[self.place[0]]
        return training.loader([self.rows(own[start : start + 2], 1000) for start in range(0, len(own), 2)])

    val_dataloader = test_dataloader = predict_dataloader = evaluation


class Unsized:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def _fit(data: Any, kind: str = "ranking", model: dict[str, Any] | None = None, strategy: dict[str, Any] | None = None,
         **options: Any) -> tuple[L.Trainer, list[float]]:  # fmt: skip
    losses = training.Losses()
    run = training.trainer(
        HybridParallelStrategy(**{"sharding": "row_wise", **(strategy or {})}),
        **{"callbacks": [losses, *options.pop("callbacks", [])], **options},
    )
    run.fit(training.MODELS[kind][0](**(model or {})), datamodule=data)
    return run, losses.values


def _message(function: Any) -> str:
    try:
        function()
    except (ValueError, NotImplementedError, ImportError) as error:
        return str(error)
    return "no error"


def _uneven_training(pipeline: str, sized: bool) -> dict[str, Any]:
    data = Uneven(training.ranking_rows, [3, 5], [[], []], sized)
    run, losses = _fit(data, strategy={"pipeline": pipeline}, max_epochs=2, limit_val_batches=0)
    return {"losses": losses, "step": run.global_step}


def _uneven_evaluation(kind: str) -> dict[str, Any]:
    """Rank 0 has five cases in three batches, rank 1 one; then rank 1 has none at all."""
    out = {}
    for name, cases in {"less": [[0, 1, 2, 3, 4], [5]], "none": [[0, 1, 2, 3, 4, 5], []]}.items():
        data = Uneven(training.MODELS[kind][1], [2, 2], cases)
        run, _ = _fit(data, kind, limit_val_batches=1.0, num_sanity_val_steps=2)
        fitted = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")}
        where = [tempfile.mkdtemp()]
        dist.broadcast_object_list(where)
        writer = PredictionWriter(where[0])
        run.callbacks.append(writer)  # type: ignore[attr-defined]
        module = run.lightning_module
        predictions = run.predict(module, datamodule=data)
        out[name] = {
            "fit": fitted,
            "validate": run.validate(module, datamodule=data, verbose=False)[0],
            "test": run.test(module, datamodule=data, verbose=False)[0],
            "users": [int(user) for part in predictions for user in part["user_id"]],
            "files": sorted(path.name for path in Path(where[0]).iterdir()),
        }
    return out


def _dynamic(world_size: int) -> dict[str, list[float]]:
    """Dynamic tables, alone and beside static ones."""
    out = {}
    for name, model in {
        "all": {"embedding_backend": "hkv", "table_optimizer": "adam", "table_learning_rate": 0.01},
        "one": {"embedding_tables": {"item": {"backend": "hkv", "capacity": 1024}}},
    }.items():
        for pipeline in ("none", "sparse_dist"):
            out[f"{name}/{pipeline}"] = training.train("ranking", 12, {"pipeline": pipeline}, model)
    return out


def _errors() -> dict[str, str]:
    data = training.Batches(training.ranking_rows, 2)
    wide = {"embedding_dims": {"action": 8}}
    fit = lambda model=None, strategy=None: _message(  # noqa: E731
        lambda: _fit(data, model=model, strategy=strategy, limit_val_batches=0)
    )
    return {
        "adam": fit({"table_optimizer": "adam"}),
        "memory": fit(strategy={"memory": 1e-6}),
        "column": fit(strategy={"sharding": "column_wise"}),
        "mixed": fit(strategy={"tables": {"action": "data_parallel"}}),
        "apart": fit(wide, {"tables": {"action": "data_parallel"}}),
        "unknown": fit(strategy={"tables": {"itm": "row_wise"}}),
        "dynamic": fit({"embedding_backend": "hkv"}, {"tables": {"item": "table_wise"}}),
        "heads": fit({"num_heads": 3, "hidden_dim": 12}, {"tensor_parallel_size": 2}),
        "pipeline": _message(lambda: HybridParallelStrategy(pipeline="fast")),  # type: ignore[arg-type]
        "precision": _message(lambda: training.trainer(HybridParallelStrategy(), precision="64-true")),
        "world": _message(lambda: training.trainer(HybridParallelStrategy(tensor_parallel_size=3))),
    }


def _plans() -> dict[str, Any]:
    summary = ModelSummary(max_depth=1)
    model = {"embedding_dims": {"action": 8}, "table_optimizer": "adagrad"}
    run, _ = _fit(
        training.Batches(training.ranking_rows, 2), model=model, callbacks=[summary], enable_model_summary=True,
        strategy={"tables": {"item": "column_wise", "action": "table_wise"}}, limit_val_batches=0,
    )  # fmt: skip
    (shown,) = [c for c in run.callbacks if isinstance(c, ModelSummary)]  # type: ignore[attr-defined]
    module = run.lightning_module
    whole = sum(p.numel() for p in training.ranking_model(**model).parameters())
    return {
        "plan": str(run.strategy.plan),
        "kinds": {table.name: table.sharding for table in run.strategy.plan.tables},
        "bytes": {table.name: table.bytes for table in run.strategy.plan.tables},
        "shown": shown._summary(run, module).total_parameters,
        "whole": whole,
        "again": _message(lambda: training.trainer(HybridParallelStrategy()).validate(module, datamodule=None)),
    }


def _everything(rank: int, world_size: int) -> dict[str, Any]:
    out: dict[str, Any] = {"dynamic": _dynamic(world_size), "plans": _plans()}
    if world_size == 1:
        data = training.Batches(training.ranking_rows, 2, cases=6)
        out["evaluation"] = {}
        for kind in training.MODELS:
            data = Uneven(training.MODELS[kind][1], [2], [[0, 1, 2, 3, 4, 5]])
            run, _ = _fit(data, kind, limit_val_batches=1.0)
            out["evaluation"][kind] = run.test(run.lightning_module, datamodule=data, verbose=False)[0]
        return out
    out["training"] = {
        f"{pipeline}/{sized}": _uneven_training(pipeline, sized)
        for pipeline in ("none", "sparse_dist")
        for sized in (True, False)
    }
    out["evaluation"] = {kind: _uneven_evaluation(kind) for kind in training.MODELS}
    out["errors"] = _errors()
    return out


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(_everything, 1)[0]


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_ranks(_everything, 2)


def test_training_drops_what_only_some_ranks_have(together):
    reference = together[0]["training"]["none/True"]["losses"]
    assert len(reference) == 6
    for rank in together:
        for facts in rank["training"].values():
            assert facts["step"] == 6
            assert facts["losses"] == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("kind", list(training.MODELS))
@pytest.mark.parametrize("share", ["less", "none"])
def test_evaluation_counts_every_case_once(kind, share, alone, together):
    expected = alone["evaluation"][kind]
    users = [facts["evaluation"][kind][share]["users"] for facts in together]
    times = {user: 1 + user % 2 if kind == "ranking" else 1 for user in range(6)}
    assert sorted(user for own in users for user in own) == sorted(u for u, n in times.items() for _ in range(n))
    for rank in together:
        facts = rank["evaluation"][kind][share]
        assert facts["test"] == pytest.approx(expected, rel=1e-4, nan_ok=True)
        as_validated = {key.replace("val/", "test/"): value for key, value in facts["validate"].items()}
        assert as_validated == pytest.approx(expected, rel=1e-4, nan_ok=True)
        assert {k.replace("val/", "test/"): v for k, v in facts["fit"].items()} == pytest.approx(
            expected, rel=1e-4, nan_ok=True
        )
    names = together[0]["evaluation"][kind][share]["files"]
    assert names == ["predictions-0.parquet", "predictions-1.parquet"][: len(names)]


@pytest.mark.parametrize("tables", ["all", "one"])
def test_dynamic_tables_learn_as_on_one_rank(tables, alone, together):
    expected = alone["dynamic"][f"{tables}/none"]
    assert expected[-1] < expected[0]
    for facts in [alone, *together]:
        for pipeline in ("none", "sparse_dist"):
            assert facts["dynamic"][f"{tables}/{pipeline}"] == pytest.approx(expected, rel=1e-4)


def test_errors_name_the_cure_on_every_rank(together):
    assert together[0]["errors"] == together[1]["errors"]
    errors = together[0]["errors"]
    for name, parts in {
        "adam": ["tables on CPU know no adam", "embedding.optimizer.name=rowwise_adagrad"],
        "memory": ["The tables can't be placed", "use more ranks"],
        "column": ["rowwise_adagrad", "column_wise", "choose embedding.optimizer.name=adagrad"],
        "mixed": ["'action'", "give tables of a width one kind"],
        "unknown": ["['itm']", "'item'"],
        "dynamic": ["['item']", "row_wise"],
        "heads": ["num_heads 3", "tensor_parallel_size"],
        "pipeline": ["none, base, sparse_dist", "'fast'"],
        "precision": ["bf16-mixed"],
        "world": ["tensor_parallel_size 3", "2 processes"],
    }.items():
        for part in parts:
            assert part in errors[name], name
    assert errors["apart"] == "no error"


def test_plan_and_summary_show_the_whole_model(alone, together):
    for facts in together:
        plans = facts["plans"]
        assert plans["kinds"] == {"item": "column_wise", "action": "table_wise"}
        # 24 rows of 16 columns, 4 bytes each and as many of Adagrad's: half on each rank.
        assert plans["bytes"]["item"] == {0: 24 * 8 * 8, 1: 24 * 8 * 8}
        assert sum(plans["bytes"]["action"].values()) == 3 * 8 * 8
        assert plans["plan"].splitlines()[0].split()[:5] == ["table", "sharding", "rows", "dim", "optimizer"]
        assert plans["shown"] == plans["whole"]
        assert "sharded already" in plans["again"]


# Runs of their own ----------------------------------------------------------------------------------------------------

CRASH = """
    import os, signal, sys
    import lightning as L
    from tests.distributed import training
    from genrec.parallel import HybridParallelStrategy

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_rank == int(sys.argv[1]) and batch_idx == 3:
                if sys.argv[2] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("this rank fails")

    run = training.trainer(HybridParallelStrategy(pipeline=sys.argv[3]), devices=2, callbacks=[Crash()],
                           limit_val_batches=0)
    run.fit(training.ranking_model(), datamodule=training.Batches(training.ranking_rows, 100))
"""


@pytest.mark.parametrize(("rank", "how", "pipeline"), [(1, "kill", "none"), (1, "raise", "sparse_dist")])
def test_a_rank_that_dies_ends_the_others(rank, how, pipeline, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(textwrap.dedent(CRASH))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(rank), how, pipeline], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.wait(timeout=400) != 0
        deadline = time.monotonic() + 60
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not _group_lives(process.pid), "no rank is left behind"
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_registered_without_lightning_being_imported():
    code = """
        import sys, genrec
        assert not {"torch", "lightning", "torchrec"} & set(sys.modules)
        import lightning as L
        strategy = L.Trainer(strategy="hybrid_parallel", accelerator="cpu", devices=1, logger=False).strategy
        assert type(strategy).__name__ == "HybridParallelStrategy"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_draws_differ_between_data_parallel_ranks_alone():
    from types import SimpleNamespace

    from genrec.callbacks import StepSeed

    seeds = StepSeed(5)
    trainers = [
        SimpleNamespace(strategy=SimpleNamespace(data_parallel_rank=rank // 2), global_rank=rank) for rank in range(4)
    ]
    drawn = [seeds.seed_of(trainer, 7) for trainer in trainers]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert torch.Generator().manual_seed(drawn[0]).initial_seed() == drawn[0]
