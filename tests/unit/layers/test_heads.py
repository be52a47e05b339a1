from __future__ import annotations

import pytest
import torch

from genrec.layers import MLP, L2Norm, MultiTaskHead, SwishLayerNorm, output_norm


def test_tasks_get_their_columns() -> None:
    head = MultiTaskHead(6, {"click": 1, "rating": 5, "like": 1}, hidden_dims=(8,))
    x = torch.randn(7, 6)
    logits = head(x)
    assert {name: tuple(part.shape) for name, part in logits.items()} == {"click": (7,), "rating": (7, 5), "like": (7,)}
    whole = head.mlp(x)
    assert torch.equal(logits["click"], whole[:, 0])
    assert torch.equal(logits["rating"], whole[:, 1:6])
    assert torch.equal(logits["like"], whole[:, 6])


def test_mlp_is_linear_activation_linear() -> None:
    mlp = MLP(3, (5, 4), 2, activation="gelu")
    x = torch.randn(6, 3)
    want = mlp[4](torch.nn.functional.gelu(mlp[2](torch.nn.functional.gelu(mlp[0](x)))))
    assert torch.equal(mlp(x), want)
    assert len(MLP(3, (), 2)) == 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swish_layer_norm"])
def test_activations_learn(activation: str) -> None:
    mlp = MLP(3, (5,), 2, activation=activation, dropout=0.5)
    mlp(torch.randn(6, 3)).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())
    x = torch.randn(4, 3)
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


def test_swish_layer_norm() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(SwishLayerNorm(6).double()(x), x / (1 + (-normed).exp()))


def test_norms() -> None:
    x = torch.randn(4, 6)
    torch.testing.assert_close(output_norm("l2", 6)(x).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(output_norm("layer", 6)(x), torch.nn.functional.layer_norm(x, (6,)))
    assert torch.equal(output_norm("none", 6)(x), x)
    assert torch.equal(L2Norm()(torch.zeros(1, 3)), torch.zeros(1, 3))
    head = MultiTaskHead(6, {"a": 1}, norm="l2")
    torch.testing.assert_close(head(x)["a"], head(5 * x)["a"])


def test_errors() -> None:
    with pytest.raises(ValueError, match="Unknown activation 'tanhh'"):
        MLP(3, (4,), 1, activation="tanhh")
    with pytest.raises(ValueError, match="Unknown normalisation"):
        output_norm("batch", 3)
    with pytest.raises(ValueError, match="at least one task"):
        MultiTaskHead(3, {})
