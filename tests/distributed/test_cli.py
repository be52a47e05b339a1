"""Recipes over several processes from the command line: as README and docs show them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genrec.parallel.checkpoint import read_checkpoint
from tests.recipes.conftest import TINY
from tests.recipes.test_docs import commands

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *[command for command in commands("python -m genrec.recipes.") if "trainer.devices=" in command],
    *[command for command in commands("torchrun") if "--nnodes" not in command],
]
# On CPU, with two processes whatever the page says, and the tables that it names.
SMALL = [*TINY, "trainer.accelerator=cpu", "model.num_heads=4"]


def _words(command: str) -> list[str]:
    words = command.split()
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:]]
        words[words.index("--nproc-per-node") + 1] = "2"
        return words
    return ["2" if word == "trainer.devices=" else word.replace("devices=4", "devices=2") for word in words[1:]]


def _run(folder: Path, *words: str) -> tuple[dict[str, float], str]:
    """Metrics and output of a run of Python in `folder`, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *words, f"run.dir={folder / 'run'}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "run" / "metrics.json").read_text()), result.stdout + result.stderr


def test_the_pages_show_both_ways():
    assert any(command.startswith("torchrun") for command in COMMANDS)
    assert any(command.startswith("python") for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path):
    metrics, output = _run(tmp_path, *_words(command), *SMALL, "run.predict=true")
    assert metrics["test/loss"] > 0
    assert "Tables over 2 ranks" in output
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_dir()
    split = "tensor_parallel_size=2" in command
    names = sorted(path.name for path in (tmp_path / "run").glob("predictions-*"))
    assert names == ["predictions-0.parquet", *([] if split else ["predictions-1.parquet"])]


def _steps(folder: Path) -> int:
    """Steps in the checkpoint `last` of a run."""
    return read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    recipe = ["-m", "genrec.recipes.ranking", *SMALL, "strategy.pipeline=sparse_dist"]
    _run(tmp_path, *recipe, "trainer.devices=2")
    assert _steps(tmp_path) == 3
    # Two processes again, tensor-parallel now; then one, which reads their folder and leaves a file.
    split = ["trainer.devices=2", "strategy.tensor_parallel_size=2"]
    _run(tmp_path, *recipe, *split, "trainer.max_epochs=2", "ckpt_path=last")
    assert _steps(tmp_path) == 6
    metrics, output = _run(tmp_path, *recipe[:-1], "trainer.devices=1", "trainer.max_epochs=3", "ckpt_path=last")
    assert metrics["test/loss"] > 0
    assert "Tables over" not in output
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.is_file()
    assert torch.load(last, weights_only=True)["global_step"] == 9
