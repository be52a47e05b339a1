"""HSTU layers split over tensor-parallel ranks against whole ones."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genrec.layers import HSTUConfig, HSTULayer, HSTUStack, SASRecConfig, SASRecStack, TokenSequence
from genrec.layers.ops import layer_backends_used
from genrec.parallel import megatron
from genrec.parallel.parallelize import check_model, clip_grad_norm, parallelize, shard_dims
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
    "recompute parts": {**AFFINE, "layer_recompute": ("norm", "silu", "gate")},
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


def _triton(rank: int, world_size: int) -> dict[Any, Any]:
    os.environ["TRITON_INTERPRET"] = "1"
    megatron.initialize(2)
    batch, found = tokens(torch.float32), {}
    for form, sequence_parallel in (("production, all", False), ("group norm, all", True)):
        expected = run(new_stack(torch.float32, **FORMS[form]), batch)
        stack = new_stack(torch.float32, layer_backend="triton", **FORMS[form])
        parallelize(stack, sequence_parallel=sequence_parallel)
        out, dx, gradients = run(stack, batch)
        dims = shard_dims(stack)
        found[form] = {"out": difference(out, expected[0]), "x": difference(dx, expected[1])} | {
            name: difference(gradients[name], block(whole, dims.get(name))) for name, whole in expected[2].items()
        }
    found["used"] = layer_backends_used()["triton"]
    dropped = new_stack(torch.float32, layer_backend="triton", num_layers=1, dropout=0.5, output_bias=False)
    parallelize(dropped)
    caught = _Caught(dropped.layers[0].output)
    torch.manual_seed(3)
    dropped(batch.x, batch)
    found["mask"] = caught.inputs[0] == 0
    megatron.destroy()
    return found


def test_fused_layers_are_split_too():
    pytest.importorskip("triton")
    results = run_ranks(_triton, 2, preload=PRELOAD)
    for result in results:
        for form in ("production, all", "group norm, all"):
            assert max(result[form].values()) < 1e-4, result[form]
        assert set(result["used"]) >= {"gate: fused, its norm by SplitLayerNorm", "gate: fused with its norm"}
    same = (results[0]["mask"] == results[1]["mask"]).double().mean()
    assert 0.35 < same < 0.65, "masks of two ranks are independent"


# Training -------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A stack between two layers that every rank holds whole."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(12, 12)
        self.stack = new_stack(torch.float64, **options)
        self.after = nn.Linear(12, 3)

    def forward(self, batch: TokenSequence) -> Tensor:
        return self.after(self.stack(self.before(batch.x), batch)).square().mean()


def shares(count: int) -> list[TokenSequence]:
    """Batches of the same number of tokens: the mean of their losses is the loss of all of them."""
    whole = tokens(torch.float64)
    order = torch.arange(len(whole.x))
    return [whole.with_x(whole.x[order.roll(3 * share)] * (1 + share)) for share in range(count)]


def train(model: nn.Module, loss: Any, batches: list[TokenSequence], max_norm: float, norm_type: float) -> list[Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        torch.stack([loss(batch) for batch in batches]).mean().backward()
        norms.append(clip_grad_norm(model.parameters(), max_norm, norm_type))
        optimizer.step()
    return norms


def _training(rank: int, world_size: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    cases = [(form, parallel, 2.0) for form in ("paper, all", "production", "group norm, all") for parallel in (0, 1)]
    for form, sequence_parallel, norm_type in [*cases, ("recompute", 0, float("inf")), ("recompute", 1, 1.0)]:
        results = []
        for size in (1, 2):
            megatron.initialize(size)
            torch.manual_seed(3)
            model = Model(**FORMS[form]).double()
            if size == 1:
                norms = train(model, model, shares(2), 0.5, norm_type)
            else:
                parallelize(model, sequence_parallel=bool(sequence_parallel))
                wrapped = megatron.wrap_data_parallel(model, set())
                own = shares(2)[megatron.data_parallel_rank()]
                norms = train(model, wrapped, [own], 0.5, norm_type)
            dims = shard_dims(model)
            results.append((norms, {name: p.detach() for name, p in model.named_parameters()}))
            if size == 2:
                expected = {name: block(p, dims.get(name)) for name, p in results[0][1].items()}
            megatron.destroy()
        (norms, _), (split_norms, split) = results
        found[form, sequence_parallel, norm_type] = {
            "parameters": max(difference(split[name], value) for name, value in expected.items()),
            "norms": max(difference(b, a) for a, b in zip(norms, split_norms, strict=True)),
            "clipped": sum(float(norm) > 0.5 for norm in norms),
            "exact norms": [float(norm) for norm in split_norms],
            "whole": {name: p for name, p in split.items() if name not in dims},
        }
    return found


def test_training_and_clipping_over_two_by_two_ranks_is_that_of_one_process():
    results = run_ranks(_training, 4, preload=PRELOAD)
    for case, found in results[0].items():
        assert found["clipped"], "clipping is tested"
        for result in results:
            assert result[case]["parameters"] < 1e-10, case
            assert result[case]["norms"] < 1e-10, case
            assert result[case]["exact norms"] == found["exact norms"]
            for name, parameter in result[case]["whole"].items():
                assert torch.equal(parameter, found["whole"][name])


# Dropout, precision, errors -------------------------------------------------------------------------------------------


class _Caught:
    """What `linear` is given in a forward pass, by a hook."""

    def __init__(self, linear: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        linear.register_forward_pre_hook(lambda module, inputs: self.inputs.append(inputs[0].detach()))


def _dropout(rank: int, world_size: int) -> dict[str, Any]:
    batch = tokens(torch.float64)
    megatron.initialize(2)
    torch.manual_seed(11)
    stack = new_stack(torch.float64, 0, dropout=0.5, num_layers=1, recompute=True, concat=True, output_bias=False)
    parallelize(stack)
    caught = _Caught(stack.layers[0].output)
    torch.manual_seed(12)
    x = batch.x.clone().requires_grad_()
    out = stack(x, batch)
    after = torch.rand(1)
    out.sum().backward()
    again = torch.rand(1)
    masks = [(inputs == 0).view(len(batch.x), 2, -1) for inputs in caught.inputs]

    other = new_stack(torch.float64, 0, attention_dropout=0.5, num_layers=1)
    with torch.no_grad():
        # Every head alike: only the masks of the attention weights differ by head and by rank.
        for weight in (other.layers[0].uvqk.weight, other.layers[0].output.weight.T):
            weight.copy_(weight.unflatten(0, (4, -1))[:1].expand(4, -1, -1).flatten(0, 1))
    parallelize(other)
    attention = _Caught(other.layers[0].output)
    other(batch.x, batch)

    errors = []
    torch.manual_seed(20 + rank)
    wrong = new_stack(torch.float64, 0, dropout=0.5)
    parallelize(wrong)
    torch.manual_seed(30 + rank)
    for own in (batch, batch.with_x(batch.x[: len(batch.x) - rank])):
        with pytest.raises(RuntimeError) as raised:
            wrong(own.x, own)
        errors.append(str(raised.value))
    with pytest.raises(ValueError, match="sequence_parallel needs every HSTU layer in an HSTUStack"):
        parallelize(HSTULayer(HSTUConfig(**SIZES)), sequence_parallel=True)
    megatron.destroy()
    return {
        "masks": masks, "out": out.detach(), "grad": x.grad, "after": float(after), "again": float(again),
        "attention": attention.inputs[0], "errors": errors,
    }  # fmt: skip


def test_dropout_of_heads_differs_by_rank_and_all_else_is_drawn_alike():
    first, second = run_ranks(_dropout, 2, preload=PRELOAD)
    for own, other in ((first, second), (second, first)):
        forward, recomputed = own["masks"]
        assert torch.equal(forward, recomputed), "the backward pass drops what the forward pass did"
        assert 0.4 < forward.double().mean() < 0.6
        same = (forward == other["masks"][0]).double().mean()
        assert 0.4 < same < 0.6, "masks of two ranks are independent"
        assert own["after"] == other["after"], "random numbers after the layer are drawn alike"
        assert own["again"] == other["again"]
        assert own["after"] != own["again"]
        assert torch.equal(own["out"], other["out"])
        assert torch.equal(own["grad"], other["grad"])
        assert "different random states: seed them alike" in own["errors"][0]
        assert "batches of [19, 18] tokens: give all of them the same batch" in own["errors"][1]
    assert not torch.equal(first["attention"], second["attention"])


def _autocast(rank: int, world_size: int) -> dict[str, float]:
    megatron.initialize(2)
    batch, found = tokens(torch.float32), {}
    for form in ("production, all", "paper, all"):
        for sequence_parallel in (False, True):
            results = []
            for split in (False, True):
                stack = new_stack(torch.float32, **FORMS[form])
                if split:
                    parallelize(stack, sequence_parallel=sequence_parallel)
                x = batch.x.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16):
                    out = stack(x, batch)
                out.float().square().mean().backward()
                results.append((out, x.grad, stack.layers[0].uvqk.weight.grad))
            (a, dx_a, dw_a), (b, dx_b, dw_b) = results
            assert a.dtype == b.dtype
            assert dw_b.dtype == torch.float32
            name = f"{form}/{sequence_parallel}"
            found[f"{name}/out"] = difference(b.float(), a.float())
            found[f"{name}/x"] = difference(dx_b, dx_a)
            found[f"{name}/weight"] = difference(dw_b, block(dw_a, 0))
    megatron.destroy()
    return found


def test_autocast_to_bf16_gives_what_whole_layers_give_in_it():
    for result in run_ranks(_autocast, 2, preload=PRELOAD):
        for name, value in result.items():
            assert value < 0.05, (name, value)


def test_a_model_without_layers_to_split_is_an_error():
    with pytest.raises(ValueError, match=r"SASRecStack has none.*set tensor_parallel_size=1"):
        check_model(SASRecStack(SASRecConfig()), 2, 2)
    check_model(SASRecStack(SASRecConfig()), 2, 1)
    with pytest.raises(ValueError, match="doesn't divide num_heads 4"):
        check_model(HSTUStack(HSTUConfig(**SIZES)), 3, 3)
