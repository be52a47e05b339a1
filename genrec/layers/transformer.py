"""SASRec (Kang & McAuley, arXiv 1808.09781), jagged as HSTU is: the baseline that is measured beside it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.layers.tokens import TokenSequence

_BUCKET = 16
"""Sequences whose lengths round up to the same multiple are padded together."""


@dataclass(frozen=True)
class SASRecConfig:
    """Sizes of a SASRec encoder.

    Args:
        hidden_dim: D.
        num_layers: Blocks.
        num_heads: Heads; must divide hidden_dim.
        ffn_dim: Width of the feed-forward layer; None: D, as published.
        activation: "relu" or "gelu".
        norm_first: x + f(LN(x)), as published, with a LayerNorm at the end; False: LN(x + f(x)).
        dropout: After attention and in the feed-forward layer.
        attention_dropout: Of the attention weights.
        norm_eps: Epsilon of the norms.
    """

    hidden_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    ffn_dim: int | None = None
    activation: str = "relu"
    norm_first: bool = True
    dropout: float = 0.2
    attention_dropout: float = 0.0
    norm_eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}.")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f"activation must be 'relu' or 'gelu', got '{self.activation}'.")


class SASRecLayer(nn.Module):
    """Causal softmax attention and a feed-forward layer, each with a residual."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        c, dim = config, config.hidden_dim
        self.config = c
        self.attention_norm = nn.LayerNorm(dim, c.norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, c.norm_eps)
        self.ffn_in = nn.Linear(dim, c.ffn_dim or dim)
        self.ffn_out = nn.Linear(c.ffn_dim or dim, dim)
        for linear in (self.qkv, self.output, self.ffn_in, self.ffn_out):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        """(T, D) -> (T, D).

        Args:
            x: (T, D).
            groups: `length_groups` of the batch.
        """
        if self.config.norm_first:
            x = x + self._attention(self.attention_norm(x), groups)
            return x + self._ffn(self.ffn_norm(x))
        x = self.attention_norm(x + self._attention(x, groups))
        return self.ffn_norm(x + self._ffn(x))

    def _attention(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        heads, dropout = self.config.num_heads, self.config.attention_dropout if self.training else 0.0
        # One row more, of zeros, stands for padding; it comes after a sequence's rows, so that causal hides it.
        qkv = F.pad(self.qkv(x), (0, 0, 0, 1))
        mixed = torch.zeros_like(F.pad(x, (0, 0, 0, 1)))
        for rows in groups:
            padded = qkv.index_select(0, rows.flatten()).view(*rows.shape, 3, heads, -1)
            q, k, v = padded.permute(2, 0, 3, 1, 4)
            padded = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            mixed = mixed.index_copy(0, rows.flatten(), padded.transpose(1, 2).reshape(-1, x.shape[1]).to(x.dtype))
        return F.dropout(self.output(mixed[:-1]), self.config.dropout, self.training)

    def _ffn(self, x: Tensor) -> Tensor:
        c = self.config
        hidden = F.relu(self.ffn_in(x)) if c.activation == "relu" else F.gelu(self.ffn_in(x))
        return F.dropout(self.ffn_out(F.dropout(hidden, c.dropout, self.training)), c.dropout, self.training)


class SASRecStack(nn.Module):
    """`num_layers` SASRec blocks; takes the place of an `HSTUStack` for histories without candidates."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_dim, config.norm_eps) if config.norm_first else nn.Identity()

    def forward(self, x: Tensor, tokens: TokenSequence) -> Tensor:
        """(T, D) -> (T, D).

        Raises:
            ValueError: The tokens have candidates, which would see each other here.
        """
        if tokens.num_targets is not None:
            raise ValueError("SASRec has no target mask: its candidates would see each other. Use HSTUStack.")
        groups = length_groups(tokens.seq_offsets)
        for layer in self.layers:
            x = layer(x, groups)
        return self.final_norm(x)


def length_groups(seq_offsets: Tensor) -> list[Tensor]:
    """For sequences of like lengths together, (b, longest) row numbers; T, one past the last row, is padding."""
    offsets = seq_offsets.tolist()
    buckets: dict[int, list[int]] = defaultdict(list)
    for b in range(len(offsets) - 1):
        length = offsets[b + 1] - offsets[b]
        if length:
            buckets[-(-length // _BUCKET)].append(b)
    groups = []
    for members in buckets.values():
        longest = max(offsets[b + 1] - offsets[b] for b in members)
        index = torch.tensor(members, device=seq_offsets.device)
        rows = seq_offsets[index][:, None] + torch.arange(longest, device=seq_offsets.device)
        groups.append(torch.where(rows < seq_offsets[index + 1][:, None], rows, offsets[-1]))
    return groups
