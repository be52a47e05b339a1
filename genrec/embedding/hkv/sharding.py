"""Dynamic tables in TorchRec's DistributedModelParallel: row-wise, each key on the rank that `owner_rank` names.

How keys and rows travel: exchange.py. What the planner sees: planning.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import (
    EmbeddingShardingContext,
    KJTListSplitsAwaitable,
)
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist, RwSparseFeaturesDist
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.distributed.types import (
    Awaitable,
    EmbeddingModuleShardingPlan,
    LazyAwaitable,
    ModuleSharder,
    ShardingEnv,
)
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv.checkpoint import saved_separately
from genrec.embedding.hkv.collection import (
    DynamicCollection,
    DynamicEmbeddingBagCollection,
    DynamicEmbeddingCollection,
    TableGroup,
    split_features,
)
from genrec.embedding.hkv.exchange import (
    DynamicShardingContext,
    KeyDist,
    PooledAwaitable,
    SequenceAwaitable,
    select_features,
)
from genrec.embedding.hkv.planning import (
    TableBytes,
    add_dynamic_tables,
    dynamic_collections,
    planner_storage,
    rank_capacity,
    reserve_bytes,
    table_bytes,
)
from genrec.embedding.hkv.state import insert_state, load_table_state, owner_rank, table_state

__all__ = [
    "DynamicEmbeddingBagCollectionSharder",
    "DynamicEmbeddingCollectionSharder",
    "DynamicShardingContext",
    "KeyDist",
    "ShardedDynamicEmbeddingBagCollection",
    "ShardedDynamicEmbeddingCollection",
    "TableBytes",
    "add_dynamic_tables",
    "dynamic_collections",
    "dynamic_sharders",
    "planner_storage",
    "rank_capacity",
    "reserve_bytes",
    "table_bytes",
]


class _Sharded(ShardedEmbeddingModule[KJTList, list[Tensor], Any, DynamicShardingContext], FusedOptimizerModule):
    """What both sharded collections share: this rank's shares of the tables, the exchange of keys, the state."""

    def __init__(self, module: DynamicCollection, env: ShardingEnv, device: torch.device | None) -> None:
        super().__init__()
        if device is not None and device.type != "cpu":
            raise NotImplementedError(
                f"Dynamic tables were to be sharded on '{device}', but they have a CPU engine only; the CUDA engine is "
                "not there yet. Train on CPUs (gloo), or choose embedding backend 'fbgemm'."
            )
        assert env.process_group is not None, "row-wise sharding needs a process group"
        self._pg: dist.ProcessGroup = env.process_group
        self._configs = module.table_configs()
        self.group = TableGroup(self._configs, module.seed, self._pg.size(), module.PREFIX)
        # All ranks must start rows alike, whatever their own random state.
        seeds = torch.tensor([table.seed for table in module.tables.values()])
        dist.broadcast(seeds, src=dist.get_global_rank(self._pg, 0), group=self._pg)
        for table, seed in zip(self.group.tables.values(), seeds.tolist(), strict=True):
            table.set_seed(seed)
        self._take_rows(module)
        self._features: list[list[str]] = [
            [name for config in configs for name in config.feature_names] for configs in self._exchanges()
        ]
        self._input_dists = [self._input_dist_module(len(names)) for names in self._features]

    def _exchanges(self) -> list[list[EmbeddingTableConfig]]:
        """The tables whose keys travel together."""
        raise NotImplementedError

    def _context(self, features: KeyedJaggedTensor, input_dist: RwSparseFeaturesDist) -> Any:
        raise NotImplementedError

    def _input_dist_module(self, num_features: int) -> RwSparseFeaturesDist:
        raise NotImplementedError

    def _take_rows(self, module: DynamicCollection) -> None:
        """This rank's share of what the unsharded tables already hold."""
        rank, world_size = self._pg.rank(), self._pg.size()
        for name, table in self.group.tables.items():
            if len(module.tables[name]) == 0:
                continue
            state = table_state(module.tables[name])
            own = (owner_rank(state["keys"], world_size) == rank).nonzero().flatten()
            share = {k: v[own] for k, v in state.items() if k not in ("counters", "scalars")}
            table.step, table.optimizer_step = module.tables[name].step, module.tables[name].optimizer_step
            insert_state(table, share, same_optimizer=True)

    @property
    def tables(self) -> dict[str, Any]:
        """This rank's shares of the tables, by name."""
        return self.group.tables

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Learning rates of the tables; the rows' optimizers run in the backward pass."""
        return self.group.fused_optimizer

    def metrics(self) -> dict[str, float]:
        """`HkvTable.metrics` of this rank's shares, as "<table>/<metric>"."""
        return self.group.metrics()

    def create_context(self) -> DynamicShardingContext:
        """An empty context, for one batch."""
        return DynamicShardingContext()

    def input_dist(  # type: ignore[override]
        self, ctx: DynamicShardingContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send each key to its owner."""
        awaitables = []
        with torch.no_grad():
            for names, input_dist in zip(self._features, self._input_dists, strict=True):
                own = select_features(features, names)
                awaitables.append(input_dist(own))
                ctx.features.append(own)
                ctx.sharding_contexts.append(self._context(own, input_dist))
        return KJTListSplitsAwaitable(awaitables, ctx)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """None: rows are no parameters, so data parallelism leaves them alone."""
        return iter(())

    def get_extra_state(self) -> dict[str, Any]:
        """A marker where the rows are saved beside the state_dict; else, with one rank, the whole tables.

        Raises:
            RuntimeError: The state_dict would lose the rows.
        """
        if saved_separately():
            return {"external": True, "tables": sorted(self.tables)}
        if self._pg.size() == 1:
            return {name: table_state(table) for name, table in self.tables.items()}
        raise RuntimeError(
            f"A state_dict would lose the rows of the sharded dynamic tables {sorted(self.tables)}: each rank holds a "
            "part of them. Save them with genrec.embedding.hkv.save_tables(module, directory), and take the "
            "state_dict inside `with genrec.embedding.hkv.tables_saved_separately():`."
        )

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the rows of an unsharded state_dict (each rank its own), or accept the marker.

        Raises:
            RuntimeError: The state holds no rows, and nobody said that they are loaded separately.
        """
        if state.get("external"):
            if saved_separately():
                return
            raise RuntimeError(
                "This state_dict holds no rows of dynamic tables. Load them with genrec.embedding.hkv.load_tables"
                "(module, directory), and the state_dict inside `with tables_saved_separately():`."
            )
        rank, world_size = self._pg.rank(), self._pg.size()
        for name, table in self.tables.items():
            whole = state[name]
            own = owner_rank(whole["keys"], world_size) == rank
            counted = owner_rank(whole["counters"]["keys"], world_size) == rank
            share = {k: v[own] for k, v in whole.items() if k not in ("counters", "scalars")}
            share["counters"] = {k: v[counted] for k, v in whole["counters"].items()}
            load_table_state(table, {**share, "scalars": whole["scalars"]})

    def _rows(self, dist_input: KeyedJaggedTensor, config: EmbeddingTableConfig) -> tuple[list[JaggedTensor], Tensor]:
        """The features of a table as they came from all ranks, and their keys."""
        parts = split_features(dist_input, config.feature_names)
        values = [part.values() for part in parts]
        return parts, values[0] if len(values) == 1 else torch.cat(values)


class ShardedDynamicEmbeddingCollection(_Sharded):
    """One rank of a row-wise `DynamicEmbeddingCollection`. Tables of one width share an exchange."""

    def __init__(self, module: DynamicEmbeddingCollection, env: ShardingEnv, device: torch.device | None) -> None:
        super().__init__(module, env, device)
        self._output_dists = [RwSequenceEmbeddingDist(self._pg, len(names), device) for names in self._features]

    def _exchanges(self) -> list[list[EmbeddingTableConfig]]:
        by_dim: dict[int, list[EmbeddingTableConfig]] = {}
        for config in self._configs:
            by_dim.setdefault(config.dim, []).append(config)
        return list(by_dim.values())

    def _input_dist_module(self, num_features: int) -> RwSparseFeaturesDist:
        return KeyDist(self._pg, num_features, is_sequence=True)

    def _context(self, features: KeyedJaggedTensor, input_dist: RwSparseFeaturesDist) -> SequenceShardingContext:
        return SequenceShardingContext(
            features_before_input_dist=features, unbucketize_permute_tensor=input_dist.unbucketize_permute_tensor
        )

    def compute(self, ctx: DynamicShardingContext, dist_input: KJTList) -> list[Tensor]:
        """Rows of the keys that all ranks sent here, in their order: (keys, dim) for each exchange."""
        out = []
        for context, features, configs in zip(ctx.sharding_contexts, dist_input, self._exchanges(), strict=True):
            context.lengths_after_input_dist = features.lengths().view(-1, features.stride())
            rows = []
            for config in configs:
                _, keys = self._rows(features, config)
                rows.append(self.group.embed(config.name, keys))
            out.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return out

    def output_dist(self, ctx: DynamicShardingContext, output: list[Tensor]) -> LazyAwaitable[dict[str, JaggedTensor]]:
        """Send the rows back."""
        awaitables = [
            output_dist(rows, context)
            for output_dist, rows, context in zip(self._output_dists, output, ctx.sharding_contexts, strict=True)
        ]
        return SequenceAwaitable(awaitables, ctx.features)

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """DynamicEmbeddingCollection."""
        return DynamicEmbeddingCollection


class ShardedDynamicEmbeddingBagCollection(_Sharded):
    """One rank of a row-wise `DynamicEmbeddingBagCollection`: ranks sum what they own, then the sums are added."""

    def __init__(self, module: DynamicEmbeddingBagCollection, env: ShardingEnv, device: torch.device | None) -> None:
        super().__init__(module, env, device)
        self._pooling, self._is_weighted = module.pooling, module.is_weighted
        self._dims = [config.dim for config in self._configs for _ in config.feature_names]
        self._output_dists = [RwPooledEmbeddingDist(self._pg, self._dims)]

    def _exchanges(self) -> list[list[EmbeddingTableConfig]]:
        return [self._configs]

    def _input_dist_module(self, num_features: int) -> RwSparseFeaturesDist:
        return KeyDist(self._pg, num_features, is_sequence=False)

    def _context(self, features: KeyedJaggedTensor, input_dist: RwSparseFeaturesDist) -> EmbeddingShardingContext:
        return EmbeddingShardingContext()

    def compute(self, ctx: DynamicShardingContext, dist_input: KJTList) -> list[Tensor]:
        """(bags of all ranks, sum of dims): sums over the keys that this rank owns."""
        (features,) = dist_input
        values = []
        for config in self._configs:
            parts, keys = self._rows(features, config)
            lengths = torch.cat([part.lengths() for part in parts]).to(torch.int64)
            weights = torch.cat([part.weights() for part in parts]) if self._is_weighted else None
            pooled = self.group.pool(config.name, keys, lengths, weights)
            values.extend(pooled.split([part.lengths().numel() for part in parts]))
        return [torch.cat(values, dim=1)]

    def output_dist(self, ctx: DynamicShardingContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Add the ranks' sums, each rank's bags to where they came from."""
        awaitable = self._output_dists[0](output[0], ctx.sharding_contexts[0])
        pooling = [self._pooling[config.name] for config in self._configs for _ in config.feature_names]
        return PooledAwaitable(awaitable, ctx.features[0], self._dims, pooling)

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        """DynamicEmbeddingBagCollection."""
        return DynamicEmbeddingBagCollection


# Sharders ---------------------------------------------------------------------------------------------------


class DynamicEmbeddingCollectionSharder(ModuleSharder[DynamicEmbeddingCollection]):
    """Makes DistributedModelParallel shard `DynamicEmbeddingCollection`."""

    def shard(  # type: ignore[override]
        self, module: DynamicEmbeddingCollection, params: EmbeddingModuleShardingPlan, env: ShardingEnv,
        device: torch.device | None = None, module_fqn: str | None = None,
    ) -> ShardedDynamicEmbeddingCollection:  # fmt: skip
        """This rank's part of the module."""
        return ShardedDynamicEmbeddingCollection(module, env, device)

    @property
    def module_type(self) -> type[DynamicEmbeddingCollection]:
        """What it shards."""
        return DynamicEmbeddingCollection

    def shardable_parameters(self, module: DynamicEmbeddingCollection) -> dict[str, nn.Parameter]:
        """None that TorchRec's planner may place: `add_dynamic_tables` writes the plan."""
        return {}


class DynamicEmbeddingBagCollectionSharder(ModuleSharder[DynamicEmbeddingBagCollection]):
    """Makes DistributedModelParallel shard `DynamicEmbeddingBagCollection`."""

    def shard(  # type: ignore[override]
        self, module: DynamicEmbeddingBagCollection, params: EmbeddingModuleShardingPlan, env: ShardingEnv,
        device: torch.device | None = None, module_fqn: str | None = None,
    ) -> ShardedDynamicEmbeddingBagCollection:  # fmt: skip
        """This rank's part of the module."""
        return ShardedDynamicEmbeddingBagCollection(module, env, device)

    @property
    def module_type(self) -> type[DynamicEmbeddingBagCollection]:
        """What it shards."""
        return DynamicEmbeddingBagCollection

    def shardable_parameters(self, module: DynamicEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """None that TorchRec's planner may place: `add_dynamic_tables` writes the plan."""
        return {}


def dynamic_sharders() -> list[ModuleSharder[Any]]:
    """The sharders of dynamic tables, for DistributedModelParallel beside TorchRec's own."""
    return [DynamicEmbeddingCollectionSharder(), DynamicEmbeddingBagCollectionSharder()]
