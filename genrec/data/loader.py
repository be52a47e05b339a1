"""Batches of a stage: shuffled by seed and epoch, parted over ranks, and resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from genrec.data.batch import SequenceBatch
from genrec.data.collate import Collator
from genrec.data.splits import Cases


@dataclass
class BatchPlan:
    """Which cases form which batch of this rank. A function of (seed, epoch, rank, world size) alone.

    A global batch is `batch_size` times `world_size` cases (or as many as fit `token_budget` on each rank); rank r
    takes every world_size-th of them. Training ranks have equally many batches: up to world_size - 1 cases of an epoch
    are dropped for that. Evaluation takes every case exactly once, so ranks may differ by one batch.

    Args:
        lengths: (n,) rows of each case.
        batch_size: Cases of a batch.
        token_budget: Instead: batches of cases of like length with at most so many rows in all, padding none.
        shuffle: Another order each epoch.
        seed: Of the order.
        rank, world_size: Of the data-parallel group.
        training: Whether the remainder is dropped.
    """

    lengths: NDArray[np.int64]
    batch_size: int
    token_budget: int | None = None
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    training: bool = False
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {self.rank}.")
        longest = int(self.lengths.max(initial=0))
        if self.token_budget is not None and self.token_budget < longest:
            raise ValueError(f"token_budget is {self.token_budget}, the longest case has {longest} rows.")
        self._built: tuple[int, list[NDArray[np.int64]]] | None = None

    @property
    def global_batch(self) -> int | None:
        """Cases of a batch over all ranks; None where that depends on the number of ranks."""
        return self.batch_size * self.world_size if self.token_budget is None else None

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is used; Lightning calls it."""
        self.epoch = epoch

    def batches(self) -> list[NDArray[np.int64]]:
        """Indices of the cases of each batch of this rank."""
        epoch = self.epoch if self.shuffle else 0
        if self._built is None or self._built[0] != epoch:
            self._built = (epoch, self._build(epoch))
        return self._built[1]

    def _build(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        if self.training:
            order = order[: len(order) - len(order) % self.world_size]
        groups = self._by_tokens(order, rng) if self.token_budget is not None else self._by_count(order)
        mine = [group[self.rank :: self.world_size] for group in groups]
        return [batch for batch in mine if len(batch)]

    def _by_count(self, order: NDArray) -> list[NDArray]:
        size = self.batch_size * self.world_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _by_tokens(self, order: NDArray, rng: np.random.Generator) -> list[NDArray]:
        """Cut the cases, sorted by length within the shuffled order, where a rank's longest share would overflow."""
        assert self.token_budget is not None
        ordered = order[np.argsort(self.lengths[order], kind="stable")]
        groups, start = [], 0
        while start < len(ordered):
            # Ascending lengths: with k cases a rank, none has more than k times the longest of the group, nor less
            # than k times the shortest, which bounds k.
            most = self.world_size * (self.token_budget // max(1, int(self.lengths[ordered[start]])))
            longest = self.lengths[ordered[start : start + most]]
            per_rank = np.arange(1, len(longest) // self.world_size + 1)
            fits = per_rank * longest[per_rank * self.world_size - 1] <= self.token_budget
            size = max(1, int(fits.sum())) * self.world_size
            groups.append(ordered[start : start + size])
            start += size
        return [groups[index] for index in rng.permutation(len(groups))] if self.shuffle else groups


class SequenceLoader:
    """Iterates over the batches of a plan; knows its length, and reports and restores its position.

    Lightning saves and restores `state_dict` with a checkpoint, so that a run resumed in mid-epoch sees the
    batches that were left, in the same order.

    Args:
        cases: The cases.
        plan: Which of them form which batch.
        collator: Makes a batch of them.
        num_workers: Processes that make batches ahead; 0 makes them here.
        pin_memory: Put batches into page-locked memory.
    """

    def __init__(
        self, cases: Cases, plan: BatchPlan, collator: Collator, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        # `sampler` and `batch_sampler` are the names under which Lightning looks for set_epoch.
        self.cases, self.sampler, self.collator = cases, plan, collator
        self.batch_sampler = None
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.position = 0
        self._resume = False

    def __len__(self) -> int:
        return len(self.sampler.batches())

    def __iter__(self) -> Iterator[SequenceBatch]:
        if not self._resume:
            self.position = 0
        self._resume = False
        todo = list(enumerate(self.sampler.batches()))[self.position :]
        for batch in self._make(todo):
            self.position += 1
            yield batch

    def _make(self, todo: list[tuple[int, NDArray]]) -> Iterator[SequenceBatch]:
        rank, world_size = self.sampler.rank, self.sampler.world_size
        make = _Make(self.cases, self.collator, [self.sampler.seed, 2, self.sampler.epoch], rank, world_size)
        if self.num_workers == 0:
            for item in todo:
                batch = make(item)
                yield batch.pin_memory() if self.pin_memory else batch
        else:
            yield from DataLoader(
                todo,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=make,  # type: ignore[arg-type]
                pin_memory=self.pin_memory,
                # Its own, of which nothing is drawn that matters: torch's would move on with each new iterator.
                generator=torch.Generator(),
            )

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches that were handed out in it."""
        return {
            "epoch": self.sampler.epoch,
            "position": self.position,
            "batches": len(self),
            "world_size": self.sampler.world_size,
            "global_batch": self.sampler.global_batch,
            "cases": len(self.cases),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A finished epoch starts anew.

        The number of data-parallel ranks may differ where the global batch is the same: the batches left are the same
        ones, but for up to as many cases as there are ranks at the end of an epoch (see `BatchPlan`).

        Raises:
            ValueError: In mid-epoch, the batches left are not the same ones.
        """
        self.sampler.set_epoch(state["epoch"])
        batches = state.get("batches", len(self))
        mid_epoch = 0 < state["position"] < batches
        if mid_epoch and state["world_size"] != self.sampler.world_size:
            self._check_other_ranks(state)
        elif mid_epoch and batches != len(self):
            raise ValueError(
                f"The position in the epoch was saved with {batches} batches in it, now there are {len(self)}. Resume "
                "with the same data and batch size, or from a checkpoint at the end of an epoch."
            )
        self.position = state["position"] if mid_epoch else 0
        self._resume = mid_epoch

    def _check_other_ranks(self, state: dict[str, Any]) -> None:
        plan, saved = self.sampler, state.get("global_batch")
        trouble = (
            f"The position in the epoch was saved with {state['world_size']} ranks, now there are {plan.world_size}"
        )
        end = "or resume from a checkpoint at the end of an epoch."
        if saved is None or plan.global_batch is None:
            raise ValueError(f"{trouble}, and its batches depend on that. Resume with as many ranks, {end}")
        if saved != plan.global_batch:
            cure = (
                f"set data.batch_size={saved // plan.world_size}" if saved % plan.world_size == 0 else "use other ranks"
            )
            raise ValueError(
                f"{trouble}, and a global batch has {plan.global_batch} cases instead of {saved}: {cure}, {end}"
            )
        if state["cases"] != len(self.cases) or state["position"] >= len(self):
            raise ValueError(
                f"{trouble}, with {state['cases']} cases an epoch instead of {len(self.cases)}. Resume with the same "
                f"data, {end}"
            )


@dataclass
class _Make:
    """(number, indices) -> batch; draws are a function of seed, epoch, number and the case's place in the global batch,
    whatever process or rank makes it."""

    cases: Cases
    collator: Collator
    seed: list[int]
    rank: int
    world_size: int

    def __call__(self, item: tuple[int, NDArray]) -> SequenceBatch:
        number, index = item
        rng = np.random.default_rng([*self.seed, number])
        return self.collator(self.cases.take(index), rng, (self.rank, self.world_size))
