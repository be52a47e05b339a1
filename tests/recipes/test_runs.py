"""Whole runs on synthetic and real data: files, repeatability, resuming, Ctrl-C, errors."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch

from genrec.attention.registry import registry
from genrec.config import RankingConfig, RetrievalConfig, load_config
from genrec.layers.ops import note_use
from tests.recipes.conftest import TINY


@pytest.mark.parametrize(("recipe", "schema"), [("ranking", RankingConfig), ("retrieval", RetrievalConfig)])
def test_files_of_a_run(recipe, schema, measure, tmp_path, capsys):
    registry.used.add("served an earlier run")
    note_use("served an earlier run")
    metrics = measure(recipe, "seed=4", "run.predict=true")
    run = tmp_path / "run"
    config = load_config(schema, run / "config.yaml")
    assert (config.seed, config.model.hidden_dim, config.run.dir) == (4, 16, str(run))
    assert (run / "curves.png").stat().st_size > 5000
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 4
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["attention_backends_used"] == ["torch"]
    assert list(environment["layer_backends_used"]) == ["torch"]
    assert len(environment["test_targets_hash"]) == 16
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list(run.glob("logs/csv/*/metrics.csv"))
    assert list(run.glob("logs/tensorboard/*/events*"))
    rows = pq.read_table(run / "predictions-0.parquet")
    assert rows.num_rows > 0
    wanted = ["auc/click", "gauc/like", "ne/long_view"] if recipe == "ranking" else ["hr@10", "ndcg@10", "mrr"]
    assert {f"test/{name}" for name in wanted} <= set(metrics)
    reachable = "best_reachable/auc/click" if recipe == "ranking" else "best_reachable/hr@10"
    assert 0.3 < metrics[reachable] < 1
    assert config.checkpoint.monitor in metrics
    printed = capsys.readouterr().out
    assert "best reachable" in printed
    assert "served by: torch" in printed


@pytest.mark.parametrize("recipe", ["ranking", "retrieval"])
def test_the_same_seed_gives_the_same_metrics(recipe, measure):
    first = measure(recipe, "seed=3")
    assert measure(recipe, "seed=3") == first
    assert measure(recipe, "seed=5") != first


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("ranking", []), ("retrieval", ["loss.name=sampled_softmax", "loss.num_negatives=4"])],
)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, words, measure):
    """At the end of an epoch; dropout, negatives, order of the batches, schedule and optimizers included."""
    words = [*words, "schedule.name=cosine", "schedule.total_steps=9", "optimizer.learning_rate=0.02"]
    whole = measure(recipe, *words, "trainer.max_epochs=3")
    measure(recipe, *words, "trainer.max_epochs=1")
    assert measure(recipe, *words, "trainer.max_epochs=3", "ckpt_path=last", keep=True) == whole


INTERRUPTING = """
import os, signal
from genrec.models import HSTURetrieval

class Interrupting(HSTURetrieval):
    def training_step(self, batch, index):
        if self.global_step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, index)
"""


def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(measure, launch, tmp_path, monkeypatch, capsys):
    """Ctrl-C comes in batch 4 of epoch 2; what is left of the epoch follows after resuming, in the same order."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "interrupting_model.py").write_text(INTERRUPTING)
    words = ["trainer.limit_train_batches=6", "loss.name=sampled_softmax", "loss.num_negatives=4"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = measure("retrieval", *words, "trainer.max_epochs=3")
    expected = torch.load(last, weights_only=False)["state_dict"]
    stopping = "model.class_path=interrupting_model.Interrupting"
    assert launch("retrieval", *words, "trainer.max_epochs=3", stopping) == 130
    assert torch.load(last, weights_only=False)["global_step"] == 10
    assert f"Checkpoint: {last}" in capsys.readouterr().err
    assert measure("retrieval", *words, "trainer.max_epochs=3", "ckpt_path=last", keep=True) == whole
    resumed = torch.load(last, weights_only=False)["state_dict"]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("ranking", ["model.name=mlp"]),
        ("ranking", ["model.form=paper", "attention.relative_bias=both", "model.action_mode=interleaved"]),
        ("ranking", ["data.tasks=[like]", "model.per_user_metrics=false", "trainer.accumulate_grad_batches=2"]),
        ("ranking", ["embedding.optimizer.name=rowwise_adagrad", "embedding.dims.item=8", "model.recompute=true"]),
        ("ranking", ["data.stochastic_length=1.6", "data.token_budget=200", "early_stopping.patience=1"]),
        ("retrieval", ["model.name=sasrec", "attention.backend=torch"]),
        ("retrieval", ["model.name=popularity"]),
        ("retrieval", ["embedding.optimizer.name=adagrad", "model.similarity=cosine", "model.temperature=0.05"]),
        (
            "retrieval",
            [
                "loss.name=sampled_softmax",
                "loss.negative_sampling=popularity",
                "evaluation.top_ks=[3]",
                "checkpoint.monitor=val/mrr",
            ],
        ),
    ],
)
def test_settings_run(recipe, words, measure):
    metrics = measure(recipe, *words)
    assert math.isfinite(metrics["test/loss"])


def test_a_class_of_ones_own(measure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_recipe_model.py").write_text(
        "from genrec.models import HSTURetrieval\n\n"
        "class Mine(HSTURetrieval):\n"
        "    def __init__(self, *args, factor=1.0, **options):\n"
        "        super().__init__(*args, **options)\n"
        "        self.factor = factor\n\n"
        "    def evaluation_step(self, batch, stage):\n"
        "        super().evaluation_step(batch, stage)\n"
        "        self.log(f'{stage}/factor', self.factor, batch_size=1)\n"
    )
    metrics = measure("retrieval", "model.class_path=own_recipe_model.Mine", "model.options.factor=7")
    assert metrics["test/factor"] == 7.0


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("ranking", ["data.name=movielens"], "data.name=movielens needs data.path"),
        ("ranking", ["data.name=movielens", "data.path=/nowhere/ml"], "/nowhere/ml"),
        ("retrieval", ["data.name=amazon_sequences", "data.path=/nowhere/Beauty.txt"], "/nowhere/Beauty.txt"),
        ("retrieval", ["data.name=parquet", "data.path=/nowhere/x.parquet"], "/nowhere/x.parquet"),
        ("ranking", ["data.tasks=[share]"], "no task share; it has: click, like, long_view"),
        ("retrieval", ["evaluation.top_ks=[3]"], "could not find the monitored key"),
        ("ranking", ["ckpt_path=last"], "there is no checkpoint"),
        ("ranking", ["model.class_path=nowhere.Model"], "model.class_path=nowhere.Model"),
        ("ranking", ["attention.backend=tritn"], "Unknown attention backend 'tritn'"),
        ("ranking", ["model.hidden_dim=15"], "hidden_dim 15 is not a multiple of num_heads 2"),
    ],
)
def test_what_the_user_can_cure_is_one_line(recipe, words, message, launch, capsys):
    assert launch(recipe, *words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(cache, tmp_path, measure):
    words = [*TINY, f"run.dir={tmp_path / 'run'}", "trainer.limit_train_batches=null", "checkpoint.every_n_steps=1"]
    environment = {**os.environ, "GENREC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "genrec.recipes.retrieval", *words, "trainer.max_epochs=100000"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "Resume with: python -m genrec.recipes.retrieval" in output
    assert output.rstrip().endswith("ckpt_path=last")
    step = torch.load(last, weights_only=False)["global_step"]
    metrics = measure(
        "retrieval", f"trainer.max_steps={step + 2}", "trainer.max_epochs=-1", "ckpt_path=last", keep=True
    )
    assert torch.load(last, weights_only=False)["global_step"] == step + 2
    assert math.isfinite(metrics["test/loss"])


@pytest.mark.parametrize("name", ["ranking_ml100k", "retrieval_ml100k"])
def test_movielens_100k(name, data_root, measure):
    metrics = measure(name.partition("_")[0], "--config", name, f"data.path={data_root / 'ml-100k'}")
    wanted = ["auc/like", "gauc/like", "auc/love"] if name.startswith("ranking") else ["hr@10", "ndcg@10"]
    assert all(0 <= metrics[f"test/{key}"] <= 1 for key in wanted)


def test_beauty(data_root, measure):
    path = data_root / "amazon-beauty" / "Beauty.txt"
    metrics = measure("retrieval", "--config", "retrieval_beauty", f"data.path={path}", "data.batch_size=64")
    assert 0 <= metrics["test/ndcg@5"] <= metrics["test/hr@5"] <= metrics["test/hr@10"] <= 1
