"""Cases to a `SequenceBatch`: gathers from the memory-mapped columns, vectorised over the batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.data.schema import ACTION, ITEM
from genrec.data.splits import Cases
from genrec.data.stochastic_length import StochasticLength
from genrec.data.store import EventStore

SEEN = f"{ITEM}_seen"
"""Key of items that a sequence had before the rows that are read; at evaluation of retrieval only."""


@dataclass
class Collator:
    """Makes batches of one stage.

    Args:
        store: The events.
        kind: "retrieval" or "ranking".
        side_features, contextual_features: Names of those that go into the batch.
        actions: Whether actions go into the batch.
        tasks: Ranking: the labels, names of `schema.tasks` or "value".
        query_time: Retrieval: t' of a row is the "next" event's time (as in the paper: the model knows when it is
            asked) or the row's "own" time.
        seen: Retrieval: add the key `SEEN`.
        stochastic_length: Thins long histories out, in training.
    """

    store: EventStore
    kind: Literal["retrieval", "ranking"]
    side_features: list[str] = field(default_factory=list)
    contextual_features: list[str] = field(default_factory=list)
    actions: bool = False
    tasks: list[str] = field(default_factory=list)
    query_time: Literal["next", "own"] = "next"
    seen: bool = False
    stochastic_length: StochasticLength | None = None

    def __call__(
        self, cases: Cases, rng: np.random.Generator | None = None, place: tuple[int, int] = (0, 1)
    ) -> SequenceBatch:
        """The batch of some cases; `rng` and `place` are for `stochastic_length`."""
        rows, lengths, first_label = self._rows(cases, rng, place)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        labelled = np.arange(len(rows)) - np.repeat(offsets[:-1], lengths) >= np.repeat(first_label, lengths)
        features, counts = self._features(cases, rows, lengths)
        times = None if self.store.timestamp is None else np.asarray(self.store.timestamp[rows])
        ranking = self.kind == "ranking"
        return SequenceBatch(
            features=KeyedJaggedTensor(
                list(features),
                torch.from_numpy(np.concatenate(list(features.values()))),
                lengths=torch.from_numpy(np.concatenate(list(counts.values()))),
            ),
            seq_offsets=torch.from_numpy(offsets),
            max_seqlen=int(lengths.max(initial=0)),
            timestamps=None if times is None else torch.from_numpy(times),
            query_timestamps=self._query_times(rows, times, offsets, labelled),
            num_targets=torch.from_numpy(lengths - first_label) if ranking else None,
            labels=self._task_labels(rows[labelled]) if ranking else self._next_items(rows, labelled),
            user_ids=torch.from_numpy(self.store.user_keys[cases.user]),
        )

    def _rows(
        self, cases: Cases, rng: np.random.Generator | None, place: tuple[int, int]
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Rows that are read, how many of each case, and the place of the first labelled one in it."""
        if self.stochastic_length is not None and rng is not None:
            return self.stochastic_length.rows(cases, self.kind == "ranking", self.store.timestamp, rng, place)
        return _ranges(cases.start, cases.lengths), cases.lengths, cases.first_label - cases.start

    def _features(self, cases: Cases, rows: NDArray, lengths: NDArray) -> tuple[dict, dict]:
        """Values and lengths by key."""
        item = np.asarray(self.store.item[rows], np.int64)
        values: dict[str, NDArray] = {ITEM: item}
        counts: dict[str, NDArray] = {ITEM: lengths}
        if self.actions and self.store.action is not None:
            values[ACTION], counts[ACTION] = np.asarray(self.store.action[rows], np.int64), lengths
        for name in self.side_features:
            values[name], counts[name] = self.store.item_features[name][item].astype(np.int64), lengths
        for name in self.contextual_features:
            values[name] = self.store.user_features[name][cases.user].astype(np.int64)
            counts[name] = np.ones(len(cases), np.int64)
        if self.seen:
            begin = self.store.offsets[cases.user]
            counts[SEEN] = cases.start - begin
            values[SEEN] = np.asarray(self.store.item[_ranges(begin, counts[SEEN])], np.int64)
        return values, counts

    def _next_items(self, rows: NDArray, labelled: NDArray) -> Tensor:
        labels = np.full(len(rows), -1, np.int64)
        labels[labelled] = self.store.item[rows[labelled] + 1]
        return torch.from_numpy(labels)

    def _task_labels(self, rows: NDArray) -> Tensor:
        labels = np.empty((len(rows), len(self.tasks)), np.float32)
        for column, name in enumerate(self.tasks):
            if name == "value":
                assert self.store.value is not None
                labels[:, column] = self.store.value[rows]
            else:
                assert self.store.labels is not None
                labels[:, column] = (self.store.labels[rows] >> self.store.schema.tasks.index(name)) & 1
        return torch.from_numpy(labels)

    def _query_times(self, rows: NDArray, times: NDArray | None, offsets: NDArray, labelled: NDArray) -> Tensor | None:
        """(T,) when the event after each row happens; candidates, and the row before them, have their own time."""
        if times is None:
            return None
        if self.query_time == "own":
            return torch.from_numpy(times.copy())
        if self.kind == "retrieval":
            assert self.store.timestamp is not None
            return torch.from_numpy(np.asarray(self.store.timestamp[rows + 1]))
        following = np.append(times[1:], 0)
        ends = offsets[1:][np.diff(offsets) > 0] - 1
        own = labelled | np.append(labelled[1:], False)
        own[ends] = True
        return torch.from_numpy(np.where(own, times, following))


def _ranges(start: NDArray, lengths: NDArray) -> NDArray[np.int64]:
    """start[0], start[0] + 1, ... of each length, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(start - before, lengths) + np.arange(int(lengths.sum()))
