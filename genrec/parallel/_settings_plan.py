"""The plan of the settings `sharding`, `tables` and `memory`: TorchRec's planner with one constraint a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

from genrec.embedding.hkv.planning import planner_storage
from genrec.parallel._static_tables import StaticTable, check_optimizer, not_fusible

SHARDINGS = ("auto", "row_wise", "table_wise", "column_wise", "data_parallel")


def settings_plan(
    module: nn.Module, topology: Topology, sharders: list[Any], *, static: Sequence[StaticTable],
    dynamic: Mapping[str, Any], sharding: str, tables: Mapping[str, str], device: torch.device,
) -> ShardingPlan:  # fmt: skip
    """A planner as `HybridParallelStrategy(planner=...)` takes them, with what the settings say bound to it.

    Raises:
        ValueError: Tables don't fit, an optimizer can't do what is asked, or a name is unknown.
    """
    wanted = _wanted(static, dynamic, sharding, tables)
    kinds = {}
    for table in static:
        kind = wanted[table.name]
        if kind == "auto" and table.optimizer and not_fusible(table.optimizer, device):
            kind = "data_parallel"
        check_optimizer(table, kind, device)
        kinds[table.name] = kind
    check_mixed(static, kinds)
    sharded = [table for table in static if kinds[table.name] != "data_parallel"]
    if not sharded:
        return ShardingPlan({})
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints={table.name: _constraint(table, kinds[table.name], topology.world_size) for table in sharded},
        storage_reservation=planner_storage(dynamic, topology.world_size) if dynamic else None,
        stats=NoopEmbeddingStats(),
    )
    try:
        plan = planner.plan(module, sharders)
    except MemoryError as error:
        raise ValueError(f"The tables can't be placed: {error}") from error
    except PlannerError as error:
        asked = ", ".join(f"{name}: {kind}" for name, kind in kinds.items() if kind != "auto")
        raise ValueError(
            "The tables can't be placed: use more ranks, a smaller dtype or fewer rows, allow more memory "
            f"(strategy.memory), or another sharding than {asked or 'auto'}. TorchRec's planner says: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return ShardingPlan({path: plan.plan[path] for path in {table.path for table in sharded}})


def check_mixed(static: Sequence[StaticTable], kinds: Mapping[str, str]) -> None:
    """Raise where a collection is to be replicated in part.

    Raises:
        ValueError: TorchRec could, but such tables would be in no gradient bucket of the dense parameters.
    """
    for path in {table.path for table in static}:
        names = [table.name for table in static if table.path == path]
        replicated = {name for name in names if kinds[name] == "data_parallel"}
        if replicated and len(replicated) < len(names):
            raise ValueError(
                f"Tables {sorted(replicated)} are to be data_parallel but {sorted(set(names) - replicated)} of the "
                "same width are not, and the tables of a width share a collection: give tables of a width one kind, "
                "data_parallel or not, or the replicated ones another width (embedding.dims)."
            )


def _wanted(static: Sequence[StaticTable], dynamic: Mapping[str, Any], default: str, tables: Mapping[str, str]) -> dict:
    """Sharding asked for of each static table."""
    own = [table.name for table in static]
    fixed = [config.name for collection in dynamic.values() for config in collection.table_configs()]
    for name, kind in [("", default), *tables.items()]:
        if kind not in SHARDINGS:
            raise ValueError(f"The sharding of {name or 'tables'} must be one of {', '.join(SHARDINGS)}, got '{kind}'.")
    if unknown := sorted(set(tables) - {*own, *fixed}):
        raise ValueError(f"A sharding is given for the tables {unknown}; the model has {sorted([*own, *fixed])}.")
    if wrong := sorted(name for name in fixed if tables.get(name, "auto") not in ("auto", "row_wise")):
        raise ValueError(f"The dynamic tables {wrong} are sharded by key, which is row_wise: name no other sharding.")
    return {name: tables.get(name, default) for name in own}


def _constraint(table: StaticTable, kind: str, world_size: int) -> ParameterConstraints:
    rowwise = table.optimizer is not None and table.optimizer.name == "rowwise_adagrad"
    free = ["row_wise", "table_wise"] if rowwise else ["row_wise", "table_wise", "column_wise"]
    return ParameterConstraints(
        sharding_types=free if kind == "auto" else [kind],
        compute_kernels=["fused"],
        min_partition=_columns(table.dim, world_size),
    )


def _columns(dim: int, world_size: int) -> int:
    """Width of a column-wise shard: the least multiple of 4 (FBGEMM's) that divides dim into one a rank at most."""
    widths = [width for width in range(4, dim + 1, 4) if dim % width == 0 and dim // width <= world_size]
    return widths[0] if widths else dim
