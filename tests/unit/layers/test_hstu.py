from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.layers import HSTUConfig, HSTULayer, HSTUStack, TokenSequence
from genrec.layers import ops as layer_ops

N, D, H, DV, DQK = 24, 12, 3, 5, 4
BASE = HSTUConfig(hidden_dim=D, num_layers=2, num_heads=H, qk_dim=DQK, v_dim=DV, max_seqlen=N, dropout=0.0,
                  num_time_buckets=40, attention_backend="torch")  # fmt: skip


def _tokens(lengths: tuple[int, ...] = (9, 0, 24, 1, 5), **fields: object) -> TokenSequence:
    torch.manual_seed(len(lengths))
    total = sum(lengths)
    gaps = (10 ** (torch.rand(total, dtype=torch.float64) * 6)).long()
    return TokenSequence(
        x=torch.randn(total, D, dtype=torch.float64),
        seq_offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        max_seqlen=max(lengths),
        timestamps=torch.cat([part.cumsum(0) for part in gaps.split(list(lengths))]),
        **fields,  # type: ignore[arg-type]
    )


def _randomised(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, where biases are 0 and scales 1; tables large enough to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module.double()


def _sequences(tokens: TokenSequence) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(tokens.seq_offsets.tolist()) if b > a]


def _heads(layer: HSTULayer, row: Tensor, h: int, bias: Tensor | None) -> list[Tensor]:
    """u, v, q, k of head h before SiLU, from the head-major weight, written out by hand."""
    width = 2 * DV + 2 * DQK
    block = slice(h * width, (h + 1) * width)
    y = row @ layer.uvqk.weight[block].T + (0 if bias is None else bias[block])
    return [y[:, :DV], y[:, DV : 2 * DV], y[:, 2 * DV : 2 * DV + DQK], y[:, 2 * DV + DQK :]]


def _plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def test_paper_form_is_the_papers_equations() -> None:
    tokens = _tokens()
    layer = _randomised(HSTULayer(BASE))
    out = layer(tokens.x, tokens)
    assert tokens.timestamps is not None
    for rows in _sequences(tokens):
        x, t = tokens.x[rows], tokens.timestamps[rows].tolist()
        n = len(x)
        p, w = layer.relative_bias.position_weight, layer.relative_bias.time_weight
        rab = torch.empty(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                gap = max(abs(t[min(i + 1, n - 1)] - t[j]), 1)
                rab[i, j] = p[j - i + N - 1] + w[min(int(math.log(gap) / 0.301), 39)]
        av, u_all = [], []
        for h in range(H):
            u, v, q, k = (F.silu(part) for part in _heads(layer, _plain_norm(x), h, None))
            a = torch.tril(F.silu(q @ k.T + rab) / N)
            av.append(a @ v)
            u_all.append(u)
        gated = _plain_norm(torch.cat(av, -1)) * torch.cat(u_all, -1)
        want = x + gated @ layer.output.weight.T + layer.output.bias
        torch.testing.assert_close(out[rows], want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("group_norm", [False, True])
def test_production_form_is_its_equations(group_norm: bool) -> None:
    tokens = _tokens()
    layer = _randomised(HSTULayer(replace(BASE, form="production", group_norm=group_norm)))
    out = layer(tokens.x, tokens)
    for rows in _sequences(tokens):
        x = tokens.x[rows]
        normed = _plain_norm(x) * layer.input_norm.weight + layer.input_norm.bias
        u_all, a_all = [], []
        for h in range(H):
            u, v, q, k = _heads(layer, normed, h, layer.uvqk.bias)
            weights = torch.tril(F.silu(q @ k.T / math.sqrt(DQK)) / N)
            u_all.append(F.silu(u))
            a_all.append(weights @ v)
        if group_norm:
            n_all = [_plain_norm(a) * layer.output_norm.weight[h] + layer.output_norm.bias[h]
                     for h, a in enumerate(a_all)]  # fmt: skip
        else:
            whole = _plain_norm(torch.cat(a_all, -1)) * layer.output_norm.weight + layer.output_norm.bias
            n_all = list(whole.split(DV, -1))
        y = torch.cat([part for u, a, n in zip(u_all, a_all, n_all, strict=True) for part in (u, a, u * n)], -1)
        torch.testing.assert_close(out[rows], x + y @ layer.output.weight.T, rtol=1e-11, atol=1e-11)
    assert layer.output.bias is None


def test_forms_start_as_published() -> None:
    big = HSTUConfig(hidden_dim=256, num_heads=4)
    paper, production = HSTULayer(big), HSTULayer(replace(big, form="production"))
    assert paper.uvqk.bias is None
    assert paper.input_norm.weight is None
    assert paper.output_norm.weight is None
    assert abs(paper.uvqk.weight.std().item() - 0.02) < 1e-3
    assert production.relative_bias is None
    assert (production.uvqk.bias == 0).all()
    bound = math.sqrt(6 / (256 + 1024))
    assert 0.98 * bound < production.uvqk.weight.abs().max() <= bound
    assert abs(paper.relative_bias.position_weight.std().item() - 0.02) < 5e-3
    assert paper.relative_bias.position_weight.shape == (399,)
    assert paper.relative_bias.time_weight.shape == (129,)


def test_switches_override_the_form() -> None:
    changed = replace(BASE, form="production", relative_bias="position", concat=False, output_bias=True,
                      norm_affine=False, silu_all=True, uvqk_bias=False, alpha=1.0)  # fmt: skip
    tokens = _tokens()
    production, paper = HSTULayer(changed), HSTULayer(replace(BASE, relative_bias="position"))
    paper.load_state_dict(production.state_dict())
    assert torch.equal(production.double()(tokens.x, tokens), paper.double()(tokens.x, tokens))


@pytest.mark.parametrize("form", ["paper", "production"])
def test_recompute_gives_the_same_gradients(form: str) -> None:
    config = replace(BASE, form=form, dropout=0.3, attention_dropout=0.2)
    tokens = _tokens(num_targets=torch.tensor([2, 0, 4, 0, 5]))
    kept, again = HSTUStack(config).double(), HSTUStack(replace(config, recompute=True)).double()
    again.load_state_dict(kept.state_dict())
    gradients = []
    for stack in (kept, again):
        torch.manual_seed(5)
        x = tokens.x.clone().requires_grad_()
        stack(x, tokens).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in stack.parameters())])
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_recompute_keeps_less() -> None:
    tokens = _tokens((24,) * 8)

    def kept(config: HSTUConfig) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            HSTUStack(config).double()(tokens.x.clone().requires_grad_(), tokens)
        return sum(sizes)

    assert kept(replace(BASE, recompute=True)) < kept(BASE) / 4


def test_result_does_not_depend_on_batch_mates() -> None:
    tokens = _tokens()
    stack = _randomised(HSTUStack(BASE))
    together = stack(tokens.x, tokens)
    for rows in _sequences(tokens):
        alone = TokenSequence(tokens.x[rows], torch.tensor([0, rows.stop - rows.start]), rows.stop - rows.start,
                              timestamps=tokens.timestamps[rows])  # type: ignore[index]  # fmt: skip
        torch.testing.assert_close(stack(alone.x, alone), together[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["paper", "production"])
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_nothing_in_nothing_out(form: str, lengths: tuple[int, ...]) -> None:
    tokens = TokenSequence(torch.zeros(0, D, requires_grad=True), torch.zeros(len(lengths) + 1, dtype=torch.long), 0,
                           timestamps=torch.zeros(0, dtype=torch.long))  # fmt: skip
    stack = HSTUStack(replace(BASE, form=form))
    out = stack(tokens.x, tokens)
    assert out.shape == (0, D)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.isnan().any() for p in stack.parameters())


def test_window_and_targets_reach_the_attention() -> None:
    tokens = _tokens((20,), num_targets=torch.tensor([4]), target_group_size=2)
    stack = _randomised(HSTUStack(replace(BASE, num_layers=1, window=3)))
    x = tokens.x.clone().requires_grad_()
    seen = [torch.autograd.grad(stack(x, tokens)[i].sum(), x)[0].abs().sum(1).nonzero().flatten().tolist()
            for i in (10, 17, 19)]  # fmt: skip
    assert seen[0] == [7, 8, 9, 10]
    assert seen[1] == [*range(16), 16, 17]
    assert seen[2] == [*range(16), 18, 19]


def test_dropout_acts_in_training_only() -> None:
    tokens = _tokens()
    layer = HSTULayer(replace(BASE, dropout=0.5, attention_dropout=0.5)).double()
    assert not torch.equal(layer(tokens.x, tokens), layer(tokens.x, tokens))
    layer.eval()
    assert torch.equal(layer(tokens.x, tokens), layer(tokens.x, tokens))


def test_missing_timestamps_are_an_error_with_a_cure() -> None:
    tokens = replace(_tokens(), timestamps=None)
    with pytest.raises(ValueError, match="relative_bias='position'"):
        HSTULayer(BASE).double()(tokens.x, tokens)
    HSTULayer(replace(BASE, relative_bias="position")).double()(tokens.x, tokens)


def test_bfloat16_runs() -> None:
    tokens = _tokens()
    for form in ("paper", "production"):
        layer = HSTULayer(replace(BASE, form=form))
        want = layer(tokens.x.float(), tokens)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(tokens.x.float(), tokens)
        torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)
        out = layer.bfloat16()(tokens.x.bfloat16(), tokens)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "papers"}, "form must be"),
        ({"relative_bias": "all"}, "relative_bias must be"),
        ({"num_heads": 5, "qk_dim": None}, "not a multiple"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"num_layers": 0}, "num_layers must be"),
    ],
)
def test_bad_configs_are_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)  # type: ignore[arg-type]


def test_unknown_layer_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Unknown layer backend"):
        HSTULayer(replace(BASE, layer_backend="nope"))
    monkeypatch.setitem(layer_ops.LAYER_BACKENDS, "gone", "genrec.no_such_module:X")
    with pytest.raises(ValueError, match="can't be loaded"):
        HSTULayer(replace(BASE, layer_backend="gone"))


def test_state_dict_does_not_know_the_backend() -> None:
    names = set(HSTULayer(BASE).state_dict())
    assert names == {"uvqk.weight", "relative_bias.position_weight", "relative_bias.time_weight", "output.weight",
                     "output.bias"}  # fmt: skip


def test_layers_import_no_lightning() -> None:
    code = "import sys, genrec.attention, genrec.layers, genrec.backends; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.stdout.split()[-1] == "False"
