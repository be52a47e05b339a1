"""The script for a short run on a GPU names things that exist, and draws the right conclusions."""

from __future__ import annotations

from typing import get_args

import pytest

pytest.importorskip("triton")
from benchmarks import gpu_check
from genrec.attention.triton import configs
from tests.parity.grid import GRID

NAMES = {case.name for case in GRID}


def test_stages_name_cases_and_kernels_that_exist() -> None:
    assert len(set(gpu_check.STAGES)) == len(gpu_check.STAGES)
    for stage in gpu_check.STAGES:
        head, *rest = stage.split(":")
        assert head in gpu_check.LIMIT
        if head == "parity":
            what, dtype, form = rest
            special = what in ("deterministic", "poisoned", "dropout") or what.startswith("foreign")
            assert (form if special else dtype) in gpu_check.DTYPES
            assert special or form in ("default", *get_args(configs.Passes))
            assert what.startswith("real") or what == "dropout" or (dtype if special else what) in NAMES
        elif head == "sweep":
            found = gpu_check.variants(rest[0], int(rest[1]), rest[2] == "1")
            assert len(found) == len(gpu_check.parts(stage)) >= 3
            assert all(rest[0] in variant for variant in found)
            shown = [tuple(map(gpu_check.short, variant.values())) for variant in found]
            assert len(set(shown)) == len(shown)


def test_every_case_that_has_not_passed_is_named() -> None:
    cases = [*gpu_check.PROOF, *gpu_check.MORE]
    rows = [{"stage": f"parity:{case}", "ok": True} for case in cases]
    assert f"- right: all {len(cases)} cases" in gpu_check.verdict(rows)
    rows[3] = {"stage": rows[3]["stage"], "ok": False, "error": "off"}
    del rows[5]
    assert f"- wrong or not run: {cases[3]}, {cases[5]}" in gpu_check.verdict(rows)


def test_a_faster_variant_is_named() -> None:
    rows = [{"kernel": f"backward 4x128{bias}", "variant": name, "ms": ms, "rate": 1.0}
            for bias, times in (("", (5.0, 4.0)), (" +bias", (6.0, 7.0)))
            for name, ms in zip(("first", "second"), times, strict=True)]  # fmt: skip
    lines = "\n".join(gpu_check.verdict(rows))
    assert "backward 4x128: default first 5.000 ms, best second 4.000 ms (make it the default: 25%)" in lines
    assert "backward 4x128 +bias: default first 6.000 ms, best first 6.000 ms\n" in lines
    assert "with the bias 1.50 times the time without" in lines
