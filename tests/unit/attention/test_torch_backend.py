from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.attention import (
    AttentionMask,
    RelativeBias,
    UnsupportedAttentionError,
    _tiles,
    hstu_attention,
    torch_backend,
)
from tests.parity.grid import GRID, Case, Inputs, make_case, run_backend

BOTH = Case("both", position=True, time=True, contexts=(2, 1, 0, 3, 0, 5), targets=(4, 0, 0, 6, 8, 2), group=2)


def _call(inputs: Inputs, **changes: Any) -> Tensor:
    options = {**inputs.options, **changes}
    return hstu_attention(
        inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.max_seqlen, backend="torch", **options
    )


def test_permuting_groups_of_targets_permutes_their_outputs() -> None:
    """With the same request time for all, and no position bias, no target acts on another or on history."""
    case = Case("t", lengths=(19, 30), targets=(8, 12), contexts=(2, 0), group=2, time=True, query_times=True)
    inputs = make_case(case, torch.float64)
    bias = inputs.options["bias"]
    order = torch.arange(49)
    for end, targets in ((19, 8), (49, 12)):
        groups = torch.arange(end - targets, end).view(-1, 2)
        order[end - targets : end] = groups[torch.randperm(len(groups))].flatten()
        bias.timestamps[end - targets : end] = bias.timestamps[end - targets]
        bias.query_timestamps[end - targets : end] = bias.timestamps[end - targets]
    permuted = replace(
        inputs, q=inputs.q[order], k=inputs.k[order], v=inputs.v[order], options={**inputs.options, "bias": bias}
    )
    torch.testing.assert_close(_call(permuted), _call(inputs)[order], rtol=0, atol=1e-14)
    assert not torch.equal(order, torch.arange(49))


def test_history_does_not_see_targets() -> None:
    inputs = make_case(BOTH, torch.float64)
    before = _call(inputs)
    offsets = inputs.seq_offsets
    is_target = torch.zeros(len(inputs.q), dtype=torch.bool)
    for b, targets in enumerate(BOTH.targets or ()):
        is_target[offsets[b + 1] - targets : offsets[b + 1]] = True
    with torch.no_grad():
        inputs.k[is_target] += 1.0
        inputs.v[is_target] -= 1.0
    after = _call(inputs)
    assert torch.equal(after[~is_target], before[~is_target])
    assert not torch.equal(after[is_target], before[is_target])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_result_does_not_depend_on_batch_mates(dtype: torch.dtype) -> None:
    inputs = make_case(replace(BOTH, slack=7), dtype)
    together = _call(inputs)
    bias, mask, offsets = inputs.options["bias"], inputs.options["mask"], inputs.seq_offsets.tolist()
    for b, (start, end) in enumerate(pairwise(offsets)):
        rows = slice(start, end)
        alone = hstu_attention(
            inputs.q[rows], inputs.k[rows], inputs.v[rows], torch.tensor([0, end - start]), end - start,
            mask=AttentionMask(mask.num_contexts[b : b + 1], mask.num_targets[b : b + 1], 2),
            bias=RelativeBias(bias.position_weight, bias.time_weight, bias.timestamps[rows]),
            alpha=inputs.options["alpha"], scale=inputs.options["scale"], backend="torch",
        )  # fmt: skip
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=10 * torch.finfo(dtype).eps)


def test_a_broken_sequence_breaks_no_other() -> None:
    inputs = make_case(BOTH, torch.float32)
    with torch.no_grad():
        inputs.k[0] = float("nan")
    out = _call(inputs)
    assert out[:13].isnan().any()
    assert not out[13:].isnan().any()


class _LargestBlock(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # An expanded view has elements and no memory of its own.
            if isinstance(tensor, Tensor) and 0 not in tensor.stride():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", ["relative", "dense_mask"])
def test_one_long_sequence_makes_no_large_block(name: str) -> None:
    """2,000 rows once and 60 short sequences: padded, a block would have 61 * 2 * 2000 * 2000 elements."""
    lengths = (2000, *[10] * 60)
    case = Case(name, lengths=lengths, heads=2, qk_dim=8, v_dim=8, position=True, time=True)
    inputs = make_case(case, torch.float32)
    if name == "dense_mask":
        inputs.options["mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(len(lengths), 1, 2000, 2000)
    with _LargestBlock() as seen:
        torch.autograd.grad(_call(inputs), list(inputs.leaves.values()), inputs.d_out)
    assert seen.elements <= max(_tiles.TILE_ELEMENTS, 2 * inputs.q.numel())


def test_large_batches_compute_again_what_they_do_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in GRID if c.name == "long_targets")
    kept = run_backend("torch", make_case(case, torch.float64))
    monkeypatch.setattr(torch_backend, "SAVED_ELEMENTS", 0)
    monkeypatch.setattr(_tiles, "CACHED_ELEMENTS", 0)
    again = run_backend("torch", make_case(case, torch.float64))
    assert torch.equal(kept[0], again[0])
    for name in kept[1]:
        assert torch.equal(kept[1][name], again[1][name]), name


def test_small_tiles_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [c for c in GRID if c.name.startswith(("long", "cached", "contexts_targets"))]
    want = [run_backend("torch", make_case(case, torch.float64)) for case in cases]
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 600)
    monkeypatch.setattr(_tiles, "TILE_ROWS", 5)
    monkeypatch.setattr(_tiles, "WASTE_ELEMENTS", 100)
    for case, (out, gradients) in zip(cases, want, strict=True):
        small_out, small_gradients = run_backend("torch", make_case(case, torch.float64))
        torch.testing.assert_close(small_out, out, rtol=0, atol=1e-12)
        for name in gradients:
            torch.testing.assert_close(small_gradients[name], gradients[name], rtol=0, atol=1e-11)


def test_gradcheck() -> None:
    case = Case("g", lengths=(5, 0, 3), qk_dim=3, v_dim=2, position=True, time=True, contexts=(1, 0, 0),
                targets=(2, 0, 1), num_buckets=20)  # fmt: skip
    inputs = make_case(case, torch.float64)
    names = list(inputs.leaves)

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        bias = replace(
            inputs.options["bias"], position_weight=given["position_weight"], time_weight=given["time_weight"]
        )
        return _call(replace(inputs, q=given["q"], k=given["k"], v=given["v"]), bias=bias)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves.values()))


def test_dropout_repeats_in_the_backward_pass() -> None:
    """With the seed fixed the op is a smooth function, so that numeric and analytic gradients must agree."""
    inputs = make_case(Case("d", lengths=(6, 3), qk_dim=2, v_dim=2, position=True), torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _call(replace(inputs, q=q, k=k, v=v), dropout=0.4, seed=7)

    leaves = tuple(inputs.leaves[name] for name in "qkv")
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.equal(function(*leaves), function(*leaves))
    assert not torch.equal(function(*leaves), _call(inputs, dropout=0.4, seed=8))


def test_dropout_keeps_the_mean_and_the_share() -> None:
    inputs = make_case(Case("d", lengths=(60, 40), heads=4), torch.float64)
    ones = torch.ones_like(inputs.v)
    whole = _call(replace(inputs, v=ones))
    draws = torch.stack([_call(replace(inputs, v=ones), dropout=0.25, seed=seed) for seed in range(400)])
    spread = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - whole).abs() < 6 * spread + 1e-12).all()
    first = draws[:, 0, :, 0]  # the first row sees itself only: its weight is dropped or grown by 4 / 3
    assert abs((first == 0).double().mean() - 0.25) < 0.05


def test_dropout_without_a_seed_follows_the_default_generator() -> None:
    inputs = make_case(BOTH, torch.float32)
    torch.manual_seed(3)
    first, second = _call(inputs, dropout=0.5), _call(inputs, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(_call(inputs, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_a_kept_plan_is_not_used_for_another_call() -> None:
    """Same tensors, other words or other contents: each must give what a fresh process would."""
    inputs = make_case(BOTH, torch.float64)
    mask, bias = inputs.options["mask"], inputs.options["bias"]

    def fresh(**changes: Any) -> Tensor:
        vars(_tiles._last).clear()
        return _call(inputs, **changes)

    calls: list[dict[str, Any]] = [
        {},
        {"mask": replace(mask, window=2)},
        {"mask": replace(mask, causal=False)},
        {"mask": replace(mask, target_group_size=1)},
        {"mask": AttentionMask()},
        {"bias": replace(bias, time_weight=bias.time_weight[:5])},
        {"bias": replace(bias, time_weight=None, timestamps=None)},
        {"bias": replace(bias, query_timestamps=bias.timestamps + 999)},
        {"bias": None},
    ]
    want = [fresh(**changes) for changes in calls]
    assert all(torch.equal(_call(inputs, **changes), out) for changes, out in zip(calls, want, strict=True))
    assert len({tuple(out.flatten().tolist()) for out in want}) == len(calls)
    bias.timestamps.add_(torch.arange(len(bias.timestamps)) * 1000)
    changed = _call(inputs)
    assert not torch.equal(changed, want[0])
    assert torch.equal(changed, fresh())


def test_inference_mode_and_autocast() -> None:
    inputs = make_case(BOTH, torch.float32)
    want = _call(inputs)
    with torch.inference_mode():
        assert torch.equal(_call(inputs), want)
        offsets = inputs.seq_offsets.clone()
        assert torch.equal(_call(replace(inputs, seq_offsets=offsets)), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_call(inputs), want)


def test_a_kept_plan_notices_inference_tensors_that_change() -> None:
    """Inference tensors count no versions: a server that reuses its buffers must not get the last batch's plan."""
    inputs = make_case(BOTH, torch.float32)
    with torch.inference_mode():
        times = inputs.options["bias"].timestamps.clone()
        bias = replace(inputs.options["bias"], timestamps=times)
        first = _call(inputs, bias=bias)
        times.add_(torch.arange(len(times)) * 1000)
        second = _call(inputs, bias=bias)
        assert not torch.equal(first, second)
        assert torch.equal(second, _call(inputs, bias=replace(bias, timestamps=times.clone())))


def test_same_bits_every_time() -> None:
    first, second = (run_backend("torch", make_case(BOTH, torch.float32)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_only_needed_gradients_are_made() -> None:
    inputs = make_case(BOTH, torch.float64)
    want = torch.autograd.grad(_call(inputs), [inputs.leaves["v"]], inputs.d_out)[0]
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    v = leaves["v"].requires_grad_()
    bias = replace(inputs.options["bias"], position_weight=leaves["position_weight"], time_weight=leaves["time_weight"])
    out = _call(replace(inputs, q=leaves["q"], k=leaves["k"], v=v), bias=bias)
    assert torch.equal(torch.autograd.grad(out, [v], inputs.d_out)[0], want)


def test_int32_offsets() -> None:
    inputs = make_case(BOTH, torch.float64)
    assert torch.equal(_call(replace(inputs, seq_offsets=inputs.seq_offsets.int())), _call(inputs))


def test_fewer_keys_than_queries_is_an_error() -> None:
    x = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match="may not be fewer"):
        hstu_attention(x, x[:2], x[:2], torch.tensor([0, 3]), 3, kv_offsets=torch.tensor([0, 2]), max_kv_len=3,
                       backend="torch")  # fmt: skip


def test_integer_inputs_are_refused_with_a_reason() -> None:
    x = torch.zeros(3, 1, 4, dtype=torch.int64)
    with pytest.raises(UnsupportedAttentionError, match="not a floating-point"):
        hstu_attention(x, x, x, torch.tensor([0, 3]), 3, backend="torch")


def test_torch_compile_runs_it() -> None:
    inputs = make_case(BOTH, torch.float32)
    compiled = torch.compile(lambda: _call(inputs) * 2, backend="eager")
    torch.testing.assert_close(compiled(), _call(inputs) * 2)
