"""Which rank holds which rows: the plan of the settings or of somebody's planner, and the plan as a table to read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardingPlan

from genrec.embedding.hkv.planning import add_dynamic_tables, dynamic_collections, reserve_bytes
from genrec.embedding.hkv.sharding import dynamic_sharders
from genrec.parallel._plan_checks import fitting_plan
from genrec.parallel._sequence_tables import SequenceTableSharder
from genrec.parallel._settings_plan import settings_plan
from genrec.parallel._static_tables import StaticTable, fuse, optimizers_noted, static_tables

_MIB = 1 << 20


@dataclass
class TablePlan:
    """Where a table lives.

    Attributes:
        name: Of the table.
        path: Of its collection in the module.
        sharding: TorchRec's name of it, or "dynamic".
        rows, dim: Of the whole table.
        optimizer: Of its rows.
        bytes: Rank -> bytes of its share, optimizer state included.
    """

    name: str
    path: str
    sharding: str
    rows: int
    dim: int
    optimizer: str
    bytes: dict[int, int] = field(default_factory=dict)


@dataclass
class TablesPlan:
    """What `plan_tables` decides: TorchRec's plan of the tables to shard, and a line for each table."""

    sharding: ShardingPlan
    tables: list[TablePlan]
    world_size: int

    def __str__(self) -> str:
        """A table with the MiB of each rank; with more than 8 ranks of the fullest and the emptiest."""
        many = self.world_size > 8
        ranks = ["fullest rank", "emptiest rank"] if many else [f"rank {rank}" for rank in range(self.world_size)]
        head = ["table", "sharding", "rows", "dim", "optimizer", *(f"{name}, MiB" for name in ranks)]
        lines = [[t.name, t.sharding, f"{t.rows:,}", str(t.dim), t.optimizer, *self._sizes(t.bytes)]
                 for t in self.tables]  # fmt: skip
        total = {rank: sum(t.bytes.get(rank, 0) for t in self.tables) for rank in range(self.world_size)}
        lines.append(["all", "", "", "", "", *self._sizes(total)])
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, 1, 4) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [head, *lines]
        )

    def _sizes(self, sizes: Mapping[int, int]) -> list[str]:
        every = [sizes.get(rank, 0) / _MIB for rank in range(self.world_size)]
        return [f"{size:.2f}" for size in ([max(every), min(every)] if self.world_size > 8 else every)]


def plan_tables(
    module: nn.Module,
    device: torch.device,
    *,
    sharding: str = "auto",
    tables: Mapping[str, str] | None = None,
    memory: float | None = None,
    planner: Any = None,
) -> TablesPlan:
    """Place all tables of a module; all ranks together. Static tables that are sharded get their fused optimizers.

    Args:
        module: With unsharded tables.
        device: This rank's.
        sharding: Of tables that `tables` doesn't name: "row_wise", "table_wise", "column_wise", "data_parallel" (a
            whole copy on each rank), or "auto": TorchRec's planner chooses among the first three; tables whose
            optimizer can't be fused on the device are replicated.
        tables: Table -> sharding.
        memory: GiB that a rank may use; None: what the device has, on CPU its share of the machine.
        planner: What plans instead, as `check_planner` describes it.

    Raises:
        ValueError: Tables don't fit, an optimizer can't do what is asked, a name is unknown, or the planner's plan
            doesn't fit the module; on every rank.
    """
    static, dynamic = static_tables(module), dynamic_collections(module)
    world_size = dist.get_world_size()
    topology, chosen = _topology(world_size, device, memory), sharders()[:2]
    if planner is None:
        plans = partial(settings_plan, static=static, dynamic=dynamic, sharding=sharding, tables=tables or {},
                        device=device)  # fmt: skip
    else:
        plans = _function(planner)
    together = planner is not None and hasattr(planner, "collective_plan") and not hasattr(planner, "plan")
    with optimizers_noted(static):
        plan = _agreed(lambda: plans(module, topology, chosen), own=planner is None, together=together)
    if planner is not None:
        plan = fitting_plan(plan, module, static, dynamic, device, world_size)
    for table in static:
        if table.path in plan.plan:
            fuse(table)
    lines = [_line(table, plan, world_size) for table in static]
    return TablesPlan(plan, [*lines, *_dynamic_plans(plan, module, dynamic, device, world_size)], world_size)


def sharders() -> list[Any]:
    """What shards the collections of static and dynamic tables."""
    return [SequenceTableSharder(), EmbeddingBagCollectionSharder(), *dynamic_sharders()]


def check_planner(planner: Any) -> None:
    """Raise unless `planner` is one: None (the settings plan), a ready `ShardingPlan`, a function (module, topology,
    sharders) -> ShardingPlan, or an object with TorchRec's `plan(module, sharders)` or `collective_plan`.

    The first rank calls it and the others get its plan; only a `collective_plan` without a `plan` is called on all.

    Raises:
        ValueError: It is something else.
    """
    if planner is None or isinstance(planner, ShardingPlan):
        return
    known = hasattr(planner, "plan") or hasattr(planner, "collective_plan") or callable(planner)
    if isinstance(planner, type) or not known:
        raise ValueError(
            "planner must be a ShardingPlan, an object with plan(module, sharders) as EmbeddingShardingPlanner, or "
            f"a function (module, topology, sharders) -> ShardingPlan; got {planner!r}."
        )


def _function(planner: Any) -> Callable[..., Any]:
    if isinstance(planner, ShardingPlan):
        return lambda module, topology, chosen: planner
    if hasattr(planner, "plan"):
        return lambda module, topology, chosen: planner.plan(module, chosen)
    if hasattr(planner, "collective_plan"):
        return lambda module, topology, chosen: planner.collective_plan(module, chosen)
    return planner


def _agreed(make: Callable[[], Any], *, own: bool, together: bool) -> ShardingPlan:
    """The first rank's plan; every rank raises what that one raises."""
    outcome: list[Any] = [None]
    failure = None
    if together or dist.get_rank() == 0:
        try:
            plan = make()
            good = isinstance(plan, ShardingPlan)
            outcome = [
                plan if good else f"The planner must return a ShardingPlan, and returned a {type(plan).__name__}."
            ]
        except Exception as error:
            failure = error
            outcome = [str(error) if own else f"The planner failed with {type(error).__name__}: {error}"]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise ValueError(outcome[0]) from failure
    return outcome[0]


def _topology(world_size: int, device: torch.device, memory: float | None) -> Topology:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda":
        limit = int(memory * 2**30) if memory else torch.cuda.get_device_properties(device).total_memory
        return Topology(world_size, "cuda", hbm_cap=limit, local_world_size=local)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(memory * 2**30) if memory else machine // local
    return Topology(world_size, device.type, ddr_cap=limit, local_world_size=local)


def _line(table: StaticTable, plan: ShardingPlan, world_size: int) -> TablePlan:
    """The sharding and sizes that the plan gives a table."""
    line = TablePlan(table.name, table.path, "data_parallel", table.rows, table.dim, table.optimizer_name)
    width = table.weight.element_size()
    placed: Any = plan.plan.get(table.path)
    if placed is None:
        line.bytes = dict.fromkeys(range(world_size), _bytes(table.rows, table.dim, width, line.optimizer))
        return line
    line.sharding = placed[table.name].sharding_type
    for shard in placed[table.name].sharding_spec.shards:
        rank, (rows, columns) = shard.placement.rank(), shard.shard_sizes
        line.bytes[rank] = line.bytes.get(rank, 0) + _bytes(rows, columns, width, line.optimizer)
    return line


def _bytes(rows: int, dim: int, width: int, optimizer: str) -> int:
    """Weights and optimizer state; states are fp32."""
    state = {"adam": 8 * dim, "adamw": 8 * dim, "adagrad": 4 * dim, "rowwise_adagrad": 4}.get(optimizer, 0)
    return rows * (dim * width + state)


def _dynamic_plans(
    plan: ShardingPlan, module: nn.Module, dynamic: Mapping[str, Any], device: torch.device, world_size: int
) -> list[TablePlan]:
    """Enter dynamic tables into the plan, and their lines."""
    add_dynamic_tables(plan, module, world_size, device.type)
    return [
        TablePlan(
            config.name, path, "dynamic", config.rows, config.dim, config.optimizer.name,
            dict.fromkeys(range(world_size), reserve_bytes([config], world_size)),
        )
        for path, collection in dynamic.items()
        for config in collection.table_configs()
    ]  # fmt: skip
