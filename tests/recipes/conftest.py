"""Runs of recipes that take seconds."""

import json
import shutil

import pytest

from genrec.recipes import ranking, retrieval

RECIPES = {"ranking": ranking.main, "retrieval": retrieval.main}

TINY = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "data.batch_size=8",
    "data.max_seqlen=16",
    "data.num_workers=0",
    "model.hidden_dim=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "data.synthetic.num_users=60",
    "data.synthetic.num_items=40",
    "data.synthetic.events_per_user=40",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One folder of prepared data for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(cache, tmp_path, monkeypatch):
    """Run a recipe in this process with tiny settings; returns the exit code."""
    monkeypatch.setenv("GENREC_CACHE", str(cache))

    def run(recipe, *words, tiny=True):
        return RECIPES[recipe]([*(TINY if tiny else []), f"run.dir={tmp_path / 'run'}", *words])

    return run


@pytest.fixture
def measure(launch, tmp_path):
    """Run a recipe in a fresh folder and return its metrics."""

    def run(recipe, *words, keep=False):
        if not keep:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert launch(recipe, *words) == 0
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    return run
