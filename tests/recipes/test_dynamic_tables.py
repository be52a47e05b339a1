"""Every shipped recipe with dynamic tables in place of static ones (`embedding.backend=hkv`), or one such table."""

import csv
import math
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
ONE_TABLE = "embedding.tables={item: {backend: hkv, capacity: 256, options: {score: epoch_lfu, num_choices: 2}}}"


@pytest.mark.parametrize(
    ("name", "backend"), [*[(name, "embedding.backend=hkv") for name in NAMES], ("ranking", ONE_TABLE)]
)
def test_every_recipe_runs_on_dynamic_tables(name, backend, measure, tmp_path):
    """On synthetic data, since the real ones are not at hand."""
    metrics = measure(name.split("_")[0], "--config", name, "data.name=synthetic", backend)
    assert math.isfinite(metrics["test/loss"])
    (path,) = (tmp_path / "run" / "logs" / "csv").glob("*/metrics.csv")
    with open(path) as file:
        logged = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    assert logged["tables/item/size"] > 0
    assert logged["tables/item/bytes_fast"] > 0
    assert 0 < logged["tables/item/hit_rate"] < 1
    assert logged["tables/item/refused"] == 0
