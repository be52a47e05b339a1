from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.layers import SASRecConfig, SASRecStack, TokenSequence
from genrec.layers.transformer import length_groups

LENGTHS = [5, 0, 40, 1, 17, 16, 33]
CONFIG = SASRecConfig(hidden_dim=8, num_layers=2, num_heads=2, ffn_dim=12, dropout=0.0)


def _tokens() -> TokenSequence:
    torch.manual_seed(1)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return TokenSequence(torch.randn(sum(LENGTHS), 8, dtype=torch.float64), offsets, max(LENGTHS))


def _attention(layer: torch.nn.Module, x: Tensor) -> Tensor:
    n = len(x)
    q, k, v = layer.qkv(x).split(8, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = (q[:, h] @ k[:, h].T / math.sqrt(4)).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, h])
    return layer.output(torch.cat(heads, -1))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_each_sequence_is_a_plain_transformer(norm_first: bool, activation: str) -> None:
    stack = SASRecStack(replace(CONFIG, norm_first=norm_first, activation=activation)).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = _tokens()
    out = stack(tokens.x, tokens)
    act = F.relu if activation == "relu" else F.gelu
    for start, end in pairwise(tokens.seq_offsets.tolist()):
        x = tokens.x[start:end]
        for layer in stack.layers if end > start else []:
            if norm_first:
                x = x + _attention(layer, layer.attention_norm(x))
                x = x + layer.ffn_out(act(layer.ffn_in(layer.ffn_norm(x))))
            else:
                x = layer.attention_norm(x + _attention(layer, x))
                x = layer.ffn_norm(x + layer.ffn_out(act(layer.ffn_in(x))))
        if end > start:
            torch.testing.assert_close(out[start:end], stack.final_norm(x), rtol=1e-10, atol=1e-10)


def test_gradients_stay_in_the_past_and_the_sequence() -> None:
    stack, tokens = SASRecStack(CONFIG).double(), _tokens()
    x = tokens.x.clone().requires_grad_()
    out = stack(x, tokens)
    offsets = tokens.seq_offsets.tolist()
    for start, row in ((offsets[2], offsets[2] + 20), (offsets[3], offsets[3])):
        gradient = torch.autograd.grad(out[row].sum() + out[row, 0], x, retain_graph=True)[0]
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == list(range(start, row + 1))


def test_groups_hold_each_row_once_with_little_padding() -> None:
    tokens = _tokens()
    rows = torch.cat([group.flatten() for group in length_groups(tokens.seq_offsets)])
    total = sum(LENGTHS)
    assert sorted(rows[rows < total].tolist()) == list(range(total))
    assert (rows == total).sum() < 16 * len(LENGTHS)


def test_dropout_empties_and_errors() -> None:
    tokens = _tokens()
    stack = SASRecStack(replace(CONFIG, dropout=0.5, attention_dropout=0.5)).double()
    assert not torch.equal(stack(tokens.x, tokens), stack(tokens.x, tokens))
    stack.eval()
    assert torch.equal(stack(tokens.x, tokens), stack(tokens.x, tokens))
    empty = TokenSequence(tokens.x[:0], torch.zeros(3, dtype=torch.long), 0)
    assert stack(empty.x, empty).shape == (0, 8)
    with pytest.raises(ValueError, match="no target mask"):
        stack(tokens.x, replace(tokens, num_targets=torch.ones(7, dtype=torch.long)))
    with pytest.raises(ValueError, match="not a multiple"):
        SASRecConfig(hidden_dim=9)
    with pytest.raises(ValueError, match="activation"):
        SASRecConfig(activation="silu")
