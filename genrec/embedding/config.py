"""What a table is: its name, size, features, backend, start and optimizer. Backends are swapped by one field."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

EmbeddingBackend = Literal["fbgemm", "hkv"]


@dataclass(frozen=True)
class InitializerConfig:
    """How a row starts.

    Args:
        name: "normal", "truncated_normal", "uniform", "constant", or "xavier_uniform" (bounds from the table's shape).
        mean: Mean of the normal ones.
        std: Standard deviation of the normal ones; the truncated one is cut at two of them.
        low: Lower bound of "uniform".
        high: Upper bound of "uniform".
        value: Value of "constant".
    """

    name: Literal["normal", "truncated_normal", "uniform", "constant", "xavier_uniform"] = "truncated_normal"
    mean: float = 0.0
    std: float = 0.02
    low: float = -0.05
    high: float = 0.05
    value: float = 0.0


@dataclass(frozen=True)
class TableOptimizerConfig:
    """The optimizer of a table's rows. It is fused into the backward pass wherever the backend can.

    Args:
        name: "sgd", "adam", "adamw", "adagrad" or "rowwise_adagrad".
        learning_rate: Base rate; a schedule multiplies it.
        betas: Decay rates of Adam's moments.
        eps: Added to denominators.
        weight_decay: Coupled for "adam" and "sgd", decoupled for "adamw".
        max_gradient: Gradient elements are clamped to [-max_gradient, max_gradient]; None for no clamp.
    """

    name: Literal["sgd", "adam", "adamw", "adagrad", "rowwise_adagrad"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_gradient: float | None = None


@dataclass(frozen=True)
class EmbeddingTableConfig:
    """One embedding table.

    Args:
        name: Unique name; the weight of the table is found under it in checkpoints.
        dim: Width of a row.
        feature_names: Features (keys of the batch's KeyedJaggedTensor) that look up here.
        backend: "fbgemm" (static rows, ids in [0, num_embeddings)) or "hkv" (dynamic: any int64 id).
        num_embeddings: Rows of a static table.
        capacity: Most rows of a dynamic table. None: room for all of num_embeddings, and none is ever evicted.
        initializer: How a row starts.
        optimizer: How a row learns.
        dtype: Of the rows: "fp32", "fp16" or "bf16".
        options: What only one backend knows, by name (for "hkv" the fields of its options class).

    Raises:
        ValueError: A field that the backend needs is missing, or a size is not positive.
    """

    name: str
    dim: int
    feature_names: list[str]
    backend: EmbeddingBackend = "fbgemm"
    num_embeddings: int | None = None
    capacity: int | None = None
    initializer: InitializerConfig = field(default_factory=InitializerConfig)
    optimizer: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.feature_names:
            raise ValueError(f"Table '{self.name}' has no feature_names: name the features that look up in it.")
        if self.dim < 1:
            raise ValueError(f"Table '{self.name}': dim must be positive, got {self.dim}.")
        if self.backend == "fbgemm" and not self.num_embeddings:
            raise ValueError(
                f"Table '{self.name}': backend 'fbgemm' has static rows and needs num_embeddings. "
                "For ids without a bound choose backend 'hkv'."
            )
        if self.backend == "hkv" and not (self.capacity or self.num_embeddings):
            raise ValueError(
                f"Table '{self.name}': backend 'hkv' needs capacity, the most rows that it may hold, or "
                "num_embeddings, for all of which it then makes room."
            )

    @property
    def rows(self) -> int:
        """Rows of a static table, capacity of a dynamic one."""
        size = self.num_embeddings if self.backend == "fbgemm" else self.capacity or self.num_embeddings
        assert size is not None
        return size

    def with_backend(self, backend: EmbeddingBackend) -> EmbeddingTableConfig:
        """The same table on another backend; sizes carry over where the other names no size of its own."""
        return replace(
            self,
            backend=backend,
            num_embeddings=self.num_embeddings or self.capacity,
            # Without a capacity a dynamic table makes room for all of num_embeddings.
            capacity=self.capacity,
        )
