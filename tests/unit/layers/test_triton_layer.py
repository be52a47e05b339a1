from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genrec.layers import HSTUConfig, HSTULayer, HSTUStack, TokenSequence, ops
from genrec.layers.hstu import HeadNorm
from genrec.layers.ops import get_layer_ops, layer_backends_used
from genrec.layers.triton import silu
from genrec.layers.triton.gate import ROOM, gated_product
from genrec.layers.triton.layer import plain_norm
from genrec.layers.triton.norm import layer_norm, layer_norm_backward
from genrec.layers.triton.silu import SplitActivated, activate_uvqk, merge_uvqk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = HSTUConfig(hidden_dim=24, num_layers=2, num_heads=3, qk_dim=4, v_dim=10, max_seqlen=24, dropout=0.0,
                  num_time_buckets=40, attention_backend="torch")  # fmt: skip
FORMS = [
    {"form": "paper"},
    {"form": "paper", "group_norm": True, "norm_affine": True},
    {"form": "production"},
    {"form": "production", "group_norm": True},
    {"form": "production", "silu_all": True, "concat": False, "output_bias": True},
]
ALL = ("norm", "silu", "gate")


def _tokens(config: HSTUConfig, lengths: tuple[int, ...] = (9, 0, 24, 1, 5), dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    gaps = (10 ** (torch.rand(total, dtype=torch.float64) * 6)).long()
    times = torch.cat([part.cumsum(0) for part in gaps.split(list(lengths))]) if lengths else gaps
    return TokenSequence(
        x=torch.randn(total, config.hidden_dim).to(DEVICE, dtype),
        seq_offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE),
        max_seqlen=max(lengths, default=0),
        timestamps=times.to(DEVICE),
        num_targets=torch.tensor([min(n, 2) for n in lengths], dtype=torch.int64, device=DEVICE),
    )


def _pair(config: HSTUConfig, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The stack in torch and in Triton, with the weights of the first in both, through a checkpoint."""
    torch.manual_seed(0)
    plain = HSTUStack(replace(config, layer_backend="torch"))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.dim() == 1 else 0.0))
    fused = HSTUStack(replace(config, layer_backend="triton", **changes))
    fused.load_state_dict(plain.state_dict())
    return plain.to(DEVICE), fused.to(DEVICE)


def _run(stack: nn.Module, tokens: TokenSequence) -> list[Tensor]:
    x = tokens.x.clone().requires_grad_()
    y = stack(x, tokens)
    torch.manual_seed(3)
    gradients = torch.autograd.grad(y, [x, *stack.parameters()], torch.randn(y.shape).to(y))
    return [y.detach(), *gradients]


def _close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(other.abs().max().item(), 1e-6))


@pytest.mark.parametrize("recompute", [(), ALL], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_stack_equals_the_torch_stack(form: dict[str, Any], recompute: tuple[str, ...]) -> None:
    config = replace(BASE, **form)
    plain, fused = _pair(config, layer_recompute=recompute)
    tokens = _tokens(config)
    _close(_run(fused, tokens), _run(plain, tokens), 1e-5)
    back = HSTUStack(replace(config, layer_backend="torch"))
    back.load_state_dict(fused.state_dict())  # and the other way round
    assert list(back.state_dict()) == list(fused.state_dict())


@pytest.mark.parametrize("seen", ["as it is", "used twice", "changed", "changed in place", "gone through twice"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_of_u_is_written_where_it_is_wanted(
    form: dict[str, Any], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy where it comes through as it was; right in any case, the same as with a gradient of its own."""
    in_place: list[bool] = []
    real = silu._merge_into

    def merge(dy: Tensor, du: Tensor | None, *others: Any) -> Tensor:
        in_place.append(du is None)
        return real(dy, du, *others)

    monkeypatch.setattr(silu, "_merge_into", merge)
    _, stack = _pair(replace(BASE, num_layers=1, **form))
    layer, c = stack.layers[0], replace(BASE, **form).resolved()
    leaves = [p for name, p in layer.named_parameters() if "relative" not in name]
    x = torch.randn(37, c.hidden_dim, device=DEVICE).requires_grad_()
    factors = torch.randn(2, 37, c.num_heads, c.v_dim, device=DEVICE)
    results = []
    for room in (True, False):
        through, u, v, q, k = layer.ops.norm_linear_silu(
            x, layer.input_norm, layer.uvqk, (c.v_dim, c.qk_dim), c.silu_all
        )
        if not room:
            delattr(u, ROOM)
        if seen.startswith("changed"):
            u.register_hook(lambda d: d.mul_(2.0) if seen.endswith("place") else d * 2.0)
        a = v * (q + k).mean(-1, keepdim=True).sin()
        y = layer.ops.gated_output(through, a * factors[0], u, layer.output_norm, layer.output, c.concat, 0.0, True)
        loss = y.square().sum()
        if seen == "used twice":
            loss = loss + (u * factors[1]).sum()
        if seen == "gone through twice":
            torch.autograd.grad(loss, [x, *leaves], retain_graph=True)
        results.append(list(torch.autograd.grad(loss, [x, *leaves])))
    kept = seen in ("as it is", "gone through twice")
    assert in_place == ([kept, kept, False, False] if seen == "gone through twice" else [kept, False])
    _close(*results, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_stack_of_real_size(form: dict[str, Any], dtype: torch.dtype) -> None:
    config = HSTUConfig(hidden_dim=1024, num_heads=4, max_seqlen=512, dropout=0.0, attention_backend="torch", **form)
    plain, fused = _pair(config)
    tokens = _tokens(config, (512, 300, 0, 77), dtype)
    want = _run(plain.double(), replace(tokens, x=tokens.x.double()))
    low = _run(plain.to(dtype), tokens)
    got = _run(fused.to(dtype), tokens)
    for i, (x, reference, lowered) in enumerate(zip(got, want, low, strict=True)):
        error, yardstick = (x - reference).abs().max().item(), (lowered - reference).abs().max().item()
        assert error <= (2 if i == 0 else 5) * yardstick + 1e-6 * reference.abs().max().item()


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_nothing_in_nothing_out(lengths: tuple[int, ...]) -> None:
    for form in FORMS:
        _, fused = _pair(replace(BASE, **form), layer_recompute=ALL)
        out = _run(fused, _tokens(BASE, lengths))
        assert out[0].shape == (0, 24)
        assert all((g == 0).all() for g in out[1:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [*ALL, "all"])
@pytest.mark.parametrize("form", ["paper", "production"])
def test_layer_recompute_gives_the_same_gradients(form: str, name: str, backend: str) -> None:
    config = replace(BASE, form=form, dropout=0.3, layer_backend=backend, num_layers=1)
    tokens = _tokens(config)
    results = []
    for recompute in ((), ALL if name == "all" else (name,)):
        torch.manual_seed(1)
        stack = HSTUStack(replace(config, layer_recompute=recompute)).to(DEVICE)
        torch.manual_seed(2)
        results.append(_run(stack, tokens))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def _kept(config: HSTUConfig, tokens: TokenSequence, autocast: bool = False) -> int:
    """Bytes of the tokens' activations that the graph keeps alive, each storage once, weights apart."""
    layer = HSTULayer(config).to(DEVICE)
    x = tokens.x.clone().requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights and t.dim() and t.shape[0] == tokens.x.shape[0]:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE, enabled=autocast):
        y = layer(x, tokens)
    del y
    return sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layer_recompute_keeps_less(backend: str, autocast: bool) -> None:
    config = replace(BASE, layer_backend=backend, hidden_dim=64, v_dim=16, qk_dim=16, num_heads=4)
    tokens = _tokens(config, (24,) * 6)
    unit = 144 * 64 * (2 if autocast else 4)  # a (T, hidden) tensor
    everything = _kept(config, tokens, autocast)
    for names, saving in ((("norm",), 1), (("silu",), 3), (("gate",), 1), (ALL, 5)):
        kept = _kept(replace(config, layer_recompute=names), tokens, autocast)
        assert kept <= everything - saving * unit, names


def test_unknown_recompute_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer_recompute knows norm, silu, gate; got 'norms'"):
        HSTULayer(replace(BASE, layer_recompute=("norms",)))


class _MegatronLike(nn.Linear):
    """Returns its bias beside its result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x @ self.weight.T, self.bias


class _OtherNorm(nn.LayerNorm):
    """A norm that the kernels must not take for a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("recompute", [(), ALL], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_swapped_modules_are_called(form: dict[str, Any], recompute: tuple[str, ...]) -> None:
    """As tensor parallelism does: linear layers that return a pair, norms of another class."""
    changes = {**form, "num_layers": 1, "uvqk_bias": True, "output_bias": True, "group_norm": False}
    config = replace(BASE, **changes)
    plain, fused = _pair(config, layer_recompute=recompute)
    for stack in (plain, fused):
        layer = stack.layers[0]
        for name in ("uvqk", "output"):
            old = getattr(layer, name)
            new = _MegatronLike(old.in_features, old.out_features).to(DEVICE)
            new.load_state_dict(old.state_dict())
            setattr(layer, name, new)
        for name in ("input_norm", "output_norm"):
            old = getattr(layer, name)
            new = _OtherNorm(old.normalized_shape, old.eps, old.elementwise_affine).to(DEVICE)
            new.load_state_dict(old.state_dict())
            setattr(layer, name, new)
    tokens = _tokens(config)
    _close(_run(fused, tokens), _run(plain, tokens), 1e-5)
    notes = layer_backends_used()["triton"]
    assert "input norm: by _OtherNorm" in notes
    assert "gate: fused, its norm by _OtherNorm" in notes


def test_which_norms_are_fused() -> None:
    assert plain_norm(nn.LayerNorm(24), 24) is not None
    assert plain_norm(HeadNorm(3, 8, 1e-6, True), 24).groups == 3  # type: ignore[union-attr]
    assert plain_norm(nn.LayerNorm(24, bias=False), 24) is None
    assert plain_norm(nn.LayerNorm(24), 48) is None
    assert plain_norm(_OtherNorm(24), 24) is None
    assert plain_norm(nn.Identity(), 24) is None
    hooked = nn.LayerNorm(24)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    assert plain_norm(hooked, 24) is None


def test_autocast_is_as_close_as_torch() -> None:
    for form in FORMS:
        plain, fused = _pair(replace(BASE, **form, layer_recompute=ALL))
        tokens = _tokens(BASE)
        want = _run(plain.double(), replace(tokens, x=tokens.x.double()))
        plain.float()
        with torch.autocast(DEVICE, torch.bfloat16):
            low, got = _run(plain, tokens), _run(fused, tokens)
        for i, (x, reference, lowered) in enumerate(zip(got, want, low, strict=True)):
            error, yardstick = (x - reference).abs().max().item(), (lowered - reference).abs().max().item()
            assert x.dtype == lowered.dtype
            assert error <= (2 if i == 0 else 5) * yardstick, i


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    layer = HSTULayer(replace(BASE, dropout=0.5, layer_backend="triton")).to(DEVICE)
    tokens = _tokens(BASE)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(tokens.x, tokens)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


def test_whole_layers_recomputed_with_the_same_masks() -> None:
    config = replace(BASE, dropout=0.5, layer_backend="triton")
    tokens = _tokens(config)
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        stack = HSTUStack(replace(config, recompute=recompute)).to(DEVICE)
        results.append(_run(stack, tokens))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_auto_chooses_and_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ops._log_choice.cache_clear()
    monkeypatch.setenv("GENREC_LAYER_SMALL", "0")
    plain, _ = _pair(BASE)
    auto = HSTUStack(replace(BASE, layer_backend="auto")).to(DEVICE)
    auto.load_state_dict(plain.state_dict())
    tokens = _tokens(BASE)
    with caplog.at_level(logging.INFO):
        got = _run(auto, tokens)
    said = [record.getMessage() for record in caplog.records if record.name == ops.__name__]
    if DEVICE == "cuda":
        assert said == ["Layer backend: triton"]
    else:  # never the interpreter
        assert said == ["Layer backend: torch (not triton: the tokens are on the cpu)"]
        assert all(torch.equal(a, b) for a, b in zip(got, _run(plain, tokens), strict=True))


def test_auto_takes_torch_for_small_batches(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(tokens: int, **facts: Any) -> str:
        x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(tokens, 8), device=torch.device("cuda"))
        return type(ops.AutoLayerOps()._choose(x, **facts)).__name__  # type: ignore[arg-type]

    ops._log_choice.cache_clear()
    monkeypatch.delenv("GENREC_LAYER_SMALL", raising=False)
    with caplog.at_level(logging.INFO):
        assert chosen(ops.SMALL - 1) == "TorchLayerOps"
    assert f"not triton: batches of fewer than {ops.SMALL} tokens" in caplog.text
    assert chosen(ops.SMALL) == "TritonLayerOps"
    assert chosen(8, rows=ops.SMALL) == "TritonLayerOps"
    monkeypatch.setenv("GENREC_LAYER_SMALL", "100")
    assert [chosen(99), chosen(100)] == ["TorchLayerOps", "TritonLayerOps"]
    monkeypatch.setenv("GENREC_LAYER_SMALL", "0")
    assert chosen(1) == "TritonLayerOps"
    monkeypatch.setenv("GENREC_LAYER_SMALL", "few")
    with pytest.raises(ValueError, match="GENREC_LAYER_SMALL must be a number of tokens, got 'few'"):
        ops.AutoLayerOps()


def test_fp64_is_an_error_with_a_cure() -> None:
    layer = HSTULayer(replace(BASE, layer_backend="triton")).to(DEVICE).double()
    tokens = _tokens(BASE, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"knows fp32, bf16 and fp16, got torch.float64. Choose layer_backend 'torch'"):
        layer(tokens.x, tokens)


def test_tensors_on_the_cpu_are_an_error_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    layer = HSTULayer(replace(BASE, layer_backend="torch"))
    layer.ops = get_layer_ops("triton")
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    tokens = _tokens(BASE)
    with pytest.raises(ValueError, match=r"needs tensors on a GPU, these are on cpu.*'torch' or 'auto'"):
        layer(tokens.x.cpu(), tokens)


def test_machine_without_gpu_and_interpreter_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    lines = {line.name: line.reason for line in ops.report()}
    assert lines["torch"] is None
    assert "there is no GPU" in (lines["triton"] or "")
    with pytest.raises(ValueError, match=r"'triton' can't be loaded: there is no GPU.*Choose 'torch' or 'auto'"):
        get_layer_ops("triton")
    get_layer_ops("auto")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_torch_compile_without_graph_breaks(form: dict[str, Any]) -> None:
    layer_ops = get_layer_ops("triton")
    layer = HSTULayer(replace(BASE, **form, dropout=0.0)).to(DEVICE)
    config = layer.config

    def halves(x: Tensor) -> Tensor:
        widths = (config.v_dim, config.qk_dim)
        x, u, v, q, k = layer_ops.norm_linear_silu(x, layer.input_norm, layer.uvqk, widths, config.silu_all)
        a = v * (q * k).sum(-1, keepdim=True)
        return layer_ops.gated_output(x, a, u, layer.output_norm, layer.output, config.concat, 0.0, True)

    x = torch.randn(11, 24, device=DEVICE, requires_grad=True)
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager", dynamic=True)
    want, got = halves(x), compiled(x)
    _close([got.detach()], [want.detach()], 1e-6)
    parameters = [x, *layer.parameters()]
    torch.manual_seed(0)
    upstream = torch.randn_like(want)
    gradients = [torch.autograd.grad(y, parameters, upstream, allow_unused=True, materialize_grads=True)
                 for y in (got, want)]  # fmt: skip
    _close(list(gradients[0]), list(gradients[1]), 1e-6)


class _Halves(nn.Module):
    """A layer with a stand-in for its attention."""

    def __init__(self, layer: HSTULayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, c = self.layer, self.layer.config
        x, u, v, q, k = layer.ops.norm_linear_silu(x, layer.input_norm, layer.uvqk, (c.v_dim, c.qk_dim), c.silu_all)
        a = v * (q * k).sum(-1, keepdim=True)
        return layer.ops.gated_output(x, a, u, layer.output_norm, layer.output, c.concat, c.dropout, self.training)


@pytest.mark.parametrize("form", ["paper", "production"])
def test_torch_export(form: str) -> None:
    module = _Halves(HSTULayer(replace(BASE, form=form, layer_backend="triton"))).to(DEVICE).eval()
    x = torch.randn(11, 24, device=DEVICE)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
    assert {"genrec.layer_norm.default", "genrec.gated_product.default"} <= {str(n.target) for n in program.graph.nodes}
    other = torch.randn(17, 24, device=DEVICE)
    torch.testing.assert_close(program.module()(other), module(other))


def test_ops_are_sound() -> None:
    """PyTorch's own checks of schema, fake tensors and autograd registration."""
    x, w, b = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((7, 24), (24,), (24,)))
    torch.library.opcheck(layer_norm.registered, (x, w, b, 1, 1e-6, torch.float32))
    torch.library.opcheck(layer_norm.registered, (x, None, None, 3, 1e-6, torch.bfloat16))
    mean, rstd = (torch.randn(7, 1, device=DEVICE) for _ in range(2))
    torch.library.opcheck(layer_norm_backward.registered, tuple(t.detach() for t in (x, x, w, b, mean, rstd, x)))
    a, u = (torch.randn(7, 3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.tensor([5], device=DEVICE)
    torch.library.opcheck(gated_product.registered, (a, u, None, w, b, seed, 1, 1e-6, 0.2, True, True, torch.float32))
    given = (a, u, x, None, None, None, 1, 1e-6, 0.0, False, True, torch.float32)
    torch.library.opcheck(gated_product.registered, given,
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
    y = torch.randn(7, 3 * 24, device=DEVICE)
    torch.library.opcheck(activate_uvqk.registered, (y, 8, 4, False))
    parts = SplitActivated.apply(y, 8, 4, True, False)
    for sums in (False, True):
        torch.library.opcheck(merge_uvqk.registered, (*parts, y, sums))
