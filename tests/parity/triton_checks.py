"""What the triton backend has to keep, on the interpreter (small) and on a GPU (`test_triton_backend.py` runs both)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from genrec.attention import hstu_attention
from tests.parity.grid import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    GRID,
    Case,
    Inputs,
    check_error,
    make_case,
    run_backend,
    run_reference,
)


def named(name: str) -> Case:
    """A case of the grid."""
    return next(case for case in GRID if case.name == name)


def check_against_reference(inputs: Inputs, dtype: torch.dtype, results: tuple[Tensor, dict[str, Tensor]]) -> None:
    """The bound of the grid, for results of the backend that came about in some special way."""
    reference, reference_gradients = run_reference(inputs)
    low, low_gradients = run_reference(inputs, dtype)
    out, gradients = results
    check_error("out", out, reference, low, FORWARD_FACTOR, dtype)
    for name, gradient in gradients.items():
        bounds = reference_gradients[name], low_gradients[name]
        check_error(f"d_{name}", gradient, *bounds, BACKWARD_FACTOR, dtype)


def check_surroundings(case: Case, dtype: torch.dtype, device: str, columns: int) -> None:
    """q, k, v are cut out of larger tensors of NaN, and rows behind the last sequence are NaN too."""
    inputs = make_case(replace(case, strided=False), dtype, device)
    for name in ("q", "k", "v"):
        leaf = inputs.leaves[name].detach()
        rows, heads, dim = leaf.shape
        frame = torch.full((rows + 5, heads, dim + columns), float("nan"), dtype=dtype, device=device)
        frame[:rows, :, columns:] = leaf
        view = frame[:, :, columns:].requires_grad_()
        setattr(inputs, name, view)
        inputs.leaves[name] = view
    rows = inputs.q.shape[0] - 5
    for name in ("timestamps", "query_timestamps"):
        times = getattr(inputs.options["bias"], name, None)
        if times is not None:
            object.__setattr__(inputs.options["bias"], name, torch.cat([times, times.new_full((5,), -(2**62))]))
    out = hstu_attention(inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.max_seqlen, backend="triton",
                         **inputs.options)  # fmt: skip
    d_out = torch.full_like(out, float("nan"))
    d_out[:rows] = inputs.d_out
    gradients = torch.autograd.grad(out, list(inputs.leaves.values()), d_out)
    named_gradients = dict(zip(inputs.leaves, gradients, strict=True))
    for name in ("q", "k", "v"):
        named_gradients[name] = named_gradients[name][:rows]
        inputs.leaves[name] = inputs.leaves[name].detach()[:rows]
    found = {name: x.cpu().double() for name, x in named_gradients.items()}
    check_against_reference(inputs, dtype, (out[:rows].detach().cpu().double(), found))


def check_poisoned(case: Case, dtype: torch.dtype, device: str) -> None:
    """Every buffer that the backend allocates without filling it holds NaN at first."""
    inputs = make_case(case, dtype, device)
    inputs.options["deterministic"] = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3, device=device).isnan().all()
        results = run_backend("triton", inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    check_against_reference(inputs, dtype, results)


def check_deterministic(case: Case, dtype: torch.dtype, device: str) -> None:
    """Same bits twice, and the bound."""
    results = []
    for _ in range(2):
        inputs = make_case(case, dtype, device)
        inputs.options["deterministic"] = True
        results.append(run_backend("triton", inputs))
    (out, gradients), (again, again_gradients) = results
    assert torch.equal(out, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name
    check_against_reference(inputs, dtype, results[0])


def check_dropout(device: str, length: int, dropout: float = 0.3) -> None:
    """Weights read off with v = 1: each kept and scaled or dropped, and the gradients are those of the same mask."""
    draw = torch.Generator().manual_seed(3)
    heads, dim = 2, 16
    q, k = (torch.randn(length, heads, dim, generator=draw).to(device).requires_grad_() for _ in range(2))
    v = torch.eye(length)[:, None, :].expand(-1, heads, -1).contiguous().to(device).requires_grad_()
    offsets = torch.tensor([0, length // 3, length], device=device)

    def run(p: float, seed: int) -> Tensor:
        return hstu_attention(q, k, v, offsets, length, alpha=0.25, dropout=p, seed=seed, backend="triton")

    weights, dropped, other = run(0.0, 1), run(dropout, 1), run(dropout, 2)
    assert torch.equal(dropped, run(dropout, 1))
    assert not torch.equal(dropped, other)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / (1 - dropout), 0.0))
    visible = weights != 0
    share = (kept & visible).sum().item() / visible.sum().item()
    assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / visible.sum().item()) ** 0.5
    assert not torch.equal(kept[:, 0], kept[:, 1])
    factor = kept.detach() / (1 - dropout)
    d_out = torch.randn(dropped.shape, generator=draw).to(device)
    scores = 0.25 * torch.einsum("ihd,jhd->ihj", q, k)
    expected = torch.einsum("ihj,jhe->ihe", torch.nn.functional.silu(scores) * visible * factor, v)
    for name, got, want in zip(
        "qkv",
        torch.autograd.grad(dropped, [q, k, v], d_out),
        torch.autograd.grad(expected, [q, k, v], d_out),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"d_{name}")
