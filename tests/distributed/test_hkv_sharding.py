"""Dynamic tables over several gloo processes: equal losses, resharding, TorchRec's pipeline, planner and schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig
from genrec.embedding.hkv import (
    DynamicEmbeddingBagCollection,
    DynamicEmbeddingCollection,
    dump_increment,
    export_parquet,
    import_parquet,
    load_increment,
    load_tables,
    owner_rank,
    save_tables,
    tables_saved_separately,
)
from genrec.embedding.hkv.checkpoint import find_tables
from genrec.embedding.hkv.state import export_meta, table_state
from tests.distributed.ranks import run_ranks

FEATURES = ["a", "b", "c"]
BATCH = 12


# The model ------------------------------------------------------------------------------------------------------------


def table(name: str, dim: int, features: list[str], optimizer: str, **options: Any) -> EmbeddingTableConfig:
    return EmbeddingTableConfig(
        name, dim, features, backend="hkv", capacity=4096, initializer=InitializerConfig("normal", std=0.5),
        optimizer=TableOptimizerConfig(optimizer, learning_rate=0.1), options=options,
    )  # fmt: skip


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = DynamicEmbeddingCollection(
            [table("ab", 8, ["a", "b"], "adam"), table("c", 4, ["c"], "adagrad", score="lfu", admission_threshold=2)],
            seed=3,
        )
        self.bags = DynamicEmbeddingBagCollection(
            [table("bag_a", 8, ["a"], "sgd"), table("bag_b", 4, ["b"], "rowwise_adagrad")],
            seed=3, pooling={"bag_a": "mean", "bag_b": "sum"},
        )  # fmt: skip
        self.head = Head()

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        loss = self.head(self.tables(features), self.bags(features))
        return loss, loss.detach()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 1)

    def forward(self, rows: Any, bags: Any) -> Tensor:
        loss = self.linear(bags.values()).square().mean()
        for name in FEATURES:
            jagged = rows[name]
            loss = loss + (jagged.values() - 1).square().sum() / jagged.lengths().numel()
        return loss


def local_batch(step: int, rank: int, world_size: int) -> KeyedJaggedTensor:
    """This rank's rows of the batch of a step; strided, repeated and negative ids."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = torch.randint(0, 5, (len(FEATURES), BATCH), generator=generator)
    values = torch.randint(-40, 40, (int(lengths.sum()),), generator=generator) * 2**20
    rows = range(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    parts = values.split(lengths.flatten().tolist())
    own = [parts[f * BATCH + row] for f in range(len(FEATURES)) for row in rows]
    return KeyedJaggedTensor(FEATURES, torch.cat(own), lengths=lengths[:, rows.start : rows.stop].flatten())


def sharded(model: nn.Module, world_size: int, plan: Any = None, sharders: list[Any] | None = None) -> Any:
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    from genrec.embedding.hkv.sharding import add_dynamic_tables, dynamic_sharders

    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=add_dynamic_tables(plan or ShardingPlan({}), model, world_size),
        sharders=[*dynamic_sharders(), *(sharders or [])],
    )


def new_model(world_size: int) -> Any:
    torch.manual_seed(0)
    return sharded(Model(), world_size)


def train(model: Any, rank: int, world_size: int, first: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(first, first + steps):
        loss, value = model(local_batch(step, rank, world_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(mean_over_ranks(value))
    return losses


def mean_over_ranks(value: Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def contents(model: Any) -> dict[str, dict[str, Any]]:
    return {name: table_state(one) for name, one in find_tables(model).items()}


def merged(shares: list[dict[str, Any]], name: str) -> dict[int, tuple]:
    """What all ranks hold, by key; fails where a key is on two ranks."""
    rows: dict[int, tuple] = {}
    for share in shares:
        state = share[name]
        for i, key in enumerate(state["keys"].tolist()):
            assert key not in rows, "every key once"
            rows[key] = (
                state["weights"][i].tolist(), state["optimizer"][i].tolist(), int(state["scores"][i]),
                int(state["steps"][i]), int(state["updates"][i]),
            )  # fmt: skip
    return rows


# What the ranks run ---------------------------------------------------------------------------------------------------


def _train_and_save(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    model = new_model(world_size)
    losses = train(model, rank, world_size, 0, 3)
    save_tables(model, f"{folder}/save{world_size}")
    base = contents(model)
    for name, share in base.items():
        assert (owner_rank(share["keys"], world_size) == rank).all(), name
    export_parquet(model, "ab", f"{folder}/parquet{world_size}")
    step = find_tables(model)["ab"].step
    losses += train(model, rank, world_size, 3, 2)
    dump_increment(model, f"{folder}/more{world_size}", since_step=step)
    # The ranks' clocks may differ: the increment begins at the least step of all.
    table_ab = find_tables(model)["ab"]
    table_ab._clock = [(0.0, 1), (100.0 + rank, 4)]
    dump_increment(model, f"{folder}/time{world_size}", since_time=100.0)
    errors = []
    try:
        model.state_dict()
    except RuntimeError as error:
        errors.append(str(error))
    with tables_saved_separately():
        model.load_state_dict(model.state_dict())
    return {
        "losses": losses,
        "base": base,
        "end": contents(model),
        "errors": errors,
        "metrics": model.module.tables.metrics(),
        "since": json.loads(Path(f"{folder}/time{world_size}/manifest.json").read_text())["since"]["ab"],
    }


def _load_all(rank: int, world_size: int, folder: str) -> dict[int, Any]:
    out = {}
    for saved in (1, 2, 3, 4):
        model = new_model(world_size)
        load_tables(model, f"{folder}/save{saved}")
        base = contents(model)
        load_increment(model, f"{folder}/more{saved}")
        end = contents(model)
        fresh = new_model(world_size)
        taken = import_parquet(fresh, "ab", f"{folder}/parquet{saved}")
        assert taken == base["ab"]["keys"].numel()
        imported = find_tables(fresh)["ab"].embed(base["ab"]["keys"])
        assert torch.equal(imported, base["ab"]["weights"])
        out[saved] = {"base": base, "end": end}
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("hkv")
    return folder, {world: run_ranks(_train_and_save, world, str(folder)) for world in (1, 2, 3, 4)}


def test_losses_are_equal_for_every_world_size(runs):
    _, results = runs
    expected = results[1][0]["losses"]
    assert expected[-1] < expected[0]
    for world in (2, 3, 4):
        for rank in range(world):
            assert results[world][rank]["losses"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("moment", ["base", "end"])
def test_tables_are_equal_for_every_world_size(runs, moment):
    _, results = runs
    for name in ("ab", "c", "bag_a", "bag_b"):
        whole = merged([results[1][0][moment]], name)
        for world in (2, 3, 4):
            rows = merged([result[moment] for result in results[world]], name)
            assert rows.keys() == whole.keys()
            for key, row in rows.items():
                assert row[0] == pytest.approx(whole[key][0], abs=1e-5)
                assert row[2:] == whole[key][2:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_world_size_loads_what_any_other_saved(runs, world):
    folder, results = runs
    loaded = run_ranks(_load_all, world, str(folder))
    for saved in (1, 2, 3, 4):
        for moment in ("base", "end"):
            for name in ("ab", "c", "bag_a", "bag_b"):
                before = merged([result[moment] for result in results[saved]], name)
                after = merged([share[saved][moment] for share in loaded], name)
                assert after == before
            counters = [
                sorted(
                    zip(part["c"]["counters"]["keys"].tolist(), part["c"]["counters"]["counts"].tolist(), strict=True)
                )
                for part in (result[moment] for result in results[saved])
            ]
            again = [
                pair
                for share in loaded
                for pair in zip(
                    share[saved][moment]["c"]["counters"]["keys"].tolist(),
                    share[saved][moment]["c"]["counters"]["counts"].tolist(),
                    strict=True,
                )
            ]
            assert sorted(again) == sorted(pair for part in counters for pair in part)


def test_a_state_dict_that_would_lose_rows_is_an_error(runs):
    _, results = runs
    assert results[1][0]["errors"] == []
    for result in results[2]:
        (message,) = result["errors"]
        assert "would lose the rows of the sharded dynamic tables" in message
        assert "save_tables" in message


def test_an_increment_since_a_time_begins_where_the_slowest_clock_says(runs):
    _, results = runs
    assert [results[world][0]["since"] for world in (1, 2, 3, 4)] == [3, 0, 0, 0]


def test_keys_spread_evenly_and_metrics_count_shares(runs):
    _, results = runs
    sizes = [result["metrics"]["ab/size"] for result in results[2]]
    assert sum(sizes) == len(merged([result["end"] for result in results[2]], "ab"))
    assert min(sizes) > 0.3 * sum(sizes)


def _weighted(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    def build() -> DynamicEmbeddingBagCollection:
        configs = [table("bag_a", 8, ["a"], "sgd"), table("bag_bc", 4, ["b", "c"], "sgd")]
        return DynamicEmbeddingBagCollection(configs, seed=3, is_weighted=True)

    def weighted_batch(ranks: int) -> KeyedJaggedTensor:
        made = local_batch(0, rank if ranks > 1 else 0, ranks)
        weights = torch.sin(made.values().float())  # any function of the key
        return KeyedJaggedTensor(FEATURES, made.values(), weights, lengths=made.lengths())

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = build()

        def forward(self, features: KeyedJaggedTensor) -> Tensor:
            return self.bags(features).values()

    wrapped, alone = sharded(Holder(), world_size), build()
    alone.replicas_agree = True
    for _ in range(2):
        mine, whole = wrapped(weighted_batch(world_size)), alone(weighted_batch(1)).values()
        # TorchRec divides the gradients of sharded tables by the number of ranks.
        (mine.square().sum() * world_size).backward()
        whole.square().sum().backward()
    return mine.detach(), whole[rank * BATCH // world_size : (rank + 1) * BATCH // world_size].detach()


def test_weighted_bags_equal_those_of_one_process():
    for mine, whole in run_ranks(_weighted, 3):
        torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-6)


def _pipelined(rank: int, world_size: int) -> tuple[list[float], list[float], list[float]]:
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    plain = train(new_model(world_size), rank, world_size, 0, 5)
    model = new_model(world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = iter([local_batch(step, rank, world_size) for step in range(5)])
    losses = [mean_over_ranks(pipeline.progress(batches)) for _ in range(5)]
    assert len(pipeline._pipelined_modules) == 2, "both collections are pipelined"
    # Evaluation changes nothing, on any rank.
    pipeline.detach()
    before = contents(model)
    model.eval()
    evaluated = []
    with torch.no_grad():
        for step in (0, 50):
            evaluated.append(mean_over_ranks(model(local_batch(step, rank, world_size))[1]))
    after = contents(model)
    for name in before:
        for column in ("keys", "weights", "optimizer", "scores", "steps", "updates"):
            assert torch.equal(before[name][column], after[name][column])
    return plain, losses, evaluated


def test_torchrecs_pipeline_gives_the_losses_of_the_plain_loop():
    for plain, pipelined, evaluated in run_ranks(_pipelined, 2):
        assert pipelined == pytest.approx(plain, rel=1e-7)
        assert evaluated[0] < plain[0]


def _beside_static_tables(rank: int, world_size: int) -> dict[str, Any]:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    from genrec.embedding.hkv.sharding import dynamic_collections, planner_storage, reserve_bytes
    from genrec.embedding.tables import EmbeddingTables

    configs = {
        backend: EmbeddingTableConfig(
            f"{backend}_table", 8, [backend], backend=backend, num_embeddings=64,
            initializer=InitializerConfig("constant", value=0.5),
            optimizer=TableOptimizerConfig("sgd", learning_rate=0.1),
        )
        for backend in ("fbgemm", "hkv")
    }  # fmt: skip
    tables = EmbeddingTables(list(configs.values()))
    for collection in tables.static.values():
        apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.1})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = tables

        def forward(self, features: KeyedJaggedTensor) -> dict[str, Any]:
            return self.tables(features)

    model = Both()
    collections = dynamic_collections(model)
    topology = Topology(world_size=world_size, compute_device="cpu", ddr_cap=2**30)
    planner = EmbeddingShardingPlanner(topology=topology, storage_reservation=planner_storage(collections, world_size))
    sharder = EmbeddingCollectionSharder()
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    wrapped = sharded(model, world_size, plan, [sharder])
    names = sorted(wrapped.fused_optimizer.params)
    losses: dict[str, list[float]] = {"fbgemm": [], "hkv": []}
    for step in range(6):
        ids = torch.randint(0, 64, (6,), generator=torch.Generator().manual_seed(10 * step + rank))
        batch = KeyedJaggedTensor(["hkv", "fbgemm"], torch.cat([ids, ids]), lengths=torch.tensor([4, 2, 4, 2]))
        out = wrapped(batch)
        parts = {name: (out[name].values() - 1).square().sum() for name in losses}
        sum(parts.values()).backward()
        for name, part in parts.items():
            losses[name].append(mean_over_ranks(part))
        if step == 2:
            for group in wrapped.fused_optimizer.param_groups:
                group["lr"] = 0.0
            wrapped.fused_optimizer.step()
    return {
        "losses": losses, "names": names, "plan": sorted(plan.plan), "bytes": reserve_bytes(collections, world_size),
        "size": find_tables(wrapped)["hkv_table"].size,
    }  # fmt: skip


def test_dynamic_tables_beside_static_ones_with_planner_and_rates():
    results = run_ranks(_beside_static_tables, 2)
    for result in results:
        losses = result["losses"]
        assert losses["hkv"] == pytest.approx(losses["fbgemm"], rel=1e-6)
        assert any(name.endswith("hkv_table.weight") for name in result["names"])
        assert any(name.endswith("fbgemm_table.weight") for name in result["names"])
        assert result["bytes"] == 128 * (21 + 32)
    assert sum(result["size"] for result in results) <= 64
    # After the third step all rates are zero, so equal ids give equal losses however often they come.
    one = results[0]["losses"]["hkv"]
    assert one[0] > one[2]


class Joined(nn.Module):
    """A model whose only lookup is `EmbeddingTables` with tables of both backends."""

    def __init__(self, configs: list[EmbeddingTableConfig]) -> None:
        super().__init__()
        from genrec.embedding.tables import EmbeddingTables

        self.tables = EmbeddingTables(configs)
        self.loss = SquaredDistance()

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        loss = self.loss(self.tables(features))
        return loss, loss.detach()


class SquaredDistance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.ones(8))

    def forward(self, rows: dict[str, Any]) -> Tensor:
        return sum(
            (jagged.values() - self.target).square().sum() / jagged.lengths().numel() for jagged in rows.values()
        )


def _both_backends_pipelined(rank: int, world_size: int) -> tuple[list[float], list[float], int, str]:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    def build() -> Any:
        start = InitializerConfig("constant", value=0.5)
        configs = [
            EmbeddingTableConfig("static_a", 8, ["a"], num_embeddings=80, initializer=start),
            EmbeddingTableConfig("dynamic_b", 8, ["b"], backend="hkv", capacity=512, initializer=start),
        ]
        model = Joined(configs)
        for collection in model.tables.static.values():
            apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.1})
        sharder = EmbeddingCollectionSharder()
        planner = EmbeddingShardingPlanner(topology=Topology(world_size=world_size, compute_device="cpu"))
        plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
        return sharded(model, world_size, plan, [sharder])

    def batch(step: int) -> KeyedJaggedTensor:
        made = local_batch(step, rank, world_size)
        ids = made["a"].values().abs() % 80
        return KeyedJaggedTensor(
            FEATURES, torch.cat([ids, made["b"].values(), made["c"].values()]), lengths=made.lengths()
        )

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = []
    for step in range(4):
        loss, value = model(batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(mean_over_ranks(value))
    model = build()
    pipeline = TrainPipelineSparseDist(model, torch.optim.SGD(model.parameters(), lr=0.01), torch.device("cpu"))
    batches = iter([batch(step) for step in range(4)])
    losses = [mean_over_ranks(pipeline.progress(batches)) for _ in range(4)]
    try:
        DynamicEmbeddingCollection([table("c", 4, ["c"], "sgd")])(batch(0))
    except RuntimeError as error:
        return plain, losses, len(pipeline._pipelined_modules), str(error)
    return plain, losses, len(pipeline._pipelined_modules), ""


def test_tables_of_both_backends_are_pipelined_together():
    for plain, pipelined, modules, error in run_ranks(_both_backends_pipelined, 2):
        assert pipelined == pytest.approx(plain, rel=1e-6)
        assert modules == 2
        assert "are not sharded, but 2 ranks train" in error


def _rates(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    model = new_model(world_size)
    train(model, rank, world_size, 0, 1)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.0
    before = find_tables(model)["ab"]
    meta = export_meta(before)
    rows = before.read_rows(meta["rows"])[0]
    train(model, rank, world_size, 0, 1)
    return rows, before.embed(meta["keys"])


def test_a_zero_rate_through_torchrecs_optimizer_freezes_the_rows():
    for before, after in run_ranks(_rates, 2):
        assert torch.equal(before, after)


def _too_big(rank: int, world_size: int) -> str:
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology

    from genrec.embedding.hkv.sharding import dynamic_collections, planner_storage

    model = Model()
    topology = Topology(world_size=world_size, compute_device="cpu", ddr_cap=2**16)
    planner = EmbeddingShardingPlanner(
        topology=topology, storage_reservation=planner_storage(dynamic_collections(model), world_size)
    )
    try:
        planner.plan(model, [EmbeddingCollectionSharder()])
    except MemoryError as error:
        return str(error)
    return ""


def test_the_planner_sees_the_memory_of_dynamic_tables():
    (message,) = run_ranks(_too_big, 1)
    assert "Dynamic tables take" in message
    assert "lower their capacity" in message
