"""Recipes over several processes from the command line: as README and docs show them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_pages_show_both_ways():
    assert any(command.startswith("torchrun") for command in COMMANDS)
    assert any(command.startswith("python") for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *_words(command), *SMALL, f"run.dir={tmp_path / 'run'}", "run.predict=true"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/loss"] > 0
    assert "Tables over 2 ranks" in result.stdout + result.stderr
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_dir()
    split = "tensor_parallel_size=2" in command
    names = sorted(path.name for path in (tmp_path / "run").glob("predictions-*"))
    assert names == ["predictions-0.parquet", *([] if split else ["predictions-1.parquet"])]
