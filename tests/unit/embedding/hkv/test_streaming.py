"""The recipe with ever-new items, and the comparison that the documentation shows, both small."""

import importlib.util
import re
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from genrec.embedding.hkv import HkvOptions
from genrec.recipes import ranking

ROOT = Path(__file__).resolve().parents[4]


def test_the_documented_example(capsys):
    page = (ROOT / "docs" / "dynamic-embeddings.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec(compile(example, "dynamic-embeddings.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.split() == ["3"]


def test_the_documented_options_are_the_options():
    page = (ROOT / "docs" / "dynamic-embeddings.md").read_text().split("## Options")[1].split("## Tiers")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", page, re.M)))
    assert sorted(named) == sorted(field.name for field in fields(HkvOptions))


def test_the_streaming_recipe_runs_on_raw_ids(tmp_path):
    code = ranking.main([
        "--config", str(ROOT / "recipes" / "ranking_streaming.yaml"), f"run.dir={tmp_path / 'run'}",
        "trainer.max_epochs=1", "data.synthetic.num_users=60", f"data.cache_dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    assert code == 0
    assert "auc/click" in (tmp_path / "run" / "metrics.json").read_text()


@pytest.mark.slow
def test_the_dynamic_table_keeps_what_the_hashed_one_loses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "benchmarks" / "dynamic_vs_hashed.py"
    spec = importlib.util.spec_from_file_location("dynamic_vs_hashed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dynamic_vs_hashed", module)
    spec.loader.exec_module(module)
    arguments = Namespace(
        users=300, window=100, arriving=0.1, days=24, capacity=256, history=10, dim=16, seed=1, table_rate=0.3
    )
    curves = {name: np.mean(values[-6:]) for name, values in module.run(arguments).items()}
    assert curves["hkv"] > curves["unbounded"] - 0.02
    assert curves["hkv"] > curves["hashed"] + 0.02
    assert curves["best reachable"] > curves["hkv"]
