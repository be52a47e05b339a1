"""Dynamic tables in TorchRec's sharding plans: where their shares go, and what memory they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv._binding import Options
from genrec.embedding.hkv.collection import DynamicCollection
from genrec.embedding.hkv.options import BUCKET_SLOTS, HkvOptions, engine_options, state_floats


def dynamic_collections(module: nn.Module) -> dict[str, DynamicCollection]:
    """The unsharded collections of dynamic tables in a module, by their path."""
    return {path: child for path, child in module.named_modules() if isinstance(child, DynamicCollection)}


def add_dynamic_tables(plan: ShardingPlan, module: nn.Module, world_size: int, device: str = "cpu") -> ShardingPlan:
    """Enter every collection of dynamic tables into a plan, row-wise over all ranks.

    Args:
        plan: Made by TorchRec's planner for the rest of the module; changed in place.
        module: The module that DistributedModelParallel will wrap.
        world_size: Ranks.
        device: Of the ranks.

    Returns:
        The plan.
    """
    for path, collection in dynamic_collections(module).items():
        plan.plan[path] = EmbeddingModuleShardingPlan(
            {config.name: _parameter_sharding(config, world_size, device) for config in collection.table_configs()}
        )
    return plan


def _parameter_sharding(config: EmbeddingTableConfig, world_size: int, device: str) -> ParameterSharding:
    rows = rank_capacity(config, world_size)
    shards = [
        ShardMetadata([rows * rank, 0], [rows, config.dim], f"rank:{rank}/{device}") for rank in range(world_size)
    ]
    return ParameterSharding(
        sharding_type=ShardingType.ROW_WISE.value,
        compute_kernel=EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value,
        ranks=list(range(world_size)),
        sharding_spec=EnumerableShardingSpec(shards),
    )


def rank_capacity(config: EmbeddingTableConfig, world_size: int) -> int:
    """Slots of one rank's share when it is fully grown."""
    options = engine_options(config, HkvOptions.from_config(config), 0, world_size)
    return int(options.max_buckets) * BUCKET_SLOTS


@dataclass(frozen=True)
class TableBytes:
    """Memory of one rank's share of a table, fully grown.

    Attributes:
        index: Keys, scores and counters.
        fast: Rows of the fast tier.
        overflow: Rows of the overflow tier.
        file: Rows on disk.
    """

    index: int
    fast: int
    overflow: int
    file: int


def table_bytes(config: EmbeddingTableConfig, world_size: int = 1) -> TableBytes:
    """What one rank's share of a table takes when it is fully grown."""
    options = HkvOptions.from_config(config)
    engine: Options = engine_options(config, options, 0, world_size)
    buckets = int(engine.max_buckets)
    scored, tiered = options.score in ("lfu", "epoch_lfu", "custom"), engine.fast_positions < BUCKET_SLOTS
    slot = 1 + 8 + 4 + 4 + 4 + (8 if scored else 0) + (1 if tiered else 0)
    counters = 16 * int(engine.admission_ways) * buckets if options.admission_threshold > 1 else 0
    row = config.dim * (4 if config.dtype == "fp32" else 2) + 4 * state_floats(config.optimizer.name, config.dim)
    fast, overflow = int(engine.fast_positions), int(engine.overflow_positions)
    file = BUCKET_SLOTS - fast - overflow
    return TableBytes(
        slot * BUCKET_SLOTS * buckets + counters, fast * row * buckets, overflow * row * buckets, file * row * buckets
    )


def reserve_bytes(tables: Iterable[EmbeddingTableConfig] | Mapping[str, DynamicCollection], world_size: int) -> int:
    """Memory to set aside on each rank for dynamic tables before TorchRec's planner places the others.

    Args:
        tables: Configs, or collections as `dynamic_collections` returns them.
        world_size: Ranks.
    """
    configs = [c for m in tables.values() for c in m.table_configs()] if isinstance(tables, Mapping) else list(tables)
    sizes = [table_bytes(config, world_size) for config in configs]
    return math.ceil(sum(size.index + size.fast + size.overflow for size in sizes))


def planner_storage(tables: Iterable[EmbeddingTableConfig] | Mapping[str, DynamicCollection], world_size: int) -> Any:
    """A TorchRec StorageReservation that sets the dynamic tables' memory aside, for EmbeddingShardingPlanner.

    It takes what TorchRec's own heuristic takes, and the tables' bytes from each rank's host memory.
    """
    from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation

    taken = reserve_bytes(tables, world_size)

    class DynamicTableReservation(HeuristicalStorageReservation):
        """Sets dynamic tables' memory aside."""

        def reserve(self, topology: Any, *args: Any, **kwargs: Any) -> Any:
            reserved = super().reserve(topology, *args, **kwargs)
            for device in reserved.devices:
                device.storage.ddr -= taken
                if device.storage.ddr < 0:
                    raise MemoryError(
                        f"Dynamic tables take {taken:,} bytes on each rank, more than rank {device.rank} has left: "
                        "lower their capacity, or use more ranks."
                    )
            return reserved

    return DynamicTableReservation(percentage=0.15)
