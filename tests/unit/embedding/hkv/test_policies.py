"""Bucketed eviction is nearly as good as exact eviction: within two points of hit rate."""

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[4] / "benchmarks" / "embedding_policies.py"
_SPEC = importlib.util.spec_from_file_location("embedding_policies", _PATH)
assert _SPEC is not None
policies = importlib.util.module_from_spec(_SPEC)
assert _SPEC.loader is not None
_SPEC.loader.exec_module(policies)


@pytest.mark.parametrize("exponent", [0.8, 1.05])
@pytest.mark.parametrize("drift", [0.0, 20.0])
def test_hit_rate_is_within_two_points_of_exact(exponent, drift):
    rows = policies.compare(batches=80, size=1024, items=16_384, capacity=2048, exponent=exponent, drift=drift)
    assert [row["policy"] for row in rows] == ["lru", "lfu"]
    for row in rows:
        assert 0.2 < row["exact"] < 0.95
        for choices in ("choices 1", "choices 2"):
            assert abs(row[choices] - row["exact"]) < 0.02, row
