"""The parity grid on the CUTLASS kernels, as far as they say that they serve it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from genrec.attention import cutlass_backend, registry
from tests.parity.grid import GRID, Case, assert_parity, make_case, run_backend

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]
_reason = registry.why_not("cutlass")
if _reason is not None:
    pytest.skip(f"cutlass: {_reason}", allow_module_level=True)

# The grid's small dims, and dims that the kernels hold: every mask at each.
CASES = [replace(case, name=f"{case.name}-{dim}", qk_dim=dim, v_dim=dim) for case in GRID for dim in (16, 64, 128, 256)]
# Sequences of 2,048 keys and more in the mean have a backward kernel of their own at D = 128.
_LONG = Case("very_long", (2100, 2050), heads=1, qk_dim=128, v_dim=128)
CASES += [_LONG, replace(_LONG, name="very_long_masked", contexts=(3, 0), targets=(40, 7), group=2)]
CASES += [replace(case, name=f"{case.name}_bias", position=True, time=True) for case in CASES[-2:]]
# There is room for one and a half times what equal lengths need: the last sequence's bias and dS find none.
_UNEQUAL = Case("one_without_a_place", (30, 1, 200, 2000), qk_dim=128, v_dim=128, position=True, time=True)
CASES += [_UNEQUAL, replace(_UNEQUAL, name="one_without_a_place_masked", contexts=(3, 0, 2, 5), targets=(9, 1, 0, 40))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cutlass_keeps_the_bound(case: Case, dtype: torch.dtype) -> None:
    reason = registry.why_not("cutlass", make_case(case, dtype, "cuda").spec())
    if reason is not None:
        pytest.skip(reason)
    assert_parity("cutlass", case, dtype, "cuda")


@pytest.mark.parametrize("name", ["long_targets-128", "years-64", "ties-256", "cached_long-128", "dense_bias_heads-64"])
def test_cutlass_repeats_every_bit(name: str) -> None:
    """The deterministic mode, with what a bias adds to it: the sums of its tables."""
    case = next(case for case in CASES if case.name == name)
    runs = []
    for _ in range(2):
        inputs = make_case(case, torch.bfloat16, "cuda")
        inputs.options["deterministic"] = True
        runs.append(run_backend("cutlass", inputs))
    (out, gradients), (again, gradients_again) = runs
    assert torch.equal(out, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize(
    "name",
    ["long128-128", "ties-128", "years-128", "cached_long-128", "ties-256", "very_long_masked_bias",
     "one_without_a_place", "one_without_a_place_masked"],
)  # fmt: skip
def test_a_kept_bias_gives_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, whether the backward pass reads what the forward pass left or computes it again."""
    case = next(case for case in CASES if case.name == name)
    backward = cutlass_backend.cutlass_attention_backward
    kept_at, bytes_kept, runs = 15, [], []
    for keep in (True, False):

        def differentiate(*args: Any, keep: bool = keep) -> list[torch.Tensor]:
            kept = args[kept_at]
            bytes_kept.append(kept.numel())
            return backward(*args[:kept_at], kept if keep else kept.new_empty(0), *args[kept_at + 1 :])

        monkeypatch.setattr(cutlass_backend, "cutlass_attention_backward", differentiate)
        inputs = make_case(case, torch.bfloat16, "cuda")
        inputs.options["deterministic"] = True
        runs.append(run_backend("cutlass", inputs)[1])
    assert min(bytes_kept) > 0
    assert all(torch.equal(runs[0][table], runs[1][table]) for table in runs[0])
