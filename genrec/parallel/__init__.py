"""The strategy that shards tables with TorchRec and dense layers with Megatron-Core."""

from __future__ import annotations

from typing import Any

__all__ = ["HybridParallelStrategy"]


def __getattr__(name: str) -> Any:
    # Lightning and TorchRec are loaded where the strategy is used; the parts of this package also serve without it.
    if name not in __all__:
        raise AttributeError(f"module 'genrec.parallel' has no attribute '{name}'")
    from genrec.parallel.strategy import HybridParallelStrategy

    return HybridParallelStrategy
