"""The attention benchmark times what it says, once, and counts by the causal convention."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks import attention as bench


def test_every_point_is_timed_once_and_only_by_those_that_compute_it() -> None:
    rows = list(bench.points(False))
    assert len(rows) == len(set(rows))
    assert all(bench.fits(point, contender) for point, contender in rows)
    table = {(h, d, s, kind, bias) for h, d in bench.SHAPES for s in bench.LENGTHS
             for kind in ("full", "jagged", "candidates") for bias in (False, True)}  # fmt: skip
    for ours in bench.OURS:
        timed = {(p.heads, p.dim, p.length, p.kind, p.bias) for p, contender in rows if contender == ours}
        assert timed == table
    assert all(p.kind == "full" and not p.bias for p, contender in rows if contender == "flash")
    assert all(p.kind != "jagged" for p, contender in rows if contender == "flex")


def test_the_quick_points_are_the_first_ones_of_the_table() -> None:
    quick, whole = list(bench.points(True)), list(bench.points(False))
    assert whole[: len(quick)] == quick
    assert {contender for _, contender in quick} == set(bench.CONTENDERS)
    assert all(contender == "triton" for _, contender in bench.points(False, ["triton"]))


@pytest.mark.parametrize("kind", ["full", "jagged", "candidates"])
def test_a_batch_has_about_the_tokens_asked_for(kind: str) -> None:
    batch = bench.Batch(bench.Point(2, 16, 64, kind, bias=True), 1000, device="cpu")
    assert 900 < sum(batch.lengths) < 1100
    assert max(batch.lengths) == 64
    assert batch.flops() == sum(2 * 2 * length**2 * 16 for length in batch.lengths)
    assert [len(table) for table in batch.tables] == [127, bench.NUM_BUCKETS]
    row = bench.Row(batch.point, "triton", bench.Timing(1.0, 0.9, 1.2), bench.Timing(2.0, 1.9, 2.2), 1e9)
    assert row.rates() == pytest.approx((1.0, 1.25, 3.5 / 3))
