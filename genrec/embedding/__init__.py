"""Embedding tables: static (FBGEMM) and dynamic (HKV) behind one configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig

if TYPE_CHECKING:
    from genrec.embedding.tables import EmbeddingTables

__all__ = ["EmbeddingTableConfig", "EmbeddingTables", "InitializerConfig", "TableOptimizerConfig"]


def __getattr__(name: str) -> Any:
    # Loads torchrec, which the configurations alone don't need.
    if name == "EmbeddingTables":
        from genrec.embedding.tables import EmbeddingTables

        return EmbeddingTables
    raise AttributeError(f"module 'genrec.embedding' has no attribute '{name}'")
