"""The HSTU layer (Zhai et al., "Actions Speak Louder than Words", arXiv 2402.17152, section 3.2).

Its three equations, for a sequence X of N tokens in jagged form (T, D), H heads:

    (1)  U, V, Q, K = Split(phi_1(f_1(Norm(X))))
    (2)  A V        = phi_2(Q K^T + rab^{p,t}) V / N
    (3)  Y          = f_2(Norm(A V) * U) + X

with phi_1 = phi_2 = SiLU, f_1 and f_2 linear, rab^{p,t} the relative bias of positions and times. `HSTUConfig` also
knows the production form, which changes (1) to SiLU on U only, (2) to SiLU(Q K^T / sqrt(Dqk)) V / N, and (3) to
Y = f_2([U, A V, Norm(A V) * U]) + X.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genrec.attention import AttentionMask, RelativeBias, hstu_attention
from genrec.layers.config import HSTUConfig, ResolvedHSTUConfig
from genrec.layers.ops import get_layer_ops
from genrec.layers.tokens import TokenSequence


class HSTULayer(nn.Module):
    """One HSTU layer.

    Weights are head-major: the rows of `uvqk.weight` are grouped by head, within a head u (Dv), v (Dv), q (Dqk),
    k (Dqk); the columns of `output.weight` are grouped by head too. A tensor-parallel shard is one block of heads.

    Attributes:
        num_heads: Heads of this rank.
        input_norm, uvqk, relative_bias, output_norm, output: The submodules, in the order of the equations.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        c = config.resolved()
        self.config = c
        self.num_heads = c.num_heads
        self.ops = get_layer_ops(c.layer_backend, c.layer_recompute)
        self.input_norm = nn.LayerNorm(c.hidden_dim, c.norm_eps, c.norm_affine)
        self.uvqk = nn.Linear(c.hidden_dim, c.num_heads * 2 * (c.v_dim + c.qk_dim), c.uvqk_bias)
        self.relative_bias = RelativeBiasTables(c) if c.relative_bias != "none" else None
        self.output_norm: nn.Module = (
            HeadNorm(c.num_heads, c.v_dim, c.norm_eps, c.norm_affine)
            if c.group_norm
            else nn.LayerNorm(c.num_heads * c.v_dim, c.norm_eps, c.norm_affine)
        )
        self.output = nn.Linear(c.num_heads * c.v_dim * (3 if c.concat else 1), c.hidden_dim, c.output_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as published: the paper's f_1 from N(0, 0.02), production's Xavier-uniform; f_2 Xavier-uniform."""
        if self.config.form == "paper":
            nn.init.normal_(self.uvqk.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(self.uvqk.weight)
        if self.uvqk.bias is not None:
            nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, x: Tensor, tokens: TokenSequence, mask: AttentionMask | None = None) -> Tensor:
        """(T, D) -> (T, D).

        Args:
            x: (T, D), the tokens' state; `tokens.x` is not read.
            tokens: Offsets, counts and times.
            mask: `tokens.mask(window)`, where the caller has it at hand already.
        """
        c = self.config
        # (1) U, V, Q, K = Split(phi_1(f_1(Norm(X))))
        x, u, v, q, k = self.ops.norm_linear_silu(x, self.input_norm, self.uvqk, (c.v_dim, c.qk_dim), c.silu_all)
        # (2) A V = phi_2(alpha Q K^T + rab^{p,t}) V / N
        av = hstu_attention(
            q, k, v,
            tokens.seq_offsets,
            tokens.max_seqlen,
            mask=tokens.mask(c.window) if mask is None else mask,
            bias=None if self.relative_bias is None else self.relative_bias(tokens),
            alpha=c.alpha,
            scale=1.0 / c.max_seqlen,
            dropout=c.attention_dropout if self.training else 0.0,
            backend=c.attention_backend,
        )  # fmt: skip
        # (3) Y = f_2(Norm(A V) * U) + X
        return self.ops.gated_output(x, av, u, self.output_norm, self.output, c.concat, c.dropout, self.training)


class RelativeBiasTables(nn.Module):
    """rab^{p,t}: the tables of one layer's relative position and time bias, shared by its heads.

    Attributes:
        position_weight: (2N - 1,), or None.
        time_weight: (num_time_buckets,), or None.
    """

    def __init__(self, config: ResolvedHSTUConfig) -> None:
        super().__init__()
        kind = config.relative_bias
        self.position_weight = (
            nn.Parameter(torch.empty(2 * config.max_seqlen - 1).normal_(std=0.02)) if kind != "time" else None
        )
        self.time_weight = (
            nn.Parameter(torch.empty(config.num_time_buckets).normal_(std=0.02)) if kind != "position" else None
        )

    def forward(self, tokens: TokenSequence) -> RelativeBias:
        """The bias of these tokens.

        Raises:
            ValueError: There is a time table and the tokens have no timestamps.
        """
        if self.time_weight is not None and tokens.timestamps is None:
            raise ValueError("The time bias needs timestamps: give the batch some, or set relative_bias='position'.")
        timed = self.time_weight is not None
        return RelativeBias(
            self.position_weight,
            self.time_weight,
            tokens.timestamps if timed else None,
            tokens.query_timestamps if timed else None,
        )


class HeadNorm(nn.Module):
    """Normalisation of each head on its own, with one scale and one shift a head (group norm of production HSTU)."""

    def __init__(self, num_heads: int, dim: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(num_heads)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_heads)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(T, H * dim) -> (T, H * dim)."""
        y = nn.functional.layer_norm(x.unflatten(-1, (-1, self.dim)), (self.dim,), eps=self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[:, None] + self.bias[:, None]
        return y.flatten(-2)


class HSTUStack(nn.Module):
    """`num_layers` HSTU layers, one after the other."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, tokens: TokenSequence) -> Tensor:
        """(T, D) -> (T, D): the tokens' states after the last layer, not normalised."""
        mask = tokens.mask(self.config.window)
        for layer in self.layers:
            if self.config.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, tokens, mask, use_reentrant=False)
            else:
                x = layer(x, tokens, mask)
        return x
