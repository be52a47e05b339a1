"""The parity grid on the CUTLASS kernels, as far as they say that they serve it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genrec.attention import registry
from tests.parity.grid import GRID, Case, assert_parity, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]
_reason = registry.why_not("cutlass")
if _reason is not None:
    pytest.skip(f"cutlass: {_reason}", allow_module_level=True)

# The grid's small dims, and dims that the kernels hold: every mask at each.
CASES = [replace(case, name=f"{case.name}-{dim}", qk_dim=dim, v_dim=dim) for case in GRID for dim in (16, 64, 128, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cutlass_keeps_the_bound(case: Case, dtype: torch.dtype) -> None:
    reason = registry.why_not("cutlass", make_case(case, dtype, "cuda").spec())
    if reason is not None:
        pytest.skip(reason)
    assert_parity("cutlass", case, dtype, "cuda")
