from __future__ import annotations

import pytest
import torch

from tests.parity.grid import DENSE_MASK_GRID, GRID, Case, assert_parity, make_case, run_backend, run_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GRID + DENSE_MASK_GRID, ids=str)
def test_torch_keeps_the_bound(case: Case, dtype: torch.dtype) -> None:
    assert_parity("torch", case, dtype)


def test_the_bound_notices_a_wrong_bucket() -> None:
    """One time bucket off by one in one sequence must not pass: otherwise the grid proves little."""
    case = next(c for c in GRID if c.name == "causal-time")
    inputs = make_case(case, torch.float32)
    reference, _ = run_reference(inputs)
    bias = inputs.options["bias"]
    bias.timestamps[-1] -= 10_000
    wrong, _ = run_backend("torch", inputs)
    assert (wrong - reference).abs().max() > 1e-4


def test_cases_have_distinct_names() -> None:
    names = [case.name for case in GRID + DENSE_MASK_GRID]
    assert len(set(names)) == len(names)
