"""The script that times the kernels of the backward pass: what it launches is right, and it would notice what isn't."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import attention_backward
from genrec.attention.triton import launch, tuning
from genrec.attention.triton.configs import Config

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="needs Triton's interpreter")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kernels_have_blocks_that_they_can_take(dim: int, bias: bool) -> None:
    found = attention_backward.parts(dim, bias)
    assert len(set(found)) == len(found)
    assert {"dv", "dk", "dq", "dk, dv"} <= {part.name for part in found}
    for part in found:
        rows, keys = part.config.rows, part.config.keys
        if "tables" in part.name:  # the gradient of a position table wants as many of its own rows or keys, or more
            assert rows >= keys if part.kind == "backward_rows" else keys >= rows


@interpreted
@pytest.mark.parametrize("bias", [False, True])
def test_each_kernel_is_compared_with_the_reference(bias: bool) -> None:
    torch.manual_seed(0)
    small = attention_backward.Small(16, bias, "cpu", (40, 41, 63, 80))
    parts = {part.name: replace(part, config=Config(16, 16, tma=False)) for part in attention_backward.parts(64, bias)}
    assert ("tables" in parts) == bias
    for part in parts.values():
        assert small.error(part) < attention_backward.BOUND, part.name
    with tuning.forced("backward", Config(16, 16, tma=False, passes="split")):
        assert small.error_of_pass() < attention_backward.BOUND
    small.reference = {name: x * 1.1 for name, x in small.reference.items()}
    for part in parts.values():
        assert small.error(part) > attention_backward.BOUND, part.name


def test_what_is_missing_or_not_a_number_is_wrong() -> None:
    small = attention_backward.Small.__new__(attention_backward.Small)
    small.reference = {"dq": torch.ones(3)}
    assert small.distance("dq", None) == small.distance("dq", torch.tensor([1.0, float("nan"), 1.0])) == float("inf")
