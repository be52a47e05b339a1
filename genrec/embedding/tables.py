"""`EmbeddingTables`: every embedding lookup of a model, static or dynamic, behind one call."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.static import static_collections

DYNAMIC_MODULE = "genrec.embedding.hkv"


class EmbeddingTables(nn.Module):
    """The tables of a model. One call looks up every feature of a batch.

    Static tables live in TorchRec EmbeddingCollections (`static`, one for each width), dynamic ones in one collection
    of their own (`dynamic`, loaded only where a table asks for it). All are found by TorchRec's sharders, and
    `forward` can be traced by its pipelines.

    Args:
        tables: The tables. A feature looks up in exactly one of them; many features may share a table.
        device: Where the rows live; "meta" for rows that a sharder makes later.
        check_ids: Check every id of static tables before each lookup, on any device (waits for a GPU). Off, a CPU
            still reports a bad id clearly, at no cost.

    Raises:
        ValueError: Two tables of one name, or a feature in two tables.
        ImportError: A table asks for the dynamic backend, which can't be loaded.
    """

    def __init__(
        self,
        tables: list[EmbeddingTableConfig],
        device: torch.device | str | None = None,
        check_ids: bool = False,
    ) -> None:
        super().__init__()
        _check_tables(tables)
        self.configs: dict[str, EmbeddingTableConfig] = {table.name: table for table in tables}
        self.check_ids = check_ids
        self._table_of: dict[str, str] = {feature: table.name for table in tables for feature in table.feature_names}
        static = [table for table in tables if table.backend == "fbgemm"]
        dynamic = [table for table in tables if table.backend == "hkv"]
        self.static = nn.ModuleDict(static_collections(static, device) if static else {})
        self.dynamic: nn.Module | None = _dynamic_collection(dynamic, device) if dynamic else None

    @property
    def feature_names(self) -> list[str]:
        """All features that look up here, in the order in which `arrange` puts them."""
        return list(self._table_of)

    def dim(self, feature: str) -> int:
        """Width of the rows that `feature` looks up."""
        return self.table_of(feature).dim

    def table_of(self, feature: str) -> EmbeddingTableConfig:
        """The table in which `feature` looks up.

        Raises:
            KeyError: No table has this feature.
        """
        if feature not in self._table_of:
            raise KeyError(f"No table has feature '{feature}'. Features: {', '.join(self._table_of)}.")
        return self.configs[self._table_of[feature]]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Rows of every feature: values (n, dim) with the feature's lengths.

        `features` holds every key of `feature_names`; others are ignored. Sharded tables also need the same order of
        keys in every call: `arrange` gives both.

        Raises:
            IndexError: An id of a static table is out of range (see `check_ids`).
            KeyError: A key is missing.
        """
        if self.check_ids and not isinstance(features, torch.fx.Proxy):
            _check_ids(self, features)
        collections = [*self.static.values(), *([self.dynamic] if self.dynamic is not None else [])]
        try:
            return _merge([collection(features) for collection in collections])
        except (IndexError, KeyError):
            _check_ids(self, features)
            raise

    def lookup(self, feature: str, ids: Tensor) -> Tensor:
        """Rows of some ids of one feature, outside of a batch: a catalogue, candidates.

        Sharded tables talk to the other ranks here: call it on all of them.

        Args:
            feature: The feature as which the ids are looked up.
            ids: (n,) int64.

        Returns:
            (n, dim).
        """
        self.table_of(feature)
        empty = ids.new_zeros(1)
        lengths = [ids.new_full((1,), ids.numel()) if name == feature else empty for name in self._table_of]
        return self(KeyedJaggedTensor(self.feature_names, ids, lengths=torch.cat(lengths)))[feature].values()

    def arrange(
        self, features: KeyedJaggedTensor, extra: Mapping[str, Tensor | JaggedTensor] | None = None
    ) -> KeyedJaggedTensor:
        """The same features in the order of `feature_names`, absent ones empty, those without a table at the end.

        Args:
            features: Features of a batch, stride B.
            extra: Features to add: jagged ones of B sequences, or plain (n,) ids that belong to no sequence (sampled
                negatives, a catalogue) and stand in the first one.
        """
        own = {**features.to_dict(), **{name: _jagged(ids, features.stride()) for name, ids in (extra or {}).items()}}
        keys = [*self._table_of, *(key for key in own if key not in self._table_of)]
        if keys == features.keys() and not extra:
            return features
        zeros = features.lengths().new_zeros(features.stride())
        return KeyedJaggedTensor(
            keys,
            torch.cat([own[key].values() for key in keys if key in own]),
            lengths=torch.cat([own[key].lengths() if key in own else zeros for key in keys]),
        )

    def metrics(self) -> dict[str, float]:
        """Counters of the dynamic tables, as "<table>/<metric>"; of this rank's share where they are sharded."""
        return self.dynamic.metrics() if self.dynamic is not None else {}  # type: ignore[operator]

    def reach_epoch(self, epoch: int) -> None:
        """Let dynamic tables that score by epochs count this one, unless they are further already."""
        for table in self.dynamic.tables.values() if self.dynamic is not None else ():  # type: ignore[union-attr,operator]
            table.epoch = max(table.epoch, epoch)

    def named_table_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and weight of each table that a plain optimizer trains: static and unsharded."""
        for collection in self.static.values():
            embeddings = getattr(collection, "embeddings", {})
            for name, module in embeddings.items():
                weight = getattr(module, "weight", None)
                # Sharded tables update themselves in their backward pass.
                if isinstance(weight, nn.Parameter) and not hasattr(weight, "_in_backward_optimizers"):
                    yield name, weight

    def fused_optimizers(self) -> list[Optimizer]:
        """Optimizers of tables that update themselves in the backward pass; a schedule reaches them through these."""
        modules = [*self.static.values(), *([self.dynamic] if self.dynamic is not None else [])]
        return [cast(Optimizer, module.fused_optimizer) for module in modules if hasattr(module, "fused_optimizer")]


def _check_tables(tables: list[EmbeddingTableConfig]) -> None:
    names: set[str] = set()
    owner: dict[str, str] = {}
    for table in tables:
        if table.name in names:
            raise ValueError(f"Two tables are named '{table.name}': names must differ.")
        names.add(table.name)
        for feature in table.feature_names:
            if feature in owner:
                raise ValueError(
                    f"Feature '{feature}' is in the tables '{owner[feature]}' and '{table.name}'; it may look up in "
                    "one. Name it in one of them only."
                )
            owner[feature] = table.name


def _dynamic_collection(tables: list[EmbeddingTableConfig], device: torch.device | str | None) -> nn.Module:
    names = ", ".join(table.name for table in tables)
    try:
        module = importlib.import_module(DYNAMIC_MODULE)
    except ImportError as error:
        raise ImportError(
            f"Tables with backend 'hkv' ({names}) need genrec's dynamic tables, which can't be loaded: {error}. "
            "Cure: install a genrec that has them, or choose embedding backend 'fbgemm' with num_embeddings."
        ) from error
    return module.DynamicEmbeddingCollection(tables, device)


def _jagged(ids: Tensor | JaggedTensor, stride: int) -> JaggedTensor:
    if isinstance(ids, JaggedTensor):
        return ids
    lengths = torch.zeros(stride, dtype=torch.int64, device=ids.device)
    lengths[0] = ids.numel()
    return JaggedTensor(ids, lengths=lengths)


@torch.fx.wrap
def _merge(lookups: list[Any]) -> dict[str, JaggedTensor]:
    """One dict of all; a sharded collection's answer is awaited here. A leaf for TorchRec's tracer."""
    merged: dict[str, JaggedTensor] = {}
    for lookup in lookups:
        merged.update(lookup.wait() if hasattr(lookup, "wait") else lookup)
    return merged


def _check_ids(tables: EmbeddingTables, features: KeyedJaggedTensor) -> None:
    by_key = features.to_dict()
    for feature in tables.feature_names:
        table = tables.table_of(feature)
        if feature not in by_key:
            raise KeyError(
                f"The batch has no feature '{feature}', which table '{table.name}' looks up; it has "
                f"{', '.join(by_key)}. `EmbeddingTables.arrange` adds absent ones as empty."
            )
        ids = by_key[feature].values()
        if table.backend != "fbgemm" or ids.numel() == 0:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= table.rows:
            raise IndexError(
                f"Feature '{feature}' holds id {low if low < 0 else high}, but table '{table.name}' has rows "
                f"0..{table.rows - 1}. Raise num_embeddings, remap the ids, or choose backend 'hkv'."
            )
