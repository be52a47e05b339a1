"""genrec: HSTU generative recommenders for PyTorch Lightning.

Importing the package is cheap: public names are loaded on first use, and torchrec, megatron and triton only where
something needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

from genrec._registration import register_strategy
from genrec._version import __version__

# Public name -> module that defines it.
_PUBLIC: dict[str, str] = {
    "AttentionMask": "genrec.attention",
    "EmbeddingTableConfig": "genrec.embedding",
    "HSTURanking": "genrec.models",
    "HSTURetrieval": "genrec.models",
    "HybridParallelStrategy": "genrec.parallel",
    "PredictionWriter": "genrec.models",
    "RelativeBias": "genrec.attention",
    "SequenceBatch": "genrec.data",
    "Task": "genrec.models",
    "hstu_attention": "genrec.attention",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

# `Trainer(strategy="hybrid_parallel")` works from here on.
register_strategy()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'genrec' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
