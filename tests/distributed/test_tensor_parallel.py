"""HSTU layers split over tensor-parallel ranks against whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genrec.layers import HSTUConfig, HSTUStack, TokenSequence
from genrec.parallel import megatron
from genrec.parallel.parallelize import parallelize, shard_dims
from tests.distributed.ranks import run_ranks

PRELOAD = ["megatron.core.tensor_parallel", "genrec.parallel.parallelize"]
LENGTHS, CONTEXTS, TARGETS = [5, 0, 9, 1, 4], [1, 0, 2, 0, 0], [2, 0, 3, 1, 0]
SIZES = {"hidden_dim": 12, "num_layers": 2, "num_heads": 4, "max_seqlen": 10, "dropout": 0.0}
AFFINE = {"norm_affine": True, "uvqk_bias": True, "output_bias": True}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "production": {"form": "production"},
    "paper, all": {**AFFINE, "concat": True, "qk_dim": 5, "v_dim": 3, "window": 3},
    "production, all": {**AFFINE, "form": "production", "relative_bias": "both", "qk_dim": 2, "v_dim": 6},
    "group norm": {"group_norm": True},
    "group norm, all": {**AFFINE, "group_norm": True, "concat": True, "qk_dim": 4, "v_dim": 5, "silu_all": False},
    "position alone": {"relative_bias": "position", "concat": True, "v_dim": 7},
    "time alone": {"relative_bias": "time", "qk_dim": 1},
    "recompute": {**AFFINE, "recompute": True},
}  # fmt: skip


def tokens(dtype: torch.dtype) -> TokenSequence:
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    return TokenSequence(
        x=torch.randn(total, 12, generator=generator, dtype=torch.float64).to(dtype),
        seq_offsets=torch.tensor([0, *LENGTHS]).cumsum(0),
        max_seqlen=9,
        num_contexts=torch.tensor(CONTEXTS),
        num_targets=torch.tensor(TARGETS),
        timestamps=torch.randint(0, 10**6, (total,), generator=generator).sort().values,
    )


def new_stack(dtype: torch.dtype, seed: int = 0, **options: Any) -> HSTUStack:
    """With parameters at which no gradient vanishes by symmetry."""
    torch.manual_seed(seed)
    stack = HSTUStack(HSTUConfig(**{**SIZES, **options})).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return stack


def run(stack: nn.Module, batch: TokenSequence) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The output, the gradient of the input and those of the parameters, under a loss of many directions."""
    x = batch.x.clone().requires_grad_()
    out = stack(x, batch)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, gradients  # type: ignore[return-value]


def block(whole: Tensor, dim: int | None) -> Tensor:
    """What this rank holds of a tensor that is split along `dim`."""
    if dim is None:
        return whole
    return whole.chunk(megatron.tensor_parallel_size(), dim)[megatron.tensor_parallel_rank()]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0


def compare(form: str, dtype: torch.dtype, sequence_parallel: bool) -> dict[str, float]:
    """Differences of a split stack from a whole one in fp64: relative to the largest entry; in fp32 also relative to
    three times what a whole stack in fp32 differs by."""
    batch, group = tokens(dtype), megatron.tensor_parallel_group()
    seed = dist.get_global_rank(group, 0)
    whole = new_stack(dtype, seed, **FORMS[form])
    exact = run(copy.deepcopy(whole).double(), double(batch))
    plain = run(whole, batch)
    # Of what is split, the group's first rank has the values that count.
    stack = new_stack(dtype, dist.get_rank(), **FORMS[form])
    for name, parameter in stack.named_parameters():
        if name.split(".")[-2] in ("input_norm", "relative_bias") or name.endswith("output.bias"):
            parameter.data.copy_(whole.get_parameter(name))
    parallelize(stack, sequence_parallel=sequence_parallel)
    parallelize(stack, sequence_parallel=sequence_parallel)
    found, dims = run(stack, batch), shard_dims(stack)
    assert found[2].keys() == exact[2].keys(), "no name changes"
    assert stack.state_dict().keys() == {name for name, _ in stack.named_parameters()}
    stack.load_state_dict(stack.state_dict())
    allowed = {"out": difference(plain[0], exact[0]), "x": difference(plain[1], exact[1])}
    differences = {"out": difference(found[0], exact[0]), "x": difference(found[1], exact[1])}
    for name, gradient in exact[2].items():
        assert float(gradient.abs().max()) > 0, name
        expected = block(gradient, dims.get(name))
        differences[name] = difference(found[2][name], expected)
        allowed[name] = difference(block(plain[2][name], dims.get(name)), expected)
    if dtype == torch.float32:
        differences = {name: value / (3 * allowed[name] + 1e-6) for name, value in differences.items()}
    stack.eval()
    with torch.no_grad():
        assert difference(stack(batch.x, batch), found[0]) < 1e-6
    return differences


def double(batch: TokenSequence) -> TokenSequence:
    return batch.with_x(batch.x.double())


def _parity(rank: int, world_size: int, size: int) -> dict[Any, Any]:
    megatron.initialize(size)
    found = {}
    for form in FORMS:
        for dtype in (torch.float64, torch.float32):
            for sequence_parallel in (False, True):
                found[form, dtype, sequence_parallel] = compare(form, dtype, sequence_parallel)
    megatron.destroy()
    return found


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4)])
def test_split_stacks_are_whole_ones_to_rounding(world_size, size):
    for result in run_ranks(_parity, world_size, size, preload=PRELOAD):
        for case, differences in result.items():
            bound = 1e-12 if case[1] == torch.float64 else 1.0
            worst = max(differences, key=differences.__getitem__)
            assert differences[worst] < bound, (case, worst, differences[worst])
