"""Embedding tables: static (FBGEMM) and dynamic (HKV) behind one configuration."""

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig

__all__ = ["EmbeddingTableConfig", "InitializerConfig", "TableOptimizerConfig"]
