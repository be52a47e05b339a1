"""What stands on the encoder: normalisations of its output and multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SwishLayerNorm(nn.Module):
    """x * sigmoid(LayerNorm(x)), the activation of production HSTU's perceptrons."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x * self.norm(x).sigmoid()


class L2Norm(nn.Module):
    """x / max(|x|, eps) over the last dimension."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.normalize(x, dim=-1, eps=self.eps)


_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda dim: nn.ReLU(),
    "gelu": lambda dim: nn.GELU(),
    "silu": lambda dim: nn.SiLU(),
    "swish_layer_norm": SwishLayerNorm,
}
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "l2": lambda dim: L2Norm(),
    "layer": nn.LayerNorm,
}


def output_norm(name: str, dim: int) -> nn.Module:
    """Normalisation of an encoder's output: "none", "l2" or "layer".

    Raises:
        ValueError: No such normalisation.
    """
    if name not in _NORMS:
        raise ValueError(f"Unknown normalisation '{name}'. Known: {', '.join(_NORMS)}.")
    return _NORMS[name](dim)


class MLP(nn.Sequential):
    """Linear, activation, dropout for each hidden width, then a plain linear.

    Args:
        in_dim: Width of the input.
        hidden_dims: Widths of the hidden layers; empty for a single linear.
        out_dim: Width of the output.
        activation: "relu", "gelu", "silu" or "swish_layer_norm".
        dropout: After each activation.

    Raises:
        ValueError: No such activation.
    """

    def __init__(
        self, in_dim: int, hidden_dims: Sequence[int], out_dim: int, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"Unknown activation '{activation}'. Known: {', '.join(_ACTIVATIONS)}.")
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), _ACTIVATIONS[activation](width)]
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
            in_dim = width
        super().__init__(*layers, nn.Linear(in_dim, out_dim))


class MultiTaskHead(nn.Module):
    """Logits of every task from one perceptron on the (normalised) output of the encoder.

    Args:
        in_dim: D, width of the encoder's output.
        task_dims: Logits of each task: 1 for binary tasks and regressions, the number of classes otherwise.
        hidden_dims: Widths of the hidden layers, shared by the tasks.
        activation: As in `MLP`.
        dropout: As in `MLP`.
        norm: Normalisation before the perceptron: "none", "l2" or "layer".
    """

    def __init__(
        self,
        in_dim: int,
        task_dims: dict[str, int],
        hidden_dims: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str = "none",
    ) -> None:
        super().__init__()
        if not task_dims:
            raise ValueError("A multi-task head needs at least one task in task_dims.")
        self.task_dims = dict(task_dims)
        self.norm = output_norm(norm, in_dim)
        self.mlp = MLP(in_dim, hidden_dims, sum(task_dims.values()), activation, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(rows, D) -> logits by task: (rows,) where the task has one, else (rows, classes)."""
        parts = self.mlp(self.norm(x)).split(list(self.task_dims.values()), dim=-1)
        return {
            name: part.squeeze(-1) if dim == 1 else part
            for (name, dim), part in zip(self.task_dims.items(), parts, strict=True)
        }
