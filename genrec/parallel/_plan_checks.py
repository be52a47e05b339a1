"""Whether a sharding plan that somebody else made fits the module, its optimizers and the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import EnumerableShardingSpec, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from genrec.parallel._settings_plan import check_mixed
from genrec.parallel._static_tables import StaticTable, check_optimizer

_FUSED = ("fused", "fused_uvm", "fused_uvm_caching")


def fitting_plan(
    plan: ShardingPlan, module: nn.Module, static: Sequence[StaticTable], dynamic: Mapping[str, Any],
    device: torch.device, world_size: int,
) -> ShardingPlan:  # fmt: skip
    """The plan without collections that it replicates: those stay as they are, with the dense parameters.

    Raises:
        ValueError: It doesn't fit; the message names the table and says why.
    """
    by_path: dict[str, dict[str, StaticTable]] = {}
    for table in static:
        by_path.setdefault(table.path, {})[table.name] = table
    if ours := sorted(set(plan.plan) & set(dynamic)):
        raise ValueError(f"The plan places {ours}, whose tables are dynamic and always sharded by key: leave them out.")
    if unknown := sorted(set(plan.plan) - set(by_path)):
        raise ValueError(f"The plan places {unknown}; the model's collections of tables are {sorted(by_path)}.")
    kinds = {table.name: "data_parallel" for table in static}
    for path, entry in plan.plan.items():
        placed: Any = entry
        if set(placed) != set(by_path[path]):
            raise ValueError(f"The plan places the tables {sorted(placed)} of {path}; it has {sorted(by_path[path])}.")
        bags = isinstance(module.get_submodule(path), EmbeddingBagCollection)
        sharder: Any = EmbeddingBagCollectionSharder() if bags else EmbeddingCollectionSharder()
        for name, sharding in placed.items():
            kinds[name] = sharding.sharding_type
            if (reason := _unfit(by_path[path][name], sharding, sharder, device, world_size)) is not None:
                raise ValueError(f"The plan for table '{name}' ({sharding.sharding_type}) doesn't fit: {reason}.")
            check_optimizer(by_path[path][name], sharding.sharding_type, device)
    check_mixed(static, kinds)
    sharded = {table.path for table in static if kinds[table.name] != "data_parallel"}
    return ShardingPlan({path: entry for path, entry in plan.plan.items() if path in sharded})


def _unfit(table: StaticTable, placed: Any, sharder: Any, device: torch.device, world_size: int) -> str | None:
    kind, kernel = placed.sharding_type, placed.compute_kernel
    possible = sharder.sharding_types(device.type)
    if kind not in possible:
        return f"TorchRec shards its collection on {device.type} by one of {', '.join(possible)}"
    if kind == "data_parallel":
        return None
    kernels = [name for name in sharder.compute_kernels(kind, device.type) if name in _FUSED]
    if kernel not in kernels:
        return f"its compute kernel is '{kernel}', and optimizers are fused here: make it one of {', '.join(kernels)}"
    if not isinstance(placed.sharding_spec, EnumerableShardingSpec):
        return "it names no shards"
    shards = placed.sharding_spec.shards
    ranks = [shard.placement.rank() for shard in shards]
    if (highest := max(ranks, default=0)) >= world_size:
        return f"it places a shard on rank {highest}, and there are {world_size} ranks"
    if kind == "row_wise" and ranks != list(range(world_size)):
        return f"it has row-wise shards on the ranks {ranks}, and needs one on each of {world_size} in their order"
    if kind in ("table_wise", "column_wise") and list(placed.ranks or []) != ranks:
        return f"its ranks {placed.ranks} are not those of its shards, {ranks}"
    if types := {shard.placement.device().type for shard in shards} - {device.type}:
        return f"it is for {', '.join(sorted(types))}, and the tables are on {device.type}"
    ends = [[o + s for o, s in zip(x.shard_offsets, x.shard_sizes, strict=True)] for x in shards]
    whole = sum(x.shard_sizes[0] * x.shard_sizes[1] for x in shards) == table.rows * table.dim
    if not whole or any(end[0] > table.rows or end[1] > table.dim for end in ends):
        return f"its shards don't make up {table.rows} x {table.dim}"
    return None
