"""The models as they are, with sharded tables and TorchRec's pipeline. One process runs TorchRec's own code paths."""

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv

from genrec.models import HSTURanking, HSTURetrieval, Task
from genrec.parallel._sequence_tables import SequenceTableSharder, cut_lengths
from tests.helpers import ranking_batch, retrieval_batch

SIZES = {"hidden_dim": 8, "max_seqlen": 8, "dropout": 0.0, "input_dropout": 0.0}


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def retrieval(**options):
    model = HSTURetrieval(20, table_optimizer="sgd", table_learning_rate=0.1, **SIZES, **options)
    return model, [retrieval_batch([[i, i + 1, i + 2], [2 * i]]) for i in range(5)]


def ranking():
    model = HSTURanking(
        20, [Task("click")], action_feature="action", num_actions=2, table_optimizer="sgd", table_learning_rate=0.1,
        **SIZES,
    )  # fmt: skip
    labels = torch.tensor([[1.0], [0.0], [1.0]])
    return model, [ranking_batch([[i, 1, 2, 3], [4]], [[0, 1, 0, 1], [1]], [2, 1], labels) for i in range(5)]


def test_cut_lengths_are_even_and_whole():
    lengths = torch.tensor([0, 1, 2, 7, 9])
    cut = cut_lengths(lengths, 4).view(-1, 4)
    assert cut.sum(1).tolist() == lengths.tolist()
    assert (cut.amax(1) - cut.amin(1)).max() <= 1


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "build",
    [retrieval, lambda: retrieval(loss="sampled_softmax"), ranking],
    ids=["full_softmax", "sampled_softmax", "ranking"],
)
def test_pipelined_training_with_sharded_tables_is_plain_training(build, pieces, process_group):
    def parts():
        torch.manual_seed(0)
        model, batches = build()
        model.train()
        torch.manual_seed(1)
        return model, [model.prepare_batch(batch) for batch in batches]

    plain, batches = parts()
    optimizer, expected = plain.configure_optimizers(), []
    for batch in batches:
        loss, _ = plain.total_loss(plain.loss(plain(batch), batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    model, batches = parts()
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(process_group),
        device=torch.device("cpu"),
        sharders=[SequenceTableSharder(pieces, {"learning_rate": 0.1})],
        init_data_parallel=False,
    )
    _copy_tables(parts()[0], model)

    def step(batch):
        output = sharded(batch)
        loss, _ = model.total_loss(model.loss(output, batch))
        return loss, loss.detach()

    dense = model.configure_optimizers()
    assert [group["name"] for group in dense.param_groups] == ["dense", "fused.0.0"]
    pipeline = TrainPipelineSparseDist(
        sharded, dense, torch.device("cpu"), execute_all_batches=True, custom_model_fwd=step
    )
    source = iter(batches)
    actual = [pipeline.progress(source).item() for _ in batches]
    assert {module.forward.name for module in pipeline._pipelined_modules} == {"tables.static.dim8"}
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual[0] != pytest.approx(actual[-1], rel=1e-3)
    pipeline.detach()
    if isinstance(model, HSTURetrieval):
        torch.testing.assert_close(model.catalogue(), plain.catalogue())


def _copy_tables(source, target):
    """Give sharded tables the rows of unsharded ones; here every shard is a whole table."""
    for name, weight in source.tables.named_table_parameters():
        rows = target.tables.static["dim8"].state_dict()[f"embeddings.{name}.weight"].local_tensor()
        rows.copy_(weight.detach())
