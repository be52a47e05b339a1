"""Plans of a planner that the user brings: the same training, the same printed table, and errors on every rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from genrec.config import ConfigError, load_config
from genrec.config import RankingConfig as Config
from genrec.embedding.hkv.planning import dynamic_collections
from genrec.parallel import HybridParallelStrategy
from genrec.parallel._static_tables import optimizers_noted, static_tables
from genrec.recipes._strategy import build_strategy
from tests.distributed import training
from tests.distributed.ranks import run_ranks

SETTINGS = {"embedding_dims": {"action": 8}}
"""Two collections: one of the items, one of the actions."""

CALLS: list[str] = []


def table_plan(module: Any, kinds: dict[str, Any], world_size: int, device: str = "cpu") -> ShardingPlan:
    """A plan of the tables that `kinds` names, made with TorchRec's own generators.

    They choose the kernel "fused" for tables that they see an optimizer of, as within the strategy.
    """
    plan = {}
    for path, child in module.named_modules():
        if isinstance(child, EmbeddingCollection):
            own = {c.name: kinds[c.name] for c in child.embedding_configs() if c.name in kinds}
            if own:
                plan[path] = construct_module_sharding_plan(
                    child, own, EmbeddingCollectionSharder(), world_size, world_size, device
                )
    return ShardingPlan(plan)


def both_row_wise(module: Any, topology: Topology, sharders: list[Any]) -> ShardingPlan:
    CALLS.append(f"{topology.world_size} ranks, {type(sharders[0]).__name__}")
    return table_plan(module, {"item": row_wise(), "action": row_wise()}, topology.world_size)


class Collective:
    """What has a `collective_plan` alone, which every rank calls."""

    def collective_plan(self, module: Any, sharders: list[Any]) -> ShardingPlan:
        CALLS.append("collective")
        return table_plan(module, {"item": table_wise(rank=1), "action": table_wise(rank=0)}, 2)


def _object() -> EmbeddingShardingPlanner:
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("item", "action")}
    return EmbeddingShardingPlanner(topology=Topology(2, "cpu"), constraints=constraints)


def _fit(planner: Any, model: dict[str, Any] | None = None, **strategy: Any) -> dict[str, Any]:
    losses = training.Losses()
    run = training.trainer(HybridParallelStrategy(planner=planner, **strategy), callbacks=[losses], limit_val_batches=0)
    data = training.Batches(training.ranking_rows, 12)
    try:
        run.fit(training.ranking_model(**{**SETTINGS, **(model or {})}), datamodule=data)
    except ValueError as error:
        return {"error": str(error)}
    plan = run.strategy.plan  # type: ignore[attr-defined]
    return {
        "losses": losses.values,
        "table": str(plan),
        "kinds": {table.name: table.sharding for table in plan.tables},
        "bytes": {table.name: table.bytes for table in plan.tables},
    }


def _changed(**changes: Any) -> Any:
    """`both_row_wise` with other fields in the plan of the items."""

    def planner(module: Any, topology: Topology, sharders: list[Any]) -> ShardingPlan:
        plan = copy.deepcopy(both_row_wise(module, topology, sharders))
        for entry in plan.plan.values():
            for name, value in changes.items():
                if "item" in entry:  # type: ignore[operator]
                    setattr(entry["item"], name, value)  # type: ignore[index]
        return plan

    return planner


def _broken(module: Any, topology: Topology, sharders: list[Any]) -> ShardingPlan:
    raise KeyError("my own mistake")


def _dynamic(module: Any, topology: Topology, sharders: list[Any]) -> ShardingPlan:
    return ShardingPlan({path: EmbeddingModuleShardingPlan() for path in dynamic_collections(module)})


def _errors(ready: ShardingPlan) -> dict[str, Any]:
    of = lambda kinds, *more: lambda module, topology, sharders: table_plan(module, kinds, *more)  # noqa: E731
    both = {"item": row_wise(), "action": row_wise()}
    paths = list(ready.plan)
    cases: dict[str, tuple[Any, ...]] = {
        "ranks": (of(both, 4),),
        "one rank": (of(both, 1),),
        "far": (of({"item": table_wise(rank=1), "action": table_wise(rank=3)}, 4),),
        "device": (of(both, 2, "cuda"),),
        "path": (ShardingPlan({"elsewhere": ready.plan[paths[0]]}),),
        "table": (ShardingPlan({paths[0]: ready.plan[paths[1]]}),),
        "column": (of({"item": column_wise(size_per_rank=[8, 8]), "action": row_wise()}, 2),),
        "adam": (both_row_wise, {"table_optimizer": "adam"}),
        "mixed": (_changed(sharding_type="data_parallel"), {"embedding_dims": {}}),
        "kind": (_changed(sharding_type="grid_shard"),),
        "kernel": (_changed(compute_kernel="dense"),),
        "shards": (_changed(sharding_spec=None),),
        "rows": (ready, {"num_actions": 5}),
        "dynamic": (_dynamic, {"embedding_backend": "hkv"}),
        "broken": (_broken,),
        "nothing": (lambda module, topology, sharders: None,),
    }
    return {name: _fit(*case).get("error", "no error") for name, case in cases.items()}


def _everything(rank: int, world_size: int) -> dict[str, Any]:
    whole = training.ranking_model(**SETTINGS)
    with optimizers_noted(static_tables(whole)):
        ready = both_row_wise(whole, Topology(world_size, "cpu"), [None])
    CALLS.clear()
    out: dict[str, Any] = {
        "settings": _fit(None, sharding="row_wise"),
        "object": _fit(_object()),
        "function": _fit(both_row_wise),
        "ready": _fit(ready, pipeline="sparse_dist"),
        "collective": _fit(Collective()),
        "some": _fit(lambda module, topology, sharders: table_plan(module, {"item": row_wise()}, world_size)),
    }
    return {**out, "calls": list(CALLS), "errors": _errors(ready)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_everything, 2, preload=[__name__])


def test_any_planner_trains_as_the_settings_do(ranks):
    expected = ranks[0]["settings"]
    for rank in ranks:
        for name in ("object", "function", "ready"):
            assert rank[name]["kinds"] == {"item": "row_wise", "action": "row_wise"}
            assert rank[name]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            assert rank[name]["table"] == expected["table"]
        assert rank["collective"]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert set(rank["collective"]["bytes"]["item"]) == {1}
        assert set(rank["collective"]["bytes"]["action"]) == {0}


def test_a_collection_that_the_plan_leaves_out_is_replicated(ranks):
    for rank in ranks:
        assert rank["some"]["kinds"] == {"item": "row_wise", "action": "data_parallel"}
        assert rank["some"]["losses"] == pytest.approx(ranks[0]["settings"]["losses"], rel=1e-4)


def test_the_first_rank_plans_unless_the_planner_is_collective(ranks):
    assert ranks[0]["calls"] == ["2 ranks, SequenceTableSharder", "collective"]
    assert ranks[1]["calls"] == ["collective"]


def test_plans_that_do_not_fit_are_errors_on_every_rank(ranks):
    assert ranks[0]["errors"] == ranks[1]["errors"]
    for name, parts in {
        "ranks": ["on rank 3", "there are 2 ranks"],
        "one rank": ["row-wise shards on the ranks [0]"],
        "far": ["'action'", "on rank 3"],
        "device": ["it is for cuda"],
        "path": ["['elsewhere']", "the model's collections of tables are"],
        "table": ["places the tables ['action']", "it has ['item']"],
        "column": ["rowwise_adagrad", "column_wise"],
        "adam": ["tables on CPU know no adam"],
        "mixed": ["'item'", "give tables of a width one kind"],
        "kind": ["'item' (grid_shard)", "by one of data_parallel, table_wise, column_wise, row_wise"],
        "kernel": ["its compute kernel is 'dense'", "make it one of fused"],
        "shards": ["it names no shards"],
        "rows": ["'action'", "don't make up 5 x 8"],
        "dynamic": ["dynamic", "leave them out"],
        "broken": ["The planner failed with KeyError: 'my own mistake'"],
        "nothing": ["must return a ShardingPlan, and returned a NoneType"],
    }.items():
        for part in parts:
            assert part in ranks[0]["errors"][name], name


def test_a_planner_decides_alone():
    with pytest.raises(ValueError, match="A planner decides alone"):
        HybridParallelStrategy(planner=both_row_wise, memory=1.0)
    for wrong in (3, "row_wise", EmbeddingShardingPlanner):
        with pytest.raises(ValueError, match="planner must be a ShardingPlan"):
            HybridParallelStrategy(planner=wrong)
    with pytest.raises(TypeError, match="HybridParallelStrategy has no planer"):
        HybridParallelStrategy(planer=both_row_wise)


def test_a_config_names_a_planner_by_its_import_path():
    name = f"{__name__}.both_row_wise"
    strategy = build_strategy(load_config(Config, "ranking", [f"strategy.planner={name}"]))
    assert isinstance(strategy, HybridParallelStrategy)
    assert strategy.planner is both_row_wise
    with pytest.raises(ConfigError, match=r"strategy\.planner=nowhere\.mine: No module named"):
        build_strategy(load_config(Config, "ranking", ["strategy.planner=nowhere.mine"]))
    with pytest.raises(ValueError, match="A planner decides alone"):
        build_strategy(load_config(Config, "ranking", [f"strategy.planner={name}", "strategy.sharding=row_wise"]))
