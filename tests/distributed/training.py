"""Small trainings under `HybridParallelStrategy`, the same global batches however many ranks there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from genrec.models import HSTURanking, HSTURetrieval, Task
from genrec.parallel import HybridParallelStrategy
from tests.helpers import markov_sequences, ranking_batch, retrieval_batch

ITEMS = 24
SIZES = {"hidden_dim": 16, "max_seqlen": 12, "dropout": 0.0, "input_dropout": 0.0, "num_layers": 1, "num_heads": 4}
OPTIMIZER = {"table_optimizer": "rowwise_adagrad", "table_learning_rate": 0.05, "learning_rate": 0.01}


def ranking_model(**options: Any) -> HSTURanking:
    """A ranking model whose start depends on the seed 7 alone."""
    torch.manual_seed(7)
    settings = {"action_feature": "action", "num_actions": 3, **SIZES, **OPTIMIZER, **options}
    return HSTURanking(ITEMS, [Task("click"), Task("like")], **settings)


def retrieval_model(**options: Any) -> HSTURetrieval:
    """A retrieval model whose start depends on the seed 7 alone."""
    torch.manual_seed(7)
    return HSTURetrieval(ITEMS, top_ks=[5], filter_seen=False, predict_k=3, **{**SIZES, **OPTIMIZER, **options})


def ranking_rows(users: list[int], step: int) -> Any:
    """The batch of some users in a step: histories of unequal lengths, one or two candidates."""
    walks = markov_sequences(max(users) + 1, ITEMS, 12, seed=step)
    walks = [walks[user][: 4 + (user + step) % 8] for user in users]
    actions = [[(item + step) % 3 for item in walk] for walk in walks]
    targets = [1 + user % 2 for user in users]
    rows = [item for walk, count in zip(walks, targets, strict=True) for item in walk[-count:]]
    labels = torch.tensor([[float(item % 2), float(item % 3 == 0)] for item in rows])
    return ranking_batch(walks, actions, targets, labels, users=users)


def retrieval_rows(users: list[int], step: int) -> Any:
    """The same for retrieval."""
    walks = markov_sequences(max(users) + 1, ITEMS, 12, seed=step)
    return retrieval_batch([walks[user][: 4 + (user + step) % 8] for user in users], max_seqlen=12, users=users)


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ranking": (ranking_model, ranking_rows),
    "retrieval": (retrieval_model, retrieval_rows),
}


class Batches(L.LightningDataModule):
    """Global batches of `users` users each, split over the data-parallel ranks; evaluation in batches of 2 users.

    Args:
        rows: (users, step) -> batch.
        steps: Training batches of an epoch.
        users: Users of a global training batch.
        cases: Users of the evaluation, over all ranks.
    """

    def __init__(self, rows: Callable[..., Any], steps: int, users: int = 8, cases: int = 8) -> None:
        super().__init__()
        self.rows, self.steps, self.users, self.cases = rows, steps, users, cases

    @property
    def place(self) -> tuple[int, int]:
        """Rank and size of the data-parallel group."""
        settings = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
        return settings["rank"], settings["num_replicas"]

    def train_dataloader(self) -> DataLoader:
        rank, size = self.place
        return loader([self.rows(list(range(self.users))[rank::size], step) for step in range(self.steps)])

    def evaluation(self) -> DataLoader:
        rank, size = self.place
        own = list(range(self.cases))[rank::size]
        return loader([self.rows(own[start : start + 2], 1000) for start in range(0, len(own), 2)])

    val_dataloader = test_dataloader = predict_dataloader = evaluation


def loader(batches: list[Any]) -> DataLoader:
    # A generator of its own: a new iterator would draw from torch's.
    return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


class Losses(L.Callback):
    """The loss of each training batch, averaged over the data-parallel ranks."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone() * trainer.accumulate_grad_batches
        if dist.is_initialized():
            loss = trainer.strategy.reduce(loss)
        self.values.append(float(loss))
        self.batches.append(batch_idx)


def trainer(strategy: Any, **options: Any) -> L.Trainer:
    """A quiet Trainer on CPU over the ranks that there are."""
    world_size = dist.get_world_size() if dist.is_initialized() and strategy != "auto" else 1
    settings = {
        "accelerator": "cpu", "devices": world_size, "strategy": strategy, "max_epochs": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "use_distributed_sampler": False, "inference_mode": False,
    }  # fmt: skip
    return L.Trainer(**{**settings, **options})


def train(kind: str, steps: int = 50, strategy: dict[str, Any] | None = None, model: dict[str, Any] | None = None,
          **options: Any) -> list[float]:  # fmt: skip
    """Losses of a training."""
    build, rows = MODELS[kind]
    losses = Losses()
    run = trainer(HybridParallelStrategy(**(strategy or {})), callbacks=[losses], limit_val_batches=0, **options)
    run.fit(build(**(model or {})), datamodule=Batches(rows, steps))
    assert losses.batches == list(range(steps))
    return losses.values
