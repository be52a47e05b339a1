"""`HSTUConfig`: the two published forms of the HSTU layer, and every switch by which they differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

_FORMS: dict[str, dict[str, object]] = {
    "paper": {
        "norm_affine": False,
        "silu_all": True,
        "alpha": 1.0,
        "relative_bias": "both",
        "uvqk_bias": False,
        "concat": False,
        "output_bias": True,
    },
    "production": {
        "norm_affine": True,
        "silu_all": False,
        "alpha": None,
        "relative_bias": "none",
        "uvqk_bias": True,
        "concat": True,
        "output_bias": False,
    },
}
_RELATIVE = ("both", "position", "time", "none")


@dataclass(frozen=True)
class HSTUConfig:
    """Sizes and form of an HSTU stack.

    `form` presets the switches that are None: "paper" (arXiv 2402.17152, eq. 1-3: LayerNorm without affine, SiLU on
    u, v, q and k, relative position and time bias, gate u * norm(a)) or "production" (Meta's later layer: affine
    LayerNorm, SiLU on u only, alpha 1 / sqrt(Dqk), no relative bias, concat[u, a, u * norm(a)]).

    Args:
        hidden_dim: D, width of the tokens.
        num_layers: Layers of the stack.
        num_heads: H.
        qk_dim: Dqk of a head; None: hidden_dim / num_heads.
        v_dim: Dv of a head; None: hidden_dim / num_heads.
        max_seqlen: N, the most tokens of a sequence: attention is divided by it, and the position bias covers it.
        form: "paper" or "production".
        norm_affine: Learned scale and shift in both norms.
        silu_all: SiLU on u, v, q, k; False: on u only.
        alpha: Factor of the scores; None: the form's (production: 1 / sqrt(Dqk)).
        relative_bias: "both", "position", "time" or "none". The tables belong to each layer.
        num_time_buckets: Length of the time table.
        uvqk_bias: The first projection has a bias.
        concat: The output projection reads [u, a, u * norm(a)] of each head instead of u * norm(a).
        output_bias: The output projection has a bias.
        group_norm: Normalise each head on its own; its affine is then one scale and one shift a head.
        norm_eps: Epsilon of both norms.
        dropout: Before the output projection.
        attention_dropout: Of the attention weights.
        window: Reach of history rows, in tokens; None for all of it.
        attention_backend: "auto", "torch", "triton", "cutlass" or a registered name.
        layer_backend: What runs the rest of the layer: "auto", "triton" or "torch".
        layer_recompute: Which of the layer's tensors the backward pass makes again instead of keeping: "norm" (the
            input of the first projection), "silu" (its output, where silu_all), "gate" (the input of the second).
        recompute: Keep only each layer's input and compute the rest again in the backward pass.

    Raises:
        ValueError: A value out of range, or heads that don't divide hidden_dim.
    """

    hidden_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    qk_dim: int | None = None
    v_dim: int | None = None
    max_seqlen: int = 200
    form: str = "paper"
    norm_affine: bool | None = None
    silu_all: bool | None = None
    alpha: float | None = None
    relative_bias: str | None = None
    num_time_buckets: int = 129
    uvqk_bias: bool | None = None
    concat: bool | None = None
    output_bias: bool | None = None
    group_norm: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.2
    attention_dropout: float = 0.0
    window: int | None = None
    attention_backend: str = "auto"
    layer_backend: str = "torch"
    layer_recompute: tuple[str, ...] = ()
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ValueError(f"form must be 'paper' or 'production', got '{self.form}'.")
        if self.relative_bias is not None and self.relative_bias not in _RELATIVE:
            raise ValueError(f"relative_bias must be one of {', '.join(_RELATIVE)}; got '{self.relative_bias}'.")
        for name in ("hidden_dim", "num_layers", "num_heads", "max_seqlen", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if (self.qk_dim is None or self.v_dim is None) and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}: "
                "set qk_dim and v_dim, or change one of them."
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")

    def resolved(self) -> ResolvedHSTUConfig:
        """The same config with nothing left open: each None replaced by what the form or the sizes say."""
        preset = {name: value for name, value in _FORMS[self.form].items() if getattr(self, name) is None}
        head_dim = self.hidden_dim // self.num_heads
        sizes = {"qk_dim": self.qk_dim or head_dim, "v_dim": self.v_dim or head_dim}
        filled = replace(self, **preset, **sizes)  # type: ignore[arg-type]
        if filled.alpha is None:
            filled = replace(filled, alpha=sizes["qk_dim"] ** -0.5)
        return ResolvedHSTUConfig(**vars(filled))


@dataclass(frozen=True, kw_only=True)
class ResolvedHSTUConfig(HSTUConfig):
    """An `HSTUConfig` in which every switch has its value."""

    qk_dim: int
    v_dim: int
    norm_affine: bool
    silu_all: bool
    alpha: float
    relative_bias: str
    uvqk_bias: bool
    concat: bool
    output_bias: bool
