"""Makes `Trainer(strategy="hybrid_parallel")` known to Lightning, without importing Lightning."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_STRATEGIES = "lightning.pytorch.strategies"


def register_strategy() -> None:
    """Register the strategy now where Lightning is imported, else as soon as it is."""
    module = sys.modules.get(_STRATEGIES)
    if module is not None and hasattr(module, "StrategyRegistry"):
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: Any) -> None:
    if "hybrid_parallel" not in module.StrategyRegistry:
        module.StrategyRegistry.register(
            "hybrid_parallel",
            _strategy,
            description="TorchRec's sharded tables, tensor- and data-parallel dense layers",
        )


def _strategy(**options: Any) -> Any:
    from genrec.parallel import HybridParallelStrategy

    return HybridParallelStrategy(**options)


class _Finder(MetaPathFinder):
    """Finds one module, as Python would, and registers the strategy once that has been run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _STRATEGIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__loader__ = module.__spec__.loader = self._loader
        _register(module)
