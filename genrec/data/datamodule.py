"""`SequenceDataModule`: a reader, a split and loaders for Lightning. The only file of this package that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from genrec.data.cache import Reader, TieBreak, prepare
from genrec.data.collate import Collator
from genrec.data.loader import BatchPlan, SequenceLoader
from genrec.data.schema import FeatureSchema
from genrec.data.splits import Cases, Split, SplitName, Stage, ranking_cases, retrieval_cases, target_hash
from genrec.data.stochastic_length import StochasticLength
from genrec.data.store import EventStore
from genrec.metrics.ranking import grouped_auc


class SequenceDataModule(L.LightningDataModule):
    """Everything between a reader and a Trainer.

    Args:
        reader: Where events come from (`genrec.data.readers`).
        kind: "retrieval" (the next item) or "ranking" (labels of candidates).
        split: "leave_one_out", "time" or "user": see `Split`.
        val_share, test_share: Shares of the last two, for "time" and "user".
        max_seqlen: Most events of a history; the newest are kept.
        batch_size: Cases of a training batch on each rank.
        eval_batch_size: Cases of a validation or test batch; None: batch_size.
        token_budget: Instead of batch_size in training: batches of like lengths with at most so many events.
        num_candidates: Ranking: most candidates of a case. A user's events are cut into blocks of so many.
        min_history: Ranking: events that must precede a block.
        all_windows: Retrieval: train on all events of users longer than max_seqlen, in several cases.
        query_time: Retrieval: see `Collator`.
        actions: Put the actions into the batch; None: for ranking.
        side_features: Item side features to use; None: all for ranking, none for retrieval.
        contextual_features: User features to use; None: all for ranking, none for retrieval.
        tasks: Ranking: labels to predict; None: all binary ones of the data.
        stochastic_length: alpha of Stochastic Length in training; None for off.
        stochastic_selection: "random" or "recent".
        tie_break: Order of one user's events at the same time: "input" or "item" (see `prepare`).
        remap_items: See `prepare`.
        cache_dir: Where prepared data is kept: see `prepare`.
        num_workers: Processes that make batches; 0 makes them in the trainer's process.
        seed: Of shuffling, of "user" splits and of thinning.
        rank, world_size: Of the data-parallel group; None: the trainer's.
        progress: Show progress while preparing.
    """

    def __init__(
        self,
        reader: Reader,
        kind: Literal["retrieval", "ranking"],
        *,
        split: SplitName = "leave_one_out",
        val_share: float = 0.1,
        test_share: float = 0.1,
        max_seqlen: int = 200,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        token_budget: int | None = None,
        num_candidates: int = 10,
        min_history: int = 1,
        all_windows: bool = False,
        query_time: Literal["next", "own"] = "next",
        actions: bool | None = None,
        side_features: list[str] | None = None,
        contextual_features: list[str] | None = None,
        tasks: list[str] | None = None,
        stochastic_length: float | None = None,
        stochastic_selection: Literal["random", "recent"] = "random",
        tie_break: TieBreak = "input",
        remap_items: bool = True,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("retrieval", "ranking"):
            raise ValueError(f"kind must be 'retrieval' or 'ranking', got '{kind}'.")
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size go together: give both, or neither for the trainer's.")
        self.reader, self.kind = reader, kind
        self.split = Split(split, val_share, test_share, seed)
        self.max_seqlen, self.batch_size, self.eval_batch_size = max_seqlen, batch_size, eval_batch_size
        self.token_budget, self.num_candidates, self.min_history = token_budget, num_candidates, min_history
        self.all_windows, self.query_time = all_windows, query_time
        self._actions, self._side, self._contextual, self._tasks = actions, side_features, contextual_features, tasks
        self.stochastic = (
            None if stochastic_length is None else StochasticLength(stochastic_length, max_seqlen, stochastic_selection)
        )
        self.tie_break: TieBreak = tie_break
        self.remap_items, self.cache_dir, self.num_workers = remap_items, cache_dir, num_workers
        self.seed, self._rank, self._world_size, self.progress = seed, rank, world_size, progress
        self.store: EventStore | None = None
        self._cases: dict[str, Cases] = {}

    def prepare_data(self) -> None:
        """Prepare the cache, on one process of each machine."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared data."""
        if self.store is None:
            self.store = self._open()
            self._check()

    def _open(self) -> EventStore:
        return prepare(
            self.reader,
            self.cache_dir,
            tie_break=self.tie_break,
            remap_items=self.remap_items,
            progress=self.progress,
        )

    def _check(self) -> None:
        for asked, known, kind in (
            (self.side_features, self.full_schema.side_features, "side feature"),
            (self.contextual_features, self.full_schema.contextual_features, "contextual feature"),
            (self.tasks, [*self.full_schema.tasks, *(["value"] if self.full_schema.has_value else [])], "task"),
        ):
            unknown = [name for name in asked if name not in known]
            if unknown:
                raise ValueError(f"The data has no {kind} {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
        if self.kind == "ranking" and not self.tasks:
            raise ValueError("The data has no labels to rank by: choose another reader, or kind 'retrieval'.")

    @property
    def opened(self) -> EventStore:
        """The store; opens it where `setup` has not run."""
        self.setup()
        assert self.store is not None
        return self.store

    @property
    def full_schema(self) -> FeatureSchema:
        """All that the data has."""
        return self.opened.schema

    @property
    def schema(self) -> FeatureSchema:
        """What the batches have: what a model is built from."""
        full = self.full_schema
        return FeatureSchema(
            full.num_items,
            full.num_actions if self.uses_actions else 0,
            {name: full.side_features[name] for name in self.side_features},
            {name: full.contextual_features[name] for name in self.contextual_features},
            self.tasks if self.kind == "ranking" else [],
            full.has_value,
            full.has_timestamps,
        )

    @property
    def uses_actions(self) -> bool:
        """Whether actions are in the batch."""
        wanted = self.kind == "ranking" if self._actions is None else self._actions
        return wanted and self.full_schema.num_actions > 0

    @property
    def side_features(self) -> list[str]:
        """Side features in the batch."""
        return self._chosen(self._side, list(self.full_schema.side_features))

    @property
    def contextual_features(self) -> list[str]:
        """Contextual features in the batch."""
        return self._chosen(self._contextual, list(self.full_schema.contextual_features))

    @property
    def tasks(self) -> list[str]:
        """Ranking: names of the labels' columns."""
        return self._chosen(self._tasks, list(self.full_schema.tasks))

    def _chosen(self, asked: list[str] | None, known: list[str]) -> list[str]:
        return list(asked) if asked is not None else known if self.kind == "ranking" else []

    def cases(self, stage: Stage) -> Cases:
        """The cases of a stage."""
        if stage not in self._cases:
            if self.kind == "retrieval":
                made = retrieval_cases(self.opened, self.split, stage, self.max_seqlen, self.all_windows)
            else:
                made = ranking_cases(
                    self.opened, self.split, stage, self.max_seqlen, self.num_candidates, self.min_history
                )
            self._cases[stage] = made
        return self._cases[stage]

    @property
    def test_targets_hash(self) -> str:
        """Hash of what is to be predicted in the test: the same hash, the same task."""
        return target_hash(self.opened, self.cases("test"), self.kind)

    @property
    def item_counts(self) -> torch.Tensor:
        """(V,) int64, how often each item occurs in the training events."""
        first, last = self.split.ranges(self.opened, "train", self.num_candidates if self.kind == "ranking" else 1)
        lengths = last - first
        rows = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
        return torch.from_numpy(self.opened.item_counts(rows).astype(np.int64))

    @property
    def best_reachable(self) -> dict[str, float]:
        """The best test metrics that any model of the same history can reach in expectation; empty for real data."""
        known, cases = self.opened.known, self.cases("test")
        if known is None:
            return {}
        lengths = cases.stop - cases.first_label
        shift = 1 if self.kind == "retrieval" else 0
        rows = np.repeat(cases.first_label + shift - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        if self.kind == "retrieval":
            return {"hr@10": float(known[rows, 0].mean())}
        assert self.opened.labels is not None
        bits = self.opened.labels[rows]
        out = {}
        for column, name in enumerate(self.full_schema.tasks):
            if name in self.tasks:
                target = torch.from_numpy(((bits >> column) & 1).astype(np.int64))
                auc, _, _ = grouped_auc(torch.from_numpy(known[rows, column]), target)
                out[f"auc/{name}"] = float(auc.squeeze())
        return out

    def train_dataloader(self) -> SequenceLoader:
        """Shuffled anew each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> SequenceLoader:
        """Every validation case once."""
        return self._loader("val")

    def test_dataloader(self) -> SequenceLoader:
        """Every test case once."""
        return self._loader("test")

    def predict_dataloader(self) -> SequenceLoader:
        """The test cases."""
        return self._loader("test")

    def _loader(self, stage: Stage) -> SequenceLoader:
        training = stage == "train"
        cases = self.cases(stage)
        if training and not len(cases):
            raise ValueError("No training cases: every user is too short for the split. Check the split and the data.")
        rank, world_size = self._place()
        plan = BatchPlan(
            cases.lengths,
            self.batch_size if training else self.eval_batch_size or self.batch_size,
            self.token_budget if training else None,
            shuffle=training,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            training=training,
        )
        collator = Collator(
            self.opened,
            self.kind,
            self.side_features,
            self.contextual_features,
            self.uses_actions,
            self.tasks,
            self.query_time,
            seen=self.kind == "retrieval" and not training,
            stochastic_length=self.stochastic if training else None,
        )
        return SequenceLoader(cases, plan, collator, self.num_workers, pin_memory=self._on_cuda())

    def _place(self) -> tuple[int, int]:
        """Rank and world size of the data-parallel group: given, or the strategy's."""
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        settings: Any = None
        if self.trainer is not None:
            settings = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return (settings["rank"], settings["num_replicas"]) if settings else (0, 1)

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
