"""Dynamic tables as modules: the interfaces of TorchRec's EmbeddingCollection and EmbeddingBagCollection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv.checkpoint import saved_separately
from genrec.embedding.hkv.ops import hkv_find, hkv_lookup, hkv_pooled_find, hkv_pooled_lookup
from genrec.embedding.hkv.optimizer import HkvFusedOptimizer
from genrec.embedding.hkv.state import load_table_state, table_state
from genrec.embedding.hkv.table import HkvTable

Pooling = Literal["sum", "mean"]


class TableGroup(nn.Module, FusedOptimizerModule):
    """Tables with their optimizer, and the lookups of each. What collections, sharded or not, are made of.

    Args:
        configs: Tables of backend "hkv".
        seed: Decides how rows start.
        world_size: Each table is one of so many equal shares.
        prefix: Of the tables' names in the optimizer.
    """

    def __init__(
        self, configs: Sequence[EmbeddingTableConfig], seed: int, world_size: int = 1, prefix: str = ""
    ) -> None:
        super().__init__()
        self.configs = list(configs)
        self.seed, self.prefix = seed, prefix
        self.tables = {config.name: HkvTable(config, seed, world_size) for config in configs}
        self._optimizer = HkvFusedOptimizer(list(self.tables.values()), prefix)
        self._anchor = torch.empty(0, requires_grad=True)

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Learning rates of the tables, one group for each."""
        return self._optimizer

    def embed(self, name: str, keys: Tensor) -> Tensor:
        """(n, dim) rows. In training mode keys get rows; in evaluation nothing changes."""
        table = self.tables[name]
        keys = table.check_keys(keys)
        if self.training:
            return hkv_lookup(keys, self._anchor, table.id, table.config.dim, None)[0]
        return hkv_find(keys, table.id, table.config.dim)

    def pool(self, name: str, keys: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """(bags, dim) sums of the rows of each bag, weighted where weights are given."""
        table = self.tables[name]
        keys = table.check_keys(keys)
        if weights is not None:
            if weights.requires_grad:
                raise NotImplementedError(
                    f"Table '{name}': no gradient flows to the weights of a pooled lookup; detach them."
                )
            weights = weights.to(torch.float32).contiguous()
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        if not self.training:
            return hkv_pooled_find(keys, offsets, weights, table.id, table.config.dim)
        bags = torch.arange(lengths.numel(), dtype=torch.int32).repeat_interleave(lengths)
        return hkv_pooled_lookup(keys, offsets, bags, weights, self._anchor, table.id, table.config.dim)[0]

    def metrics(self) -> dict[str, float]:
        """`HkvTable.metrics` of each table, as "<table>/<metric>"."""
        return {f"{name}/{key}": value for name, table in self.tables.items() for key, value in table.metrics().items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> TableGroup:
        return self._copy()

    def __reduce__(self) -> Any:
        states = {name: table_state(table) for name, table in self.tables.items()}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        world_size = next(iter(self.tables.values())).world_size
        return _rebuild_group, (self.configs, self.seed, world_size, self.prefix, states, rates, self.training)

    def _copy(self) -> TableGroup:
        function, arguments = self.__reduce__()
        return function(*arguments)


def _rebuild_group(
    configs: list[EmbeddingTableConfig], seed: int, world_size: int, prefix: str, states: dict[str, Any],
    rates: list[float], training: bool,
) -> TableGroup:  # fmt: skip
    group = TableGroup(configs, seed, world_size, prefix)
    for name, table in group.tables.items():
        load_table_state(table, states[name])
    for param_group, rate in zip(group.fused_optimizer.param_groups, rates, strict=True):
        param_group["lr"] = rate
    return group.train(training)


class DynamicCollection(nn.Module, FusedOptimizerModule):
    """What both collections share: the tables, their state, and checks."""

    PREFIX: str

    def __init__(
        self, tables: list[EmbeddingTableConfig], device: torch.device | str | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        place = torch.device(device or "cpu")
        if place.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"Dynamic tables were asked for on '{place}', but they have a CPU engine only; the CUDA engine is not "
                "there yet. Build the model on the CPU, or choose embedding backend 'fbgemm'."
            )
        self._configs = list(tables)
        # The seed that seed_everything set; no number is drawn, so the rest of the model starts as without the tables.
        self.seed = torch.initial_seed() % 2**32 if seed is None else seed
        self.group = TableGroup(tables, self.seed, prefix=self.PREFIX)
        self.replicas_agree = False
        """Set it where several ranks train unsharded copies on the same batches, so that these stay equal."""

    def _check_ranks(self) -> None:
        if not self.training or self.replicas_agree or not dist.is_available() or not dist.is_initialized():
            return
        if dist.get_world_size() > 1:
            raise RuntimeError(
                f"Dynamic tables {sorted(self.tables)} are not sharded, but {dist.get_world_size()} ranks train: each "
                "rank's copy would learn from its own batches alone. Shard them: Trainer(strategy='hybrid_parallel'), "
                "or DistributedModelParallel with genrec.embedding.hkv.sharding."
            )

    @property
    def tables(self) -> dict[str, HkvTable]:
        """The tables by name."""
        return self.group.tables

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Learning rates of the tables, one group for each; the rows' optimizers run in the backward pass."""
        return self.group.fused_optimizer

    def table_configs(self) -> list[EmbeddingTableConfig]:
        """The configs of the tables."""
        return list(self._configs)

    def metrics(self) -> dict[str, float]:
        """`HkvTable.metrics` of each table, as "<table>/<metric>"."""
        return self.group.metrics()

    def get_extra_state(self) -> dict[str, Any]:
        """The whole content of the tables: a state_dict of this module loses nothing.

        Inside `tables_saved_separately` a marker in its place.
        """
        if saved_separately():
            return {"external": True, "tables": sorted(self.tables)}
        return {name: table_state(table) for name, table in self.tables.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Make the tables what they were when the state was taken.

        Raises:
            ValueError: The state lacks a table, is that of a sharded module, or doesn't fit.
        """
        if state.get("external"):
            if saved_separately():
                return
            raise ValueError(
                "This state_dict is that of sharded tables, whose rows were saved beside it. Load them with "
                "genrec.embedding.hkv.load_tables(module, directory), inside `with tables_saved_separately():`."
            )
        missing = sorted(set(self.tables) - set(state))
        if missing:
            raise ValueError(f"The state holds no dynamic tables {missing}; it has {sorted(state)}.")
        for name, table in self.tables.items():
            load_table_state(table, state[name])


class DynamicEmbeddingCollection(DynamicCollection):
    """Sequence lookups in dynamic tables, like TorchRec's EmbeddingCollection; widths may differ between tables.

    In training mode a key that is new gets a row, and the backward pass updates the rows with the table's optimizer; in
    evaluation mode nothing changes. With more than one process it is sharded by
    `genrec.embedding.hkv.sharding.DynamicEmbeddingCollectionSharder`.

    Args:
        tables: Tables of backend "hkv". A feature belongs to one table.
        device: "cpu" (or None).
        seed: With table and key it decides how a row starts. None: the seed that torch was last given.

    Raises:
        NotImplementedError: `device` is a GPU.
        ValueError: A table's options are wrong.
    """

    PREFIX = "embeddings."

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Rows of every feature: values (n, dim) with the feature's lengths.

        Raises:
            KeyError: A table's feature is missing.
            HkvOverflowError: See `HkvOptions.on_overflow`.
            RuntimeError: Several ranks train, and the tables are not sharded.
        """
        self._check_ranks()
        out: dict[str, JaggedTensor] = {}
        for config in self._configs:
            parts = split_features(features, config.feature_names)
            keys = _concatenated([part.values() for part in parts])
            rows = self.group.embed(config.name, keys)
            sizes = [part.values().numel() for part in parts]
            for name, part, values in zip(config.feature_names, parts, rows.split(sizes), strict=True):
                out[name] = JaggedTensor(values, lengths=part.lengths())
        return out


class DynamicEmbeddingBagCollection(DynamicCollection):
    """Pooled lookups in dynamic tables, like TorchRec's EmbeddingBagCollection.

    Args:
        tables: Tables of backend "hkv". A feature belongs to one table.
        device: "cpu" (or None).
        seed: With table and key it decides how a row starts. None: the seed that torch was last given.
        pooling: "sum" or "mean" of a bag's rows, of all tables or by table name; zeros for an empty bag.
        is_weighted: The features' weights multiply the rows (pooling "sum" only).

    Raises:
        NotImplementedError: `device` is a GPU.
        ValueError: A table's options are wrong, or weights are asked for with mean pooling.
    """

    PREFIX = "embedding_bags."

    def __init__(
        self,
        tables: list[EmbeddingTableConfig],
        device: torch.device | str | None = None,
        seed: int | None = None,
        pooling: Pooling | dict[str, Pooling] = "sum",
        is_weighted: bool = False,
    ) -> None:
        super().__init__(tables, device, seed)
        self.pooling = {t.name: pooling[t.name] if isinstance(pooling, dict) else pooling for t in tables}
        self.is_weighted = is_weighted
        if wrong := sorted(set(self.pooling.values()) - {"sum", "mean"}):
            raise ValueError(f"pooling must be 'sum' or 'mean', got {wrong}.")
        if is_weighted and "mean" in self.pooling.values():
            raise ValueError("Weighted features can be summed only: set pooling 'sum' or is_weighted=False.")

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """(B, sum of dims): for every feature the pooled rows of each of the B bags.

        Raises:
            KeyError: A table's feature is missing.
            HkvOverflowError: See `HkvOptions.on_overflow`.
        """
        self._check_ranks()
        names, dims, values = [], [], []
        for config in self._configs:
            parts = split_features(features, config.feature_names)
            keys = _concatenated([part.values() for part in parts])
            lengths = _concatenated([part.lengths() for part in parts]).to(torch.int64)
            weights = _concatenated([part.weights() for part in parts]) if self.is_weighted else None
            pooled = self.group.pool(config.name, keys, lengths, weights)
            if self.pooling[config.name] == "mean":
                pooled = pooled / lengths.clamp(min=1).unsqueeze(1)
            values.extend(pooled.split([part.lengths().numel() for part in parts]))
            names.extend(config.feature_names)
            dims.extend([config.dim] * len(parts))
        return KeyedTensor(names, dims, torch.cat(values, dim=1))


def split_features(features: KeyedJaggedTensor, names: Sequence[str]) -> list[JaggedTensor]:
    """Some of the features.

    Raises:
        KeyError: One is missing; the message lists those that are there.
    """
    present = features.keys()
    missing = [name for name in names if name not in present]
    if missing:
        raise KeyError(f"Dynamic tables look up the features {missing}, but the batch has {present}.")
    return [features[name] for name in names]


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
