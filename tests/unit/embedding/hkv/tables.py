"""Short ways to make dynamic tables for tests."""

from __future__ import annotations

from typing import Any

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig


def config(
    name: str = "items",
    dim: int = 4,
    features: list[str] | None = None,
    capacity: int = 1024,
    optimizer: str = "sgd",
    learning_rate: float = 0.1,
    initializer: InitializerConfig | None = None,
    dtype: str = "fp32",
    optimizer_arguments: dict[str, Any] | None = None,
    **options: Any,
) -> EmbeddingTableConfig:
    return EmbeddingTableConfig(
        name,
        dim,
        features or [name],
        backend="hkv",
        capacity=capacity,
        initializer=initializer or InitializerConfig("normal", std=1.0),
        optimizer=TableOptimizerConfig(optimizer, learning_rate, **(optimizer_arguments or {})),
        dtype=dtype,
        options=options,
    )
