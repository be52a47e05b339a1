"""Dynamic tables inside the models: switching the backend, single tables, checkpoints, logged metrics."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from genrec.embedding.hkv.checkpoint import find_tables
from genrec.embedding.hkv.state import table_state
from genrec.models import HSTURetrieval
from tests.helpers import retrieval_batch

ITEMS = 50


def build(backend: str = "hkv", **changes) -> HSTURetrieval:
    torch.manual_seed(0)
    arguments = {
        "max_seqlen": 8, "hidden_dim": 16, "num_layers": 1, "num_heads": 1, "input_dropout": 0.0, "dropout": 0.0,
        "table_optimizer": "adagrad", "learning_rate": 0.05, "schedule": "linear", "warmup_steps": 3, "total_steps": 20,
    }  # fmt: skip
    return HSTURetrieval(ITEMS, embedding_backend=backend, **{**arguments, **changes})


def batches(count: int, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, ITEMS, (6, 7), generator=generator).tolist() for _ in range(count)]
    return [retrieval_batch([row[: 3 + i % 5] for i, row in enumerate(lists)]) for lists in rows]


def trainer(folder, epochs: int, **arguments) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def fit(model: HSTURetrieval, folder, epochs: int, count: int = 4, **arguments) -> tuple[list[float], L.Trainer]:
    losses = Losses()
    run = trainer(folder, epochs, callbacks=[losses], **arguments.pop("trainer", {}))
    loader = torch.utils.data.DataLoader(batches(count), batch_size=None)
    run.fit(model, loader, **arguments)
    return losses.values, run


def test_losses_do_not_depend_on_the_backend(tmp_path):
    """From equal rows and with a schedule with warm-up, the whole model trains alike."""
    static = build("fbgemm")
    dynamic = build("hkv")
    (name, weight), *_ = static.tables.named_table_parameters()
    dynamic.tables.dynamic.tables[name].insert_or_assign(torch.arange(weight.shape[0]), weight.detach())
    # Static rows are drawn from torch's generator, dynamic ones are not: the rest of the model starts elsewhere.
    dynamic.body.load_state_dict(static.body.state_dict())
    expected, _ = fit(static, tmp_path, 3)
    losses, run = fit(dynamic, tmp_path, 3)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0]
    metrics = run.logged_metrics
    assert metrics["tables/item/size"] == dynamic.tables.dynamic.tables["item"].size
    assert 0 < metrics["tables/item/hit_rate"] <= 1


def test_lightnings_checkpoint_holds_the_tables_and_resumes_exactly(tmp_path):
    whole = build()
    expected, _ = fit(whole, tmp_path / "whole", 4)
    half = build()
    first, run = fit(half, tmp_path / "half", 2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = build()
    rest, _ = fit(resumed, tmp_path / "rest", 4, ckpt_path=tmp_path / "half.ckpt")
    assert first + rest == expected
    one, other = table_state(find_tables(whole)["item"]), table_state(find_tables(resumed)["item"])
    for column in ("keys", "weights", "optimizer", "scores", "steps", "updates"):
        assert torch.equal(one[column], other[column])
    loaded = HSTURetrieval.load_from_checkpoint(tmp_path / "half.ckpt")
    again = table_state(find_tables(half)["item"])
    assert torch.equal(table_state(find_tables(loaded)["item"])["weights"], again["weights"])


def test_single_tables_can_differ():
    model = build(
        "fbgemm",
        contextual_features={"user": 20},
        embedding_options={"score": "lfu"},
        embedding_tables={"user": {"backend": "hkv", "capacity": 640, "optimizer": {"learning_rate": 0.5}}},
    )
    configs = model.tables.configs
    assert configs["item"].backend == "fbgemm"
    assert configs["item"].options == {}
    assert configs["user"].options == {"score": "lfu"}
    assert configs["user"].optimizer.learning_rate == 0.5
    assert configs["user"].optimizer.name == "adagrad"
    assert model.tables.dynamic.tables["user"].max_capacity == 640
    with pytest.raises(ValueError, match=r"names the tables \['movie'\]; the model has \['item'\]"):
        build(embedding_tables={"movie": {}})
    with pytest.raises(ValueError, match=r"embedding_tables\['item'\]: .*unexpected keyword argument 'rows'"):
        build(embedding_tables={"item": {"rows": 3}})


def test_a_table_without_capacity_holds_the_whole_catalogue():
    model = build(table_optimizer="sgd")
    table = model.tables.dynamic.tables["item"]
    everything = torch.arange(table.config.rows)
    model.tables.lookup("item", everything).sum().backward()
    assert table.size == table.config.rows
    assert table.info().evicted == 0
