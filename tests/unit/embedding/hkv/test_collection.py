"""Dynamic collections as modules: beside and against TorchRec's, copied, compiled."""

import copy
import pickle

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig
from genrec.embedding.hkv import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection
from genrec.embedding.hkv.state import table_state
from genrec.embedding.tables import EmbeddingTables
from genrec.models.optim import CombinedOptimizer, table_optimizer
from tests.helpers import kjt
from tests.unit.embedding.hkv.tables import config

BATCH = {"items": [[1, 2, 2], [], [9]], "users": [[4], [4], []]}


def test_rows_of_each_feature_with_its_lengths():
    tables = DynamicEmbeddingCollection([config("t", 4, ["users", "items"]), config("other", 6)], seed=0)
    batch = kjt({**BATCH, "other": [[1], [], []], "ignored": [[8], [8], [8]]})
    out = tables(batch)
    assert list(out) == ["users", "items", "other"]
    assert out["items"].lengths().tolist() == [3, 0, 1]
    assert torch.equal(out["items"].values(), tables.tables["t"].embed(torch.tensor([1, 2, 2, 9])))
    assert out["other"].values().shape == (1, 6)
    assert tables.tables["t"].size == 4
    metrics = tables.metrics()
    assert metrics["t/size"] == 4
    assert metrics["t/inserted"] == 4
    assert metrics["t/hit_rate"] == 0.0
    tables(batch)
    assert tables.metrics()["t/hit_rate"] == 0.5
    with pytest.raises(KeyError, match="look up the features \\['other'\\]"):
        tables(kjt(BATCH))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_equals_torchrecs(pooling, weighted):
    if weighted and pooling == "mean":
        with pytest.raises(ValueError, match="can be summed only"):
            DynamicEmbeddingBagCollection([config("item")], pooling="mean", is_weighted=True)
        return
    configs = [config("item", 4, learning_rate=0.5), config("user", 6, learning_rate=0.5)]
    ours = DynamicEmbeddingBagCollection(configs, seed=0, pooling=pooling, is_weighted=weighted)
    kinds = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
    theirs = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=c.name, embedding_dim=c.dim, num_embeddings=10, feature_names=[c.name], pooling=kinds[pooling]
            )
            for c in configs
        ],
        is_weighted=weighted,
    )
    for c in configs:
        start = ours.tables[c.name].embed(torch.arange(10))
        theirs.embedding_bags[c.name].weight.data.copy_(start)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    plain = kjt({"item": BATCH["items"], "user": BATCH["users"]})
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0, 0.25]) if weighted else None
    batch = KeyedJaggedTensor(plain.keys(), plain.values(), weights, lengths=plain.lengths())
    for _ in range(3):
        losses = []
        for module in (ours, theirs):
            out = module(batch)
            assert out.keys() == ["item", "user"]
            loss = (out.values() - torch.arange(10.0)).square().sum()
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            if module is theirs:
                optimizer.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ours.eval()
    torch.testing.assert_close(ours(batch).values(), theirs(batch).values())


def test_weights_take_no_gradient():
    tables = DynamicEmbeddingBagCollection([config("item")], seed=0, is_weighted=True)
    plain = kjt({"item": [[1, 2]]})
    weights = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient flows to the weights"):
        tables(KeyedJaggedTensor(plain.keys(), plain.values(), weights, lengths=plain.lengths()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adagrad", "rowwise_adagrad"])
def test_switching_the_backend_keeps_the_losses(optimizer):
    """Equal start, capacity for every id: static and dynamic tables give equal losses.

    torch's Adam also moves rows that no id names, dynamic tables don't: there each batch names all.
    """
    static = EmbeddingTableConfig(
        "item", 8, ["item"], num_embeddings=60, initializer=InitializerConfig("normal", std=0.1),
        optimizer=TableOptimizerConfig(optimizer, learning_rate=0.03 if "adam" in optimizer else 0.3),
    )  # fmt: skip
    losses = {}
    start = None
    for backend in ("fbgemm", "hkv"):
        torch.manual_seed(0)
        tables = EmbeddingTables([static.with_backend(backend)])
        if backend == "fbgemm":
            (name, weight), *_ = tables.named_table_parameters()
            start = weight.detach().clone()
            optimizers = {name: table_optimizer(weight, static.optimizer)}
        else:
            assert start is not None
            tables.dynamic.tables["item"].insert_or_assign(torch.arange(60), start)
            optimizers = {}
        torch.manual_seed(1)
        head = torch.nn.Linear(8, 1)
        combined = CombinedOptimizer(
            {**optimizers, "dense": torch.optim.SGD(head.parameters(), lr=0.1)}, tables.fused_optimizers()
        )
        seen = []
        for _ in range(20):
            ids = torch.randint(0, 60, (3, 10)) if "adam" not in optimizer else torch.randperm(60).view(3, 20)
            ids = ids.tolist()
            out = tables(kjt({"item": ids}))["item"].values()
            # With noise the loss stays of order one, so that its relative error is not one of cancellation.
            target = torch.sin(torch.tensor(ids).flatten().float()) + torch.randn(3 * len(ids[0]))
            loss = (head(out).squeeze(1) - target).square().mean()
            combined.zero_grad()
            loss.backward()
            combined.step()
            seen.append(float(loss))
        losses[backend] = seen
    assert losses["hkv"] == pytest.approx(losses["fbgemm"], rel=1e-6)
    assert len(set(losses["hkv"])) == 20


def test_the_seed_is_torchs_and_nothing_is_drawn():
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    first = DynamicEmbeddingCollection([config()])
    assert torch.equal(torch.randn(3), expected)
    torch.manual_seed(12)
    second = DynamicEmbeddingCollection([config()])
    keys = torch.arange(5)
    assert not torch.equal(first.tables["items"].embed(keys), second.tables["items"].embed(keys))
    again = DynamicEmbeddingCollection([config()], seed=11)
    assert torch.equal(first.tables["items"].embed(keys), again.tables["items"].embed(keys))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(how):
    tables = DynamicEmbeddingCollection([config(optimizer="adam")], seed=0)
    tables(kjt({"items": [[1, 2]]}))["items"].values().sum().backward()
    tables.fused_optimizer.param_groups[0]["lr"] = 0.7
    twin = copy.deepcopy(tables) if how == "deepcopy" else pickle.loads(pickle.dumps(tables))
    one, other = table_state(tables.tables["items"]), table_state(twin.tables["items"])
    assert all(torch.equal(one[name], other[name]) for name in ("keys", "weights", "optimizer", "steps"))
    assert twin.fused_optimizer.param_groups[0]["lr"] == 0.7
    twin(kjt({"items": [[1, 3]]}))["items"].values().sum().backward()
    assert tables.tables["items"].size == 2
    assert torch.equal(table_state(tables.tables["items"])["weights"], one["weights"])
    assert not twin.tables["items"].embed(torch.tensor([1])).equal(tables.tables["items"].embed(torch.tensor([1])))


def test_compiled_lookup_trains_like_the_plain_one():
    batch = torch.tensor([3, 4, 3])
    results = []
    for compiled in (False, True):
        tables = DynamicEmbeddingCollection([config(optimizer="adagrad")], seed=0)

        def step(keys, group=tables.group):
            return (group.embed("items", keys) * 2).square().sum()

        function = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            function(batch).backward()
        results.append(tables.tables["items"].embed(batch))
        assert tables.tables["items"].optimizer_step == 3
    assert torch.equal(results[0], results[1])


def test_a_gpu_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match=r"CUDA engine is not there yet. Build the model on the CPU"):
        DynamicEmbeddingCollection([config()], device="cuda")


def test_custom_scores_of_batches():
    tables = DynamicEmbeddingCollection([config(capacity=128, score="custom")], seed=0)
    table = tables.tables["items"]
    table.custom_score = 9
    tables(kjt({"items": [list(range(100))]}))["items"].values().sum().backward()
    table.custom_score = 1
    tables(kjt({"items": [list(range(200, 228))]}))["items"].values().sum().backward()
    tables(kjt({"items": [list(range(300, 328))]}))["items"].values().sum().backward()
    assert table.contains(torch.arange(100)).all()
    assert not table.contains(torch.arange(200, 228)).any()
