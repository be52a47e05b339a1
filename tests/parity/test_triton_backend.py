"""The triton backend on the grid: in Triton's interpreter where there is no GPU, with `-m gpu` on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.parity.grid import GRID, Case, assert_parity, make_case, run_backend, run_reference
from tests.parity.test_random_cases import _cases as random_cases
from tests.parity.triton_checks import (
    check_deterministic,
    check_dropout,
    check_poisoned,
    check_surroundings,
    named,
)

pytest.importorskip("triton")
from genrec.attention.triton import tuning
from genrec.attention.triton.configs import Config

GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(GPU, reason="on a GPU the kernels are compiled: see the tests marked gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def one_head(case: Case) -> Case:
    """The interpreter's time grows with the heads, and masks don't differ between them."""
    return replace(case, heads=1) if "-" in case.name else case


# Each term of the relative bias alone with these masks, both with all: a minute and a half of an idle core.
_ALONE = ("causal-", "contexts_targets_window-", "full_window-")
CI_GRID = [case for case in GRID if not case.name.endswith(("-position", "-time")) or case.name.startswith(_ALONE)]


FORMS = {
    "one": (Config(32, 32, tma=False), {}),
    "tables": (Config(32, 32, tma=False, passes="tables"), {"backward_tables": Config(16, 32, tma=False)}),
    "rows": (Config(32, 32, tma=False, passes="rows"), {"backward_rows": Config(32, 16, tma=False)}),
    "split": (Config(16, 32, tma=False, passes="split"),
              {"backward_values": Config(32, 16, tma=False), "backward_rows": Config(32, 32, tma=False)}),
    "stored": (Config(16, 32, tma=False, passes="stored"),
               {"forward": Config(32, 16, tma=False, stored=True), "stored_rows": Config(64, 32, tma=False),
                "stored_tables": Config(16, 16, tma=False)}),
    "stored, small blocks": (Config(16, 16, tma=False, passes="stored"),
                             {"forward": Config(16, 32, tma=False, stored=True),
                              "stored_rows": Config(16, 64, tma=False), "stored_tables": Config(32, 32, tma=False)}),
}  # fmt: skip
"""Forms of the backward pass, each with blocks of several shapes."""


@contextmanager
def form(name: str) -> Iterator[None]:
    """All backward passes have this form meanwhile."""
    config, others = FORMS[name]
    with tuning.forced_all({"backward": config, **others}):
        yield


@interpreted
@pytest.mark.parametrize(
    ("case", "passes"), [(case, list(FORMS)[n % len(FORMS)]) for n, case in enumerate(CI_GRID)], ids=str
)
def test_grid(case: Case, passes: str) -> None:
    with form(passes):
        assert_parity("triton", one_head(case), torch.float32)


@interpreted
@pytest.mark.parametrize("passes", FORMS)
@pytest.mark.parametrize("name", ["contexts_targets_window-both", "cached_window", "dims16x48_h2"])
def test_forms_of_the_backward_pass(name: str, passes: str) -> None:
    """With several heads, whose gradients of the tables are added up."""
    with form(passes):
        assert_parity("triton", replace(named(name), heads=2), torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["contexts_targets-both", "window-dense", "dims25x25_h2", "cached_targets", "years"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    assert_parity("triton", one_head(named(name)), dtype)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(random_cases())
def test_random(case: Case) -> None:
    assert_parity("triton", case, torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["contexts_targets-both", "cached_targets", "dense_bias_heads"])
def test_foreign_rows_do_not_matter(name: str) -> None:
    if named(name).kv_lengths is None and named(name).dense_bias is None:
        check_surroundings(named(name), torch.float32, "cpu", columns=1)
    check_poisoned(named(name), torch.float32, "cpu")
    with form("split"):  # whose kernels clean what enters their own sums, no more
        if named(name).kv_lengths is None and named(name).dense_bias is None:
            check_surroundings(named(name), torch.float32, "cpu", columns=1)
        check_poisoned(named(name), torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize(("name", "passes"), [("targets-both", "tables"), ("dense_bias_heads", "one"),
                                              ("causal-dense", "rows"), ("years", "one"),
                                              ("targets-both", "split"), ("dense_bias_heads", "split")])  # fmt: skip
def test_deterministic(name: str, passes: str) -> None:
    with form(passes):
        check_deterministic(named(name), torch.float32, "cpu")


@interpreted
def test_dropout() -> None:
    check_dropout("cpu", 75)


def test_a_wrong_bucket_is_noticed() -> None:
    """One time bucket off by one in one sequence must not pass."""
    device = "cuda" if GPU else "cpu"
    inputs = make_case(named("causal-time"), torch.float32, device)
    reference, _ = run_reference(inputs)
    inputs.options["bias"].timestamps[-1] -= 10_000
    wrong, _ = run_backend("triton", inputs)
    assert (wrong - reference).abs().max() > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid_on_gpu(case: Case, dtype: torch.dtype) -> None:
    assert_parity("triton", case, dtype, "cuda")


_REAL = {"heads": 2, "lengths": (1000, 1, 333, 0, 640), "strided": True}


@pytest.mark.gpu
@pytest.mark.parametrize("passes", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["long_targets", "years", "dims64x64_h2"])
def test_forms_of_the_backward_pass_on_gpu(name: str, dtype: torch.dtype, passes: str) -> None:
    with tuning.formed(passes):  # type: ignore[arg-type]
        assert_parity("triton", named(name), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [50, 64, 128, 256])
@pytest.mark.parametrize("words", [
    {},
    {"position": True, "time": True, "times": "ties"},
    {"position": True, "time": True, "times": "years", "contexts": (4, 0, 2, 0, 3), "targets": (200, 1, 33, 0, 64)},
    {"position": True, "window": 100, "targets": (200, 1, 33, 0, 64), "group": 2},
    {"dense_bias": 2},
], ids=["none", "ties", "years_contexts_targets", "window_targets", "dense"])  # fmt: skip
def test_real_shapes_on_gpu(words: dict, dim: int, dtype: torch.dtype) -> None:
    assert_parity("triton", Case("real", **_REAL, qk_dim=dim, v_dim=dim, **words), dtype, "cuda")


@pytest.mark.gpu
@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases())
def test_random_on_gpu(case: Case) -> None:
    assert_parity("triton", case, torch.bfloat16 if len(case.lengths) % 2 else torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 8])
@pytest.mark.parametrize("name", ["contexts_targets-both", "long_targets", "dims64x64_h2", "long_full"])
def test_foreign_rows_do_not_matter_on_gpu(name: str, columns: int, dtype: torch.dtype) -> None:
    """Columns 1 gives addresses that no wide load may take, 8 such as a descriptor takes."""
    check_surroundings(named(name), dtype, "cuda", columns)
    check_poisoned(named(name), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["long_targets", "dense_bias_heads", "causal-dense", "years", "dims64x64_h2"])
def test_deterministic_on_gpu(name: str, dtype: torch.dtype) -> None:
    check_deterministic(named(name), dtype, "cuda")


@pytest.mark.gpu
def test_dropout_on_gpu() -> None:
    check_dropout("cuda", 250)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_gpu() -> None:
    """The last sequence of a batch whose q, k, v and output pass 2^31 elements, beside itself alone."""
    from genrec.attention import RelativeBias, hstu_attention

    heads, dim, length, count = 16, 128, 1030, 1024
    total = length * count
    assert total * heads * dim > 2**31
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v, d_out = (
        torch.randn(total, heads, dim, device="cuda", dtype=torch.bfloat16, generator=draw) for _ in range(4)
    )
    times = torch.arange(total, device="cuda") * 977
    table, positions = (torch.randn(n, device="cuda", generator=draw) for n in (129, 2 * length - 1))

    def run(begin: int, number: int) -> list[torch.Tensor]:
        parts = [x[begin : begin + number * length].requires_grad_() for x in (q, k, v)]
        offsets = torch.arange(number + 1, device="cuda") * length
        bias = RelativeBias(positions, table, times[begin : begin + number * length])
        out = hstu_attention(*parts, offsets, length, bias=bias, alpha=0.1, scale=1 / length, backend="triton")
        gradients = torch.autograd.grad(out, parts, d_out[begin : begin + number * length])
        return [x[-length:] for x in (out.detach(), *gradients)]

    whole, alone = run(0, count), run(total - length, 1)
    for x, y in zip(whole, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())
