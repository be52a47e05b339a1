"""`EmbeddingTables` with static tables: lookups, keys, errors, starts, sharding and tracing."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import JaggedTensor

from genrec.embedding import EmbeddingTableConfig, EmbeddingTables, InitializerConfig
from genrec.embedding.initializers import build_initializer
from tests.helpers import kjt, retrieval_batch


def tables(**options):
    return EmbeddingTables(
        [
            EmbeddingTableConfig("item", 8, ["item", "item_negative"], num_embeddings=20),
            EmbeddingTableConfig("age", 4, ["age"], num_embeddings=5),
            EmbeddingTableConfig("action", 8, ["action"], num_embeddings=3),
        ],
        **options,
    )


FEATURES = {"item": [[1, 2], [3]], "item_negative": [[7, 1], []], "age": [[4], []], "action": [[0, 1], [2]]}


def weight(module, name):
    return dict(module.named_table_parameters())[name]


def test_every_feature_finds_its_rows():
    module = tables()
    found = module(kjt(FEATURES))
    assert set(found) == set(FEATURES)
    for feature, lists in FEATURES.items():
        ids = [i for row in lists for i in row]
        expected = weight(module, module.table_of(feature).name)[torch.tensor(ids)]
        assert torch.equal(found[feature].values(), expected)
        assert found[feature].lengths().tolist() == [len(row) for row in lists]


def test_gradients_of_a_shared_table_add_up():
    module = tables()
    found = module(kjt(FEATURES))
    (found["item"].values().sum() + 2 * found["item_negative"].values().sum()).backward()
    grad = weight(module, "item").grad[:, 0]
    assert grad.tolist() == [0.0, 3.0, 1.0, 1.0, 0, 0, 0, 2.0] + [0.0] * 12


def test_lookup_is_the_rows():
    module = tables()
    ids = torch.tensor([19, 0, 0, 5])
    assert torch.equal(module.lookup("item", ids), weight(module, "item")[ids])
    assert torch.equal(module.lookup("age", ids[1:3]), weight(module, "age")[ids[1:3]])
    assert module.lookup("item", ids[:0]).shape == (0, 8)
    assert module.dim("age") == 4


def test_arrange_orders_adds_and_keeps():
    module = tables()
    features = kjt({"other": [[9], [9, 9]], "action": [[0, 1], [2]], "item": [[1, 2], [3]]})
    jagged = JaggedTensor(torch.tensor([2, 3]), lengths=torch.tensor([1, 1]))
    arranged = module.arrange(features, {"item_negative": torch.tensor([5, 6, 7]), "age": jagged})
    assert arranged.keys() == ["item", "item_negative", "age", "action", "other"]
    assert {key: value.values().tolist() for key, value in arranged.to_dict().items()} == {
        "item": [1, 2, 3], "item_negative": [5, 6, 7], "age": [2, 3], "action": [0, 1, 2], "other": [9, 9, 9],
    }  # fmt: skip
    assert arranged["item_negative"].lengths().tolist() == [3, 0]
    assert arranged["other"].lengths().tolist() == [1, 2]
    bare = module.arrange(features)
    assert bare["age"].values().numel() == 0
    assert module.arrange(bare) is bare


@pytest.mark.parametrize(("feature", "bad"), [("item", 20), ("item_negative", -1), ("age", 5)])
@pytest.mark.parametrize("check_ids", [False, True])
def test_an_id_out_of_range_is_named(feature, bad, check_ids):
    features = {**FEATURES, feature: [[bad], []]}
    table = "item" if feature.startswith("item") else feature
    with pytest.raises(IndexError, match=f"Feature '{feature}' holds id {bad}, but table '{table}' has rows 0"):
        tables(check_ids=check_ids)(kjt(features))


def test_a_missing_feature_is_named():
    with pytest.raises(KeyError, match="no feature 'age'"):
        tables()(kjt({name: ids for name, ids in FEATURES.items() if name != "age"}))
    with pytest.raises(KeyError, match="No table has feature 'colour'"):
        tables().lookup("colour", torch.tensor([0]))


def test_clashes_are_refused():
    one = EmbeddingTableConfig("a", 4, ["x"], num_embeddings=3)
    with pytest.raises(ValueError, match="Two tables are named 'a'"):
        EmbeddingTables([one, one])
    with pytest.raises(ValueError, match="Feature 'x' is in the tables 'a' and 'b'"):
        EmbeddingTables([one, EmbeddingTableConfig("b", 4, ["x"], num_embeddings=3)])


def test_dynamic_tables_that_can_not_be_loaded_say_why(monkeypatch):
    monkeypatch.setattr("genrec.embedding.tables.DYNAMIC_MODULE", "genrec.embedding.absent")
    with pytest.raises(ImportError, match=r"backend 'hkv' \(item\).*choose embedding backend 'fbgemm'"):
        EmbeddingTables([EmbeddingTableConfig("item", 4, ["item"], backend="hkv", capacity=10)])


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_rows_have_their_dtype_and_lookups_are_fp32(dtype, expected):
    module = EmbeddingTables([EmbeddingTableConfig("item", 4, ["item"], num_embeddings=9, dtype=dtype)])
    assert weight(module, "item").dtype == expected
    found = module.lookup("item", torch.tensor([3]))
    assert found.dtype == torch.float32
    assert torch.equal(found[0], weight(module, "item")[3].float())


INITIALIZERS = {
    "normal": (InitializerConfig("normal", mean=1.0, std=0.5), 1.0, 0.5, -9, 9),
    "truncated_normal": (InitializerConfig("truncated_normal", mean=1.0, std=0.5), 1.0, 0.44, 0, 2),
    "uniform": (InitializerConfig("uniform", low=-1.0, high=3.0), 1.0, 4 / 12**0.5, -1, 3),
    "constant": (InitializerConfig("constant", value=0.25), 0.25, 0.0, 0.25, 0.25),
    "xavier_uniform": (InitializerConfig("xavier_uniform"), 0.0, (2 / 1016) ** 0.5, -0.0769, 0.0769),
}  # fmt: skip


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers(name):
    torch.manual_seed(0)
    config, mean, std, low, high = INITIALIZERS[name]
    rows = build_initializer(config, 1000, 16)(torch.empty(1000, 16))
    assert rows.mean().item() == pytest.approx(mean, abs=0.02)
    assert rows.std().item() == pytest.approx(std, abs=0.02)
    assert low <= rows.min() <= rows.max() <= high
    torch.manual_seed(0)
    half = build_initializer(config, 1000, 16)(torch.empty(1000, 16, dtype=torch.bfloat16))
    assert torch.equal(half, rows.bfloat16())


def test_a_seed_gives_the_same_rows_however_tables_are_grouped():
    configs = [
        EmbeddingTableConfig(name, dim, [name], num_embeddings=4) for name, dim in (("a", 4), ("b", 8), ("c", 4))
    ]
    torch.manual_seed(0)
    module = EmbeddingTables(configs)
    torch.manual_seed(0)
    for config in configs:
        expected = build_initializer(config.initializer, 4, config.dim)(torch.empty(4, config.dim))
        assert torch.equal(weight(module, config.name), expected), config.name


# Sharded: one process is enough for TorchRec's own code paths.


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def sharded(model, group):
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=torch.device("cpu"),
        sharders=[EmbeddingCollectionSharder(fused_params={"learning_rate": 0.0})],
        init_data_parallel=False,
    )


def test_sharded_tables_answer_the_same(process_group):
    torch.manual_seed(0)
    plain = tables()
    torch.manual_seed(0)
    module = sharded(tables(), process_group).module
    features = module.arrange(kjt({**FEATURES, "other": [[1], [1]]}))
    state = module.static["dim8"].state_dict()["embeddings.item.weight"].local_tensor()
    with torch.no_grad():
        weight(plain, "item").copy_(state)
        for name in ("age", "action"):
            key = f"dim{plain.configs[name].dim}"
            weight(plain, name).copy_(module.static[key].state_dict()[f"embeddings.{name}.weight"].local_tensor())
    # A lookup before and after a batch: TorchRec remembers the order of keys of its first call.
    ids = torch.tensor([4, 4, 19])
    torch.testing.assert_close(module.lookup("item", ids), plain.lookup("item", ids))
    found, expected = module(features), plain(features)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name].values(), expected[name].values())
    torch.testing.assert_close(module.lookup("age", ids[:2]), plain.lookup("age", ids[:2]))
    assert list(module.named_table_parameters()) == []
    assert len(module.fused_optimizers()) == 2


class _Model(nn.Module):
    """As genrec's models: tables, then a body."""

    def __init__(self):
        super().__init__()
        self.tables = tables()
        self.body = _Body()

    def forward(self, batch):
        return self.body(self.tables(batch.features), batch)


class _Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, embeddings, batch):
        loss = self.linear(embeddings["item"].values()).square().mean() + embeddings["age"].values().sum()
        return loss, loss.detach()


def test_torchrecs_pipeline_traces_and_runs_the_tables(process_group):
    torch.manual_seed(0)
    model = sharded(_Model(), process_group)
    batches = []
    for number in range(4):
        batch = retrieval_batch([[1, 2], [number]], extra={"age": [[1], [number]], "action": [[0, 1], [2]]})
        batch.features = model.module.tables.arrange(batch.features, {"item_negative": torch.tensor([number])})
        batches.append(batch)
    optimizer = torch.optim.SGD(model.module.body.parameters(), lr=0.0)
    expected = [model(batch)[0].item() for batch in batches]
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"), execute_all_batches=True)
    source = iter(batches)
    assert [pipeline.progress(source).item() for _ in batches] == pytest.approx(expected)
    # Both widths start their exchange a batch ahead.
    assert {module.forward.name for module in pipeline._pipelined_modules} == {
        "tables.static.dim8",
        "tables.static.dim4",
    }
