"""What the cutlass backend says it serves, and its ops' shapes; nothing here runs a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from genrec._native import NativeLibraryError
from genrec.attention import AttentionMask, AttentionSpec, _cutlass_binding, cutlass_backend, hstu_attention
from genrec.attention.cutlass_backend import CutlassBackend
from genrec.attention.registry import UnsupportedAttentionError
from genrec.attention.spec import time_bucket_edges

SPEC = AttentionSpec("cuda", torch.bfloat16, 4, 128, 128, capability=(9, 0))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CutlassBackend:
    """A backend whose library takes every problem."""
    monkeypatch.setattr(_cutlass_binding, "why_not", lambda problem, backward: None)
    return CutlassBackend()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu", "capability": None}, "Hopper GPUs .* only, not on cpu"),
        ({"capability": (8, 0)}, r"not on cuda of capability \(8, 0\)"),
        ({"capability": (10, 0)}, "Hopper"),
        ({"dtype": torch.float32}, "bfloat16 or float16"),
        ({"dense_mask": True}, "not a dense mask"),
        ({"dropout": 0.1}, "no attention dropout"),
    ],
)
def test_refuses_with_a_reason(backend: CutlassBackend, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(backend.supports(replace(SPEC, **changes)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": torch.float16}, {"contexts": True, "targets": True, "target_group_size": 2, "window": 7},
     {"causal": False}, {"cached_keys": True}, {"tensor_scale": True}, {"needs_grad": True, "deterministic": True},
     {"bias": "relative"}, {"bias": "dense"}],
)  # fmt: skip
def test_serves(backend: CutlassBackend, changes: dict[str, Any]) -> None:
    assert backend.supports(replace(SPEC, **changes)) is None


def test_the_library_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def why_not(problem: _cutlass_binding.Problem, backward: bool) -> str:
        asked.append((problem.dtype, problem.qk_dim, problem.v_dim, problem.causal, problem.bias.kind, backward))
        return "not built"

    monkeypatch.setattr(_cutlass_binding, "why_not", why_not)
    assert CutlassBackend().supports(replace(SPEC, v_dim=64, needs_grad=True)) == "not built"
    CutlassBackend().supports(replace(SPEC, window=3, bias="relative"))
    assert asked == [(0, 128, 64, 1, 0, True), (0, 128, 128, 0, 1, False)]


def test_without_library_the_reason_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeLibraryError("libgenrec_attention.so was found in none of\n  /a\n  /b")

    monkeypatch.setattr(_cutlass_binding, "library", missing)
    said = CutlassBackend().available() or ""
    assert said.startswith("libgenrec_attention.so isn't built; `make cuda` builds it")
    assert "\n" not in said


def test_never_chosen_for_the_cpu() -> None:
    x = torch.zeros(3, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedAttentionError, match="'cutlass' can't serve this call"):
        hstu_attention(x, x, x, torch.tensor([0, 3]), 3, backend="cutlass")


def test_auto_leaves_the_dense_bias_to_triton() -> None:
    backend = CutlassBackend()
    assert backend.not_in_auto(SPEC) is None
    assert backend.not_in_auto(replace(SPEC, qk_dim=64, v_dim=64, targets=True, needs_grad=True)) is None
    assert backend.not_in_auto(replace(SPEC, dtype=torch.float16)) is None
    assert backend.not_in_auto(replace(SPEC, bias="relative", needs_grad=True)) is None
    assert "a dense bias" in (backend.not_in_auto(replace(SPEC, bias="dense")) or "")
    assert backend.not_in_auto(replace(SPEC, qk_dim=16, v_dim=32)) is None


def test_fake_ops_give_shapes_and_dtypes() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        q, k = (torch.empty(rows, 4, 64, dtype=torch.float16, device="cuda") for rows in (9, 20))
        v = torch.empty(20, 4, 32, dtype=torch.float16, device="cuda")
        starts = torch.empty(3, dtype=torch.int32, device="cuda")
        plan = torch.empty(100, dtype=torch.uint8, device="cuda")
        position, time = torch.empty(39, device="cuda"), torch.empty(129, device="cuda")
        times = torch.empty(20, dtype=torch.int64, device="cuda")
        dense = torch.empty(2, 1, 9, 20, device="cuda")
        biases = (position, time, times, None, dense)
        tensors, words = (q, k, v, plan, starts, starts, None, None, None), (1, -1, True, 1.0, 1.0, False)
        out, kept = cutlass_backend.cutlass_attention(*tensors, *biases, *words)
        _, nothing = cutlass_backend.cutlass_attention(*tensors, None, None, None, None, dense, *words)
        words = (*words, [True, False, True])
        gradients = cutlass_backend.cutlass_attention_backward(out, *tensors, *biases, kept, *words)
    assert (out.shape, out.dtype, out.device.type) == ((9, 4, 32), torch.float16, "cuda")
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape, position.shape, (0,), dense.shape]
    assert {g.dtype for g in gradients[3:]} == {torch.float32}
    assert (kept.dtype, kept.dim(), nothing.dtype, nothing.shape) == (torch.uint8, 1, torch.uint8, (0,))
    assert isinstance(kept.shape[0], torch.SymInt)  # only the library knows how many bytes


def test_a_dense_bias_smaller_than_the_batch_is_refused() -> None:
    x = torch.zeros(6, 1, 64)
    offsets = torch.tensor([0, 3, 6])
    for shape in ((1, 1, 3, 3), (2, 1, 2, 3), (2, 1, 3, 2)):
        with pytest.raises(ValueError, match="is smaller than"):
            CutlassBackend()(x, x, x, offsets, offsets, 3, 3, AttentionMask(), torch.zeros(shape), 1.0, 1.0, 0.0, None,
                             False)  # fmt: skip


def test_a_bias_is_described_as_the_kernels_read_it() -> None:
    position, time, times = torch.zeros(9), torch.zeros(12), torch.arange(7)
    bias = cutlass_backend._Bias(position, time, times, None, None)
    words = bias.words
    assert (words.kind, words.max_positions, words.buckets) == (1, 5, 12)
    assert (words.position, words.time, words.key_times) == (position.data_ptr(), time.data_ptr(), times.data_ptr())
    assert words.query_times is None
    assert bias.edges is not None
    assert bias.edges.tolist() == time_bucket_edges(12).tolist()
    bias.give_gradients(torch.zeros(9), torch.zeros(0), torch.zeros(0))
    assert words.d_position is not None
    assert words.d_time is None
    dense = torch.zeros(2, 3, 5, 8).transpose(0, 1)[:, :1, :, :7]
    words = cutlass_backend._Bias(None, None, None, None, dense).words
    assert (words.kind, words.dense_batch_stride, words.dense_head_stride, words.dense_row_stride) == (2, 40, 0, 8)
    assert cutlass_backend._Bias(None, None, None, None, None).words.kind == 0


def test_a_view_that_the_copy_engine_cannot_read_is_copied() -> None:
    wide = torch.zeros(6, 2, 96, dtype=torch.bfloat16)
    fits = wide[:, :, 32:64]
    assert cutlass_backend._aligned(fits) is fits
    odd_rows = torch.zeros(6, 2, 36, dtype=torch.bfloat16)[:, :, :32]
    for x in (wide[:, :, 4:36], wide[:, :, ::3], odd_rows, wide[:1, :, :8].expand(6, 2, 8)):
        y = cutlass_backend._aligned(x)
        assert y.is_contiguous()
        assert y.data_ptr() != x.data_ptr()


def test_layers_share_the_plan_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(cutlass_backend, "cutlass_plan", lambda *args: made.append(args) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    backend, offsets, counts = CutlassBackend(), torch.tensor([0, 3]), torch.tensor([1])
    x = torch.zeros(3, 1, 64, dtype=torch.bfloat16)

    def plan(*, offsets: torch.Tensor = offsets, window: int | None = None, rows: int = 3) -> torch.Tensor:
        mask = AttentionMask(num_targets=counts, window=window)
        return backend._batch(x[:rows], x[:rows], x[:rows], offsets, offsets, mask).plan

    first = plan()
    assert plan() is first
    assert made[0][3].dtype == torch.int32
    assert plan(window=2) is not first
    assert plan(offsets=offsets.clone()) is not first
    last = plan()
    counts += 1  # the same tensor with other values
    assert plan() is not last
    assert len(made) == 5
