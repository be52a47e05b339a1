"""Dynamic tables (backend "hkv"): any int64 key; rows appear on first use and leave by score when a table is full.

The engine is csrc/hkv. Layout and semantics are those of NVIDIA's HierarchicalKV, except as
docs/dynamic-embeddings.md says.
"""

from genrec.embedding.hkv.checkpoint import (
    dump_increment,
    load_increment,
    load_tables,
    save_tables,
    tables_saved_separately,
)
from genrec.embedding.hkv.collection import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection
from genrec.embedding.hkv.optimizer import HkvFusedOptimizer
from genrec.embedding.hkv.options import HkvOptions
from genrec.embedding.hkv.parquet import export_parquet, import_parquet
from genrec.embedding.hkv.state import owner_rank
from genrec.embedding.hkv.table import HkvOverflowError, HkvTable, Lookup

__all__ = [
    "DynamicEmbeddingBagCollection",
    "DynamicEmbeddingCollection",
    "HkvFusedOptimizer",
    "HkvOptions",
    "HkvOverflowError",
    "HkvTable",
    "Lookup",
    "dump_increment",
    "export_parquet",
    "import_parquet",
    "load_increment",
    "load_tables",
    "owner_rank",
    "save_tables",
    "tables_saved_separately",
]
