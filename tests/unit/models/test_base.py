"""What all models share: counts over ranks, precision, features, subclasses of a few lines."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

import genrec
from genrec.embedding import EmbeddingTableConfig
from genrec.models import HSTURanking, HSTURetrieval, LossSum, MLPRanking, Task
from tests.helpers import loader, markov_sequences, ranking_batch, retrieval_batch

SMALL = {"hidden_dim": 16, "max_seqlen": 12, "dropout": 0.0, "input_dropout": 0.0}


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


def test_public_names():
    assert genrec.HSTURetrieval is HSTURetrieval
    assert genrec.Task is Task


def test_losses_are_divided_by_the_mean_count_of_all_ranks():
    """Gradients averaged over ranks are then those of one batch: here rank 0 of two with 1 and 3 labels."""
    model = HSTURetrieval(10, **SMALL)
    asked = []

    def reduce(value, reduce_op):
        asked.append(reduce_op)
        return (value + torch.tensor([3.0])) / 2

    model._trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=reduce))
    mine = LossSum(torch.tensor(6.0), torch.tensor(1.0), 0.5)
    total, parts = model.total_loss({"a": mine})
    assert asked == ["mean"]
    assert parts["a"] == 3.0
    # With rank 1's total of 10: (6 + 10) / (1 + 3) * 0.5 is the mean of both ranks' losses.
    other = 0.5 * 10 / 2
    assert (total + other) / 2 == 0.5 * (6 + 10) / (1 + 3)


def test_a_subclass_of_a_few_lines():
    """As in the README: another head, another table, another loss term."""

    class MyRetrieval(HSTURetrieval):
        def __init__(self, num_items, penalty=0.1, **options):
            self.penalty = penalty
            super().__init__(num_items, **options)

        def build_head(self):
            return nn.Sequential(nn.Linear(self.hidden_dim, self.hidden_dim), nn.LayerNorm(self.hidden_dim))

        def table_configs(self):
            (item,) = super().table_configs()
            return [EmbeddingTableConfig(item.name, item.dim, item.feature_names, num_embeddings=item.rows + 5)]

        def loss(self, output, batch):
            size = output.query.square().sum()
            count = torch.tensor(float(output.query.shape[0]))
            return {**super().loss(output, batch), "size": LossSum(size, count, self.penalty)}

    L.seed_everything(0, verbose=False)
    model = MyRetrieval(num_items=20, penalty=0.01, **SMALL)
    run = trainer(max_epochs=2)
    run.fit(model, loader([retrieval_batch(markov_sequences(8, 20, 6))]))
    assert {"train/loss", "train/loss/next_item", "train/loss/size"} <= set(run.callback_metrics)
    assert model.hparams.penalty == 0.01
    assert model.tables.static["dim16"].embeddings["item"].weight.shape == (25, 16)


def test_each_loss_is_logged_where_loggers_write():
    """Their weighted sum is the loss of the same step."""

    class Seen(DummyLogger):
        def __init__(self):
            super().__init__()
            self.steps = {}

        def log_metrics(self, metrics, step=None):
            self.steps[step] = metrics

    seen = Seen()
    L.seed_everything(0, verbose=False)
    tasks = [Task("click"), Task("like", weight=0.5)]
    model = HSTURanking(20, tasks, action_feature="action", num_actions=3, **{**SMALL, "max_seqlen": 8})
    batches = [
        ranking_batch([[1, 2, 3 + step], [4, 5]], [[0, 1, 0], [1, 2]], [1, 1], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        for step in range(7)
    ]
    trainer(max_epochs=1, logger=seen, log_every_n_steps=3).fit(model, loader(batches))
    assert sorted(seen.steps) == [2, 5]
    for metrics in seen.steps.values():
        expected = metrics["train/loss/click"] + 0.5 * metrics["train/loss/like"]
        assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax"}, {"form": "production", "item_bias": True}])
def test_bf16_follows_fp32(options):
    def losses(precision):
        L.seed_everything(0, verbose=False)
        model = HSTURetrieval(20, **SMALL, **options)
        run = trainer(max_epochs=5, precision=precision)
        batch = retrieval_batch(markov_sequences(16, 20, 8))
        run.fit(model, loader([batch]), loader([batch]))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        return run.callback_metrics["val/loss"].item()

    assert losses("bf16-mixed") == pytest.approx(losses("32-true"), rel=0.02)


def test_features_of_other_widths_are_projected():
    widths = {"action": 4, "genre": 3, "age": 5}
    batch = ranking_batch(
        [[1, 2, 3], [4, 5]], [[0, 1, 1], [1, 0]], [1, 1], torch.tensor([[1.0], [0.0]]),
        extra={"genre": [[0, 1, 2], [2, 1]], "age": [[1], [2]]},
    )  # fmt: skip
    for model_class in (genrec.HSTURanking, MLPRanking):
        model = model_class(
            10, [Task("click")], action_feature="action", num_actions=2, side_features={"genre": 3},
            contextual_features={"age": 4}, embedding_dims=widths, hidden_dim=16, max_seqlen=4,
        )  # fmt: skip
        assert {model.tables.dim(name) for name in widths} == {3, 4, 5}
        prepared = model.prepare_batch(batch)
        model.total_loss(model.loss(model(prepared), prepared))[0].backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_loop_without_lightning():
    torch.manual_seed(0)
    model = HSTURetrieval(20, learning_rate=1e-2, **SMALL).train()
    optimizer = model.configure_optimizers()
    batch = retrieval_batch(markov_sequences(16, 20, 8))
    values = []
    for _ in range(20):
        prepared = model.prepare_batch(batch)
        loss, _ = model.total_loss(model.loss(model(prepared), prepared))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]


def test_a_batch_that_was_not_prepared_says_what_is_missing():
    model = HSTURetrieval(20, **SMALL)
    with pytest.raises(KeyError, match="item_catalogue"):
        model(retrieval_batch([[1, 2]]))


def test_dynamic_tables_are_one_argument():
    L.seed_everything(0, verbose=False)
    model = HSTURetrieval(20, embedding_backend="hkv", schedule="linear", table_learning_rate=1e-2, **SMALL)
    batch = retrieval_batch(markov_sequences(16, 20, 8))
    run = trainer(max_epochs=10)
    run.fit(model, loader([batch]), loader([batch]))
    assert [(g["name"], g["lr"]) for g in run.optimizers[0].param_groups] == [("dense", 0.0), ("fused.0.0", 0.0)]
    before = run.callback_metrics["val/loss"].item()
    (fresh,) = run.validate(HSTURetrieval(20, embedding_backend="hkv", **SMALL), loader([batch]), verbose=False)
    assert before < fresh["val/loss"] - 0.2


def test_models_copy_and_load_with_weights_only(tmp_path):
    model = HSTURetrieval(20, betas=(0.9, 0.98), relative_bias="none", **SMALL)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.recommend([[1, 2]])[1], model.recommend([[1, 2]])[1])
    run = trainer(max_epochs=1)
    run.fit(model, loader([retrieval_batch([[1, 2, 3]])]))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = HSTURetrieval.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.dense_optimizer_config.betas == (0.9, 0.98)
    assert torch.equal(loaded.recommend([[1, 2]])[1], model.recommend([[1, 2]])[1])


def test_the_logged_loss_is_the_mean_of_all_cases():
    torch.manual_seed(0)
    model = HSTURetrieval(20, relative_bias="none", **SMALL)
    walks = markov_sequences(7, 20, 6)
    targets = [1, 2, 3, 4, 5, 6, 7]
    uneven = [retrieval_batch(walks[:5], targets=targets[:5]), retrieval_batch(walks[5:], targets=targets[5:])]
    (apart,) = trainer().test(model, loader(uneven), verbose=False)
    (whole,) = trainer().test(model, loader([retrieval_batch(walks, targets=targets)]), verbose=False)
    assert apart == pytest.approx(whole, rel=1e-5)
