"""The triton backend on the grid: in Triton's interpreter where there is no GPU, with `-m gpu` on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import Phase, given, seed, settings

from genrec.attention import RelativeBias, hstu_attention
from tests.parity.grid import GRID, Case, Inputs, assert_parity, make_case, run_backend, run_reference
from tests.parity.test_random_cases import _cases as random_cases
from tests.parity.triton_checks import (
    check_deterministic,
    check_dropout,
    check_poisoned,
    check_surroundings,
    named,
)

pytest.importorskip("triton")
from genrec.attention.triton import launch, launch_backward, launch_stored, tuning
from genrec.attention.triton.configs import Config, Passes

GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(GPU, reason="on a GPU the kernels are compiled: see the tests marked gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def one_head(case: Case) -> Case:
    """The interpreter's time grows with the heads, and masks don't differ between them."""
    return replace(case, heads=1) if "-" in case.name else case


# Each term of the relative bias alone with these masks, both with all: a minute and a half of an idle core.
_ALONE = ("causal-", "contexts_targets_window-", "full_window-")
CI_GRID = [case for case in GRID if not case.name.endswith(("-position", "-time")) or case.name.startswith(_ALONE)]
CI_GRID.remove(named("long128"))  # whose width matters on a GPU alone


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


def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    names: list[str] = []

    def start(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        real(kernel, *arguments)

    real = launch.start
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch_backward, "start", start)
    return names


FORWARD, BACKWARD = ["bias_kernel", "forward_kernel"], ["bias_kernel", "backward_kernel", "stored_rows_kernel"]


@interpreted
@pytest.mark.parametrize(("name", "small", "heads"), [
    ("ties", False, 5), ("years", True, 1), ("any_times", False, 1), ("query_times", True, 1),
    ("few_buckets", False, 1), ("contexts_targets_full-both", True, 2), ("window-position", False, 1),
    ("targets_group3_partial-time", True, 1), ("cached_query_times", False, 2), ("all_empty", True, 2),
])  # fmt: skip
def test_stored_bias_and_scores(name: str, small: bool, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = started(monkeypatch)
    with form("stored, small blocks" if small else "stored"):
        assert_parity("triton", replace(named(name), heads=heads), torch.float32)
    assert names == ([] if name == "all_empty" else [*FORWARD, *BACKWARD, "stored_tables_kernel"])


@interpreted
@pytest.mark.parametrize(("name", "dtype"), [("contexts_targets-both", torch.float16), ("years", torch.bfloat16),
                                             ("cached_targets", torch.bfloat16)])  # fmt: skip
def test_low_precision_stored(name: str, dtype: torch.dtype) -> None:
    with form("stored"):
        assert_parity("triton", one_head(named(name)), dtype)


def assert_hidden(score: float, dtype: torch.dtype, dim: int, device: str = "cpu") -> None:
    """Row 0 has such a score with all keys that it doesn't see, other pairs one of zero: the output is zero."""
    rows = 150
    q, k = (torch.zeros(rows, 1, dim, dtype=dtype, device=device) for _ in range(2))
    q[0], k[1:] = 1.0, score / dim
    v = torch.randn(rows, 1, dim, device=device).to(dtype)
    bias = RelativeBias(torch.zeros(2 * rows - 1, device=device), None, None)
    offsets = torch.tensor([0, rows], device=device)
    out = hstu_attention(q, k, v, offsets, rows, alpha=1.0, bias=bias, backend="triton")
    assert (out == 0).all()


@interpreted
@pytest.mark.parametrize(("score", "dtype"), [(60_000.0, torch.bfloat16), (1e30, torch.float32)])
def test_hidden_pairs_of_a_stored_bias_weigh_nothing(score: float, dtype: torch.dtype) -> None:
    with form("stored"):
        assert_hidden(score, dtype, 16)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Sets what a stored bias and stored gradients of the scores may take, in GiB."""

    def set_limits(bias: str, scores: str) -> None:
        monkeypatch.setenv("GENREC_ATTENTION_BIAS_GIB", bias)
        monkeypatch.setenv("GENREC_ATTENTION_STORED_GIB", scores)
        launch_stored.limit.cache_clear()

    yield set_limits
    launch_stored.limit.cache_clear()


@interpreted
@pytest.mark.parametrize(("bias", "scores", "stored"), [("0", "1", False), ("1", "0", True), ("1e-5", "1", False)])
def test_without_room_nothing_is_stored(
    bias: str, scores: str, stored: bool, limits: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    limits(bias, scores)
    names = started(monkeypatch)
    with form("stored"):
        assert_parity("triton", one_head(named("targets-both")), torch.float32)
    assert names == [*FORWARD[not stored :], "backward_kernel"]


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
@pytest.mark.parametrize(("name", "passes"), [("contexts_targets-both", "stored"), ("ties", "stored, small blocks"),
                                              ("cached_targets", "stored")])  # fmt: skip
def test_foreign_rows_and_what_is_not_stored_do_not_matter(name: str, passes: str) -> None:
    case = replace(named(name), heads=1)
    with form(passes):
        if case.kv_lengths is None:
            check_surroundings(case, torch.float32, "cpu", columns=1)
        check_poisoned(case, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize(("name", "passes"), [("targets-both", "tables"), ("dense_bias_heads", "one"),
                                              ("causal-dense", "rows"), ("years", "one"),
                                              ("targets-both", "split"), ("dense_bias_heads", "split"),
                                              ("targets-both", "stored"), ("cached_targets", "stored")])  # fmt: skip
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
@pytest.mark.parametrize("passes", get_args(Passes))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["long_targets", "years", "dims64x64_h2", "long128"])
def test_forms_of_the_backward_pass_on_gpu(name: str, dtype: torch.dtype, passes: str) -> None:
    with tuning.formed(passes):  # type: ignore[arg-type]
        assert_parity("triton", named(name), dtype, "cuda")


def started_by_default(case: Case, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> list[str]:
    """Names of the kernels that a case starts in bf16, with what is chosen for it. It must be right."""
    names = started(monkeypatch)
    with tuning.autotune(False):
        assert_parity("triton", case, torch.bfloat16, device)
    return names


@pytest.mark.hopper
@pytest.mark.gpu
@pytest.mark.parametrize("words", [
    {"time": True, "times": "ties"},
    {"position": True, "times": "years"},
    {"time": True, "times": "any", "contexts": (4, 0, 2, 0, 3), "targets": (200, 1, 33, 0, 64), "group": 2},
    {"time": True, "window": 100},
    {"time": True, "causal": False},
    {"time": True, "kv_lengths": (1100, 1, 700, 0, 640), "strided": False},
], ids=["ties", "position", "contexts_targets", "window", "full", "cached"])  # fmt: skip
def test_stored_bias_and_scores_on_gpu(words: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default at head dim 128; real shapes and all that follows take it there too."""
    case = Case("stored", **{**_REAL, "position": "times" not in words or words["times"] != "ties", **words},
                qk_dim=128, v_dim=128)  # fmt: skip
    assert started_by_default(case, monkeypatch) == [*FORWARD, *BACKWARD, "stored_tables_kernel"]


@pytest.mark.hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 256])
def test_stored_bias_of_other_dims_on_gpu(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("stored", **{**_REAL, "position": True, "time": True}, qk_dim=dim, v_dim=dim)
    names = started_by_default(case, monkeypatch)
    assert names[:2] == FORWARD
    assert ("stored_tables_kernel" in names) == (dim < 256)


@pytest.mark.hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("words", [{}, {"contexts": (4, 0, 2, 0, 3), "targets": (200, 1, 33, 0, 64), "group": 2}],
                         ids=["causal", "contexts_targets"])  # fmt: skip
def test_a_bias_that_is_not_stored_on_gpu(
    words: dict, dim: int, limits: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As long sequences have it."""
    limits("0", "0")
    case = Case("not stored", **{**_REAL, "position": True, "time": True, **words}, qk_dim=dim, v_dim=dim)
    assert "bias_kernel" not in started_by_default(case, monkeypatch)


@pytest.mark.hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_pairs_of_a_stored_bias_weigh_nothing_on_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    names = started(monkeypatch)
    with tuning.autotune(False):
        assert_hidden(120_000.0, dtype, 128, "cuda")
    assert names == FORWARD


@pytest.mark.hopper
@pytest.mark.gpu
def test_stored_scores_in_cuda_graphs_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured with one batch's numbers, replayed with another's; and a graph kept for a second backward pass."""
    inputs, others = (make_case(named("long128"), torch.bfloat16, "cuda", seed) for seed in (0, 1))
    leaves, names = list(inputs.leaves.values()), started(monkeypatch)

    def step(x: Inputs) -> list[torch.Tensor]:
        out = hstu_attention(x.q, x.k, x.v, x.seq_offsets, x.max_seqlen, backend="triton", deterministic=True,
                             **x.options)  # fmt: skip
        return [out, *torch.autograd.grad(out, list(x.leaves.values()), x.d_out, retain_graph=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected, wanted = step(others), step(inputs)
        again = torch.autograd.grad(wanted[0], leaves, inputs.d_out)
    torch.cuda.current_stream().wait_stream(stream)
    assert names.count("stored_rows_kernel") == 3
    assert all(torch.equal(x, y) for x, y in zip(again, wanted[1:], strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(inputs)
    with torch.no_grad():
        for name, leaf in inputs.leaves.items():
            leaf.copy_(others.leaves[name])
        inputs.d_out.copy_(others.d_out)
        inputs.options["bias"].timestamps.copy_(others.options["bias"].timestamps)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


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
@pytest.mark.parametrize("part", range(10))
def test_random_on_gpu(part: int) -> None:
    """A hundred cases in ten parts, which run side by side: most of their time is compiling."""

    @seed(part)
    @settings(max_examples=10, deadline=None, database=None, phases=[Phase.generate])
    @given(random_cases())
    def right(case: Case) -> None:
        assert_parity("triton", case, torch.bfloat16 if len(case.lengths) % 2 else torch.float32, "cuda")

    right()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 8])
@pytest.mark.parametrize("name", ["contexts_targets-both", "long_targets", "dims64x64_h2", "long_full", "long128"])
def test_foreign_rows_do_not_matter_on_gpu(name: str, columns: int, dtype: torch.dtype) -> None:
    """Columns 1 gives addresses that no wide load may take, 8 such as a descriptor takes."""
    check_surroundings(named(name), dtype, "cuda", columns)
    check_poisoned(named(name), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["long_targets", "dense_bias_heads", "causal-dense", "years", "dims64x64_h2",
                                  "long128"])  # fmt: skip
def test_deterministic_on_gpu(name: str, dtype: torch.dtype) -> None:
    check_deterministic(named(name), dtype, "cuda")


@pytest.mark.gpu
def test_dropout_on_gpu() -> None:
    check_dropout("cuda", 250)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_gpu() -> None:
    """The last sequence of a batch whose q, k, v and output pass 2^31 elements, beside itself alone."""
    from genrec.attention import RelativeBias

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
