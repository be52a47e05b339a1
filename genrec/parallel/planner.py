"""Which rank holds which rows: TorchRec's planner with one constraint a table, and its plan as a table to read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from genrec.embedding.config import TableOptimizerConfig
from genrec.embedding.tables import EmbeddingTables

SHARDINGS = ("auto", "row_wise", "table_wise", "column_wise", "data_parallel")
_SHARDED = ["row_wise", "table_wise", "column_wise"]
_ON_CPU = ("sgd", "adagrad", "rowwise_adagrad")
_MIB = 1 << 20


@dataclass
class TablePlan:
    """Where a table lives.

    Attributes:
        name: Of the table.
        path: Of its collection in the module.
        sharding: One of SHARDINGS but "auto", or "dynamic".
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

    Raises:
        ValueError: Tables don't fit, an optimizer can't do what is asked, or a name is unknown.
    """
    static, dynamic = _collections(module)
    wanted = _wanted(static, dynamic, sharding, dict(tables or {}))
    plans, to_shard = [], {}
    for path, (collection, configs) in static.items():
        kinds = {}
        for config in configs:
            optimizer = _optimizer(module, path, config.name)
            kinds[config.name] = _kind(config.name, wanted[config.name], optimizer, device)
            plans.append(
                TablePlan(config.name, path, kinds[config.name], config.num_embeddings, config.embedding_dim,
                          optimizer.name if optimizer else "the module's own")
            )  # fmt: skip
        replicated = {name for name, kind in kinds.items() if kind == "data_parallel"}
        if replicated and len(replicated) < len(kinds):
            raise ValueError(
                f"Tables {sorted(replicated)} are to be data_parallel but {sorted(set(kinds) - replicated)} of the "
                "same width are not, and the tables of a width share a collection: give tables of a width one kind, "
                "data_parallel or not, or the replicated ones another width (embedding.dims)."
            )
        if not replicated:
            to_shard[path] = collection
            _fuse(module, path, collection)
    world_size = dist.get_world_size()
    plan = _torchrec_plan(module, to_shard, {p.name: p.sharding for p in plans}, device, memory, dynamic)
    for table in plans:
        _fill(table, plan, static[table.path][0], world_size)
    return TablesPlan(plan, [*plans, *_dynamic_plans(plan, module, dynamic, device, world_size)], world_size)


def sharders() -> list[Any]:
    """What shards the collections of static and dynamic tables."""
    from genrec.embedding.hkv.sharding import dynamic_sharders

    return [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder(), *dynamic_sharders()]


def _collections(module: nn.Module) -> tuple[dict[str, tuple[nn.Module, list[Any]]], dict[str, Any]]:
    """Static collections with their tables' configs, and dynamic ones, by path."""
    from genrec.embedding.hkv.planning import dynamic_collections

    static: dict[str, tuple[nn.Module, list[Any]]] = {}
    for path, child in module.named_modules():
        if isinstance(child, EmbeddingCollection):
            static[path] = (child, child.embedding_configs())
        elif isinstance(child, EmbeddingBagCollection):
            static[path] = (child, child.embedding_bag_configs())
    return static, dynamic_collections(module)


def _wanted(static: Mapping, dynamic: Mapping, default: str, tables: dict[str, str]) -> dict[str, str]:
    """Sharding asked for of each static table."""
    own = [config.name for _, configs in static.values() for config in configs]
    fixed = [config.name for collection in dynamic.values() for config in collection.table_configs()]
    for name, kind in [("", default), *tables.items()]:
        if kind not in SHARDINGS:
            raise ValueError(f"The sharding of {name or 'tables'} must be one of {', '.join(SHARDINGS)}, got '{kind}'.")
    if unknown := sorted(set(tables) - {*own, *fixed}):
        raise ValueError(f"A sharding is given for the tables {unknown}; the model has {sorted([*own, *fixed])}.")
    if wrong := sorted(name for name in fixed if tables.get(name, "auto") not in ("auto", "row_wise")):
        raise ValueError(f"The dynamic tables {wrong} are sharded by key, which is row_wise: name no other sharding.")
    return {name: tables.get(name, default) for name in own}


def _optimizer(module: nn.Module, path: str, name: str) -> TableOptimizerConfig | None:
    """The optimizer that genrec's config gives a table; None for collections of another origin."""
    while path:
        path = path.rpartition(".")[0]
        owner = module.get_submodule(path)
        if isinstance(owner, EmbeddingTables) and name in owner.configs:
            return owner.configs[name].optimizer
    return None


def _kind(name: str, kind: str, optimizer: TableOptimizerConfig | None, device: torch.device) -> str:
    """The sharding of a table as far as it is decided before TorchRec's planner."""
    if kind == "data_parallel" or optimizer is None:
        return kind
    if kind == "column_wise" and optimizer.name == "rowwise_adagrad":
        raise ValueError(
            f"Table '{name}' is to be sharded column_wise, but rowwise_adagrad keeps one number a row and each shard "
            "of columns would keep another: choose embedding.optimizer.name=adagrad, or the sharding row_wise."
        )
    reason = _not_fusible(optimizer, device)
    if reason is None:
        return kind
    if kind == "auto":
        return "data_parallel"
    raise ValueError(
        f"Table '{name}' is to be sharded {kind}, but {reason}: choose embedding.optimizer.name=rowwise_adagrad, "
        "embedding.backend=hkv (dynamic tables know every optimizer), or the sharding data_parallel."
    )


def _not_fusible(optimizer: TableOptimizerConfig, device: torch.device) -> str | None:
    """Why FBGEMM's fused optimizers can't do what the config says; None where they can."""
    if device.type == "cpu" and optimizer.name not in _ON_CPU:
        return f"FBGEMM's tables on CPU know no {optimizer.name}"
    if optimizer.weight_decay and optimizer.name in ("sgd", "adagrad", "adam"):
        return f"FBGEMM's {optimizer.name} has no coupled weight decay"
    if optimizer.max_gradient is not None:
        return "FBGEMM clamps gradients of single lookups, not of rows, as max_gradient says"
    return None


def _fuse(module: nn.Module, path: str, collection: nn.Module) -> None:
    """Note each table's optimizer where TorchRec looks for it."""
    embeddings = getattr(collection, "embeddings", None) or getattr(collection, "embedding_bags", {})
    for name, table in embeddings.items():
        optimizer = _optimizer(module, path, name)
        if optimizer is None:
            if not hasattr(table.weight, "_optimizer_classes"):
                raise ValueError(
                    f"Table '{name}' of {path} has no optimizer: call torchrec.optim.apply_optimizer_in_backward on "
                    "its weight before training, or build it with genrec.embedding.EmbeddingTables."
                )
            continue
        kwargs: dict[str, Any] = {"lr": optimizer.learning_rate}
        cls: type[torch.optim.Optimizer] = torch.optim.SGD
        if optimizer.name in ("adam", "adamw"):
            cls, kwargs = torch.optim.Adam, {**kwargs, "betas": optimizer.betas}
        elif optimizer.name != "sgd":
            cls = torch.optim.Adagrad if optimizer.name == "adagrad" else RowWiseAdagrad
        if optimizer.name != "sgd":
            kwargs |= {"eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
        apply_optimizer_in_backward(cls, [table.weight], kwargs)


def _torchrec_plan(
    module: nn.Module, to_shard: Mapping[str, Any], kinds: Mapping[str, str], device: torch.device,
    memory: float | None, dynamic: Mapping[str, Any],
) -> ShardingPlan:  # fmt: skip
    """TorchRec's plan of the static tables, made by the first rank; every rank raises what that one raises."""
    from genrec.embedding.hkv.planning import planner_storage

    world_size = dist.get_world_size()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        planner = EmbeddingShardingPlanner(
            topology=_topology(world_size, device, memory),
            constraints=_constraints(module, to_shard, kinds, world_size),
            storage_reservation=planner_storage(dynamic, world_size) if dynamic else None,
            stats=NoopEmbeddingStats(),
        )
        chosen = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder()]
        try:
            plan = planner.plan(module, chosen) if to_shard else ShardingPlan({})
            outcome = [ShardingPlan({path: plan.plan[path] for path in to_shard})]
        except (PlannerError, MemoryError) as error:
            outcome = [f"The tables can't be placed: {_cure(error, kinds)}"]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise ValueError(outcome[0])
    return outcome[0]


def _cure(error: Exception, kinds: Mapping[str, str]) -> str:
    if isinstance(error, MemoryError):
        return str(error)
    text = " ".join(str(error).split())
    asked = ", ".join(f"{name}: {kind}" for name, kind in kinds.items() if kind != "auto")
    return (
        f"use more ranks, a smaller dtype or fewer rows, allow more memory (strategy.memory), or another sharding than "
        f"{asked or 'auto'}. TorchRec's planner says: {text[:300]}"
    )


def _topology(world_size: int, device: torch.device, memory: float | None) -> Topology:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device.type == "cuda":
        limit = int(memory * 2**30) if memory else torch.cuda.get_device_properties(device).total_memory
        return Topology(world_size, "cuda", hbm_cap=limit, local_world_size=local)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(memory * 2**30) if memory else machine // local
    return Topology(world_size, device.type, ddr_cap=limit, local_world_size=local)


def _constraints(
    module: nn.Module, to_shard: Mapping[str, Any], kinds: Mapping[str, str], world_size: int
) -> dict[str, ParameterConstraints]:
    constraints = {}
    for path, collection in to_shard.items():
        bags = isinstance(collection, EmbeddingBagCollection)
        for config in collection.embedding_bag_configs() if bags else collection.embedding_configs():
            kind = kinds[config.name]
            optimizer = _optimizer(module, path, config.name)
            rowwise = optimizer is not None and optimizer.name == "rowwise_adagrad"
            free = [kind for kind in _SHARDED if not (rowwise and kind == "column_wise")]
            constraints[config.name] = ParameterConstraints(
                sharding_types=free if kind == "auto" else [kind],
                compute_kernels=["fused"],
                min_partition=_columns(config.embedding_dim, world_size),
            )
    return constraints


def _columns(dim: int, world_size: int) -> int:
    """Width of a column-wise shard: the least multiple of 4 (FBGEMM's) that divides dim into one a rank at most."""
    widths = [width for width in range(4, dim + 1, 4) if dim % width == 0 and dim // width <= world_size]
    return widths[0] if widths else dim


def _fill(table: TablePlan, plan: ShardingPlan, collection: nn.Module, world_size: int) -> None:
    """The sharding and sizes that the plan gives a table."""
    embeddings = getattr(collection, "embeddings", None) or getattr(collection, "embedding_bags", {})
    width = embeddings[table.name].weight.element_size()
    placed: Any = plan.plan.get(table.path)
    if placed is None:
        size = _bytes(table.rows, table.dim, width, table.optimizer)
        table.sharding, table.bytes = "data_parallel", dict.fromkeys(range(world_size), size)
        return
    table.sharding = placed[table.name].sharding_type
    for shard in placed[table.name].sharding_spec.shards:
        rank = shard.placement.rank()
        size = _bytes(shard.shard_sizes[0], shard.shard_sizes[1], width, table.optimizer)
        table.bytes[rank] = table.bytes.get(rank, 0) + size


def _bytes(rows: int, dim: int, width: int, optimizer: str) -> int:
    """Weights and optimizer state; states are fp32."""
    state = {"adam": 8 * dim, "adamw": 8 * dim, "adagrad": 4 * dim, "rowwise_adagrad": 4}.get(optimizer, 0)
    return rows * (dim * width + state)


def _dynamic_plans(
    plan: ShardingPlan, module: nn.Module, dynamic: Mapping[str, Any], device: torch.device, world_size: int
) -> list[TablePlan]:
    """Enter dynamic tables into the plan, and their lines."""
    from genrec.embedding.hkv.planning import add_dynamic_tables, reserve_bytes

    add_dynamic_tables(plan, module, world_size, device.type)
    return [
        TablePlan(
            config.name, path, "dynamic", config.rows, config.dim, config.optimizer.name,
            dict.fromkeys(range(world_size), reserve_bytes([config], world_size)),
        )
        for path, collection in dynamic.items()
        for config in collection.table_configs()
    ]  # fmt: skip
