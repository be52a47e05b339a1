"""Static tables: TorchRec's EmbeddingCollection, one for each width, since a collection holds tables of one width."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.initializers import build_initializer

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


def static_collections(
    tables: list[EmbeddingTableConfig], device: torch.device | str | None = None
) -> dict[str, EmbeddingCollection]:
    """An unsharded EmbeddingCollection for each width, by the name "dim<width>".

    Rows are drawn table by table in the order of `tables`, so a seed gives the same rows however they are grouped.
    """
    groups: dict[int, list[EmbeddingTableConfig]] = {}
    for table in tables:
        groups.setdefault(table.dim, []).append(table)
    # nn.Embedding draws rows of its own first; the generator must not notice.
    here = torch.device(device if device is not None else "cpu")
    with torch.random.fork_rng([here] if here.type == "cuda" else []):
        collections = {f"dim{dim}": _collection(group, here) for dim, group in groups.items()}
    for table in tables:
        build_initializer(table.initializer, table.rows, table.dim)(_weight(collections, table))
    return collections


def _collection(tables: list[EmbeddingTableConfig], device: torch.device) -> EmbeddingCollection:
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=table.name,
                embedding_dim=table.dim,
                num_embeddings=table.rows,
                feature_names=list(table.feature_names),
                data_type=_DATA_TYPES[table.dtype],
                init_fn=_keep,
            )
            for table in tables
        ],
        device=device,
    )
    for table, config in zip(tables, collection.embedding_configs(), strict=True):
        # What TorchRec calls when it shards or resets; above it must not draw, or the order of draws would differ.
        config.init_fn = build_initializer(table.initializer, table.rows, table.dim)
        if table.dtype == "bf16":
            # TorchRec's unsharded module knows fp32 and fp16 only; its sharded one takes the data type.
            collection.embeddings[table.name].to(torch.bfloat16)
    return collection


def _keep(weight: Tensor) -> Tensor:
    return weight


def _weight(collections: dict[str, EmbeddingCollection], table: EmbeddingTableConfig) -> Tensor:
    return collections[f"dim{table.dim}"].embeddings[table.name].weight
