"""Which rows are history, and what is to be predicted, in training, validation and test.

A case is a run of rows of one user: [start, stop) is what the model reads. For retrieval the label of row r is the item
of row r + 1, and rows from `first_label` on have one. For ranking the rows from `first_label` on are the candidates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from genrec.data.store import EventStore

SplitName = Literal["leave_one_out", "time", "user"]
Stage = Literal["train", "val", "test"]


@dataclass
class Cases:
    """n cases. All are rows of the store.

    Attributes:
        user: (n,) which user.
        start: (n,) first row that is read.
        first_label: (n,) see above.
        stop: (n,) one past the last row that is read.
    """

    user: NDArray[np.int64]
    start: NDArray[np.int64]
    first_label: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) rows of each case."""
        return self.stop - self.start

    def take(self, index: NDArray) -> Cases:
        """Some of the cases."""
        return Cases(self.user[index], self.start[index], self.first_label[index], self.stop[index])


@dataclass(frozen=True)
class Split:
    """How events are parted.

    * "leave_one_out": the last event of each user is the test, the one before it validation, the rest training; for
      ranking the last block of candidates instead of the last event. Users of fewer than three such parts only train.
    * "time": events before the quantile 1 - val - test of all times train, the next share validates, the last tests.
    * "user": a share of the users validates, another tests; of these the last event (retrieval) or the last
      block of candidates (ranking) is predicted.

    Args:
        name: One of the above.
        val_share, test_share: Of the events ("time") or the users ("user").
        seed: Which users, for "user".
    """

    name: SplitName = "leave_one_out"
    val_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("leave_one_out", "time", "user"):
            raise ValueError(f"split must be 'leave_one_out', 'time' or 'user', got '{self.name}'.")
        if not (self.test_share > 0 and self.val_share >= 0 and self.val_share + self.test_share < 1):
            raise ValueError("val_share and test_share must be positive and sum to less than 1.")

    def ranges(self, store: EventStore, stage: Stage, block: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(U,) first and one-past-last event of each user that is predicted in `stage`. Empty where none is.

        Args:
            store: The events.
            stage: Of which part.
            block: Events of a part that "leave_one_out" holds out, counted from the user's first event.

        Raises:
            ValueError: A split by time of data without times.
        """
        first, last = store.offsets[:-1], store.offsets[1:]
        if self.name == "leave_one_out":
            blocks = -((first - last) // block)
            enough = blocks >= 3
            cuts = [first, *(np.where(enough, first + (blocks - held) * block, last) for held in (2, 1)), last]
        elif self.name == "time":
            cuts = self._time_cuts(store)
        else:
            role = self._roles(store.num_users)
            train, val = role == 0, role == 1
            cuts = [first, np.where(train, last, first), np.where(train | val, last, first), last]
        number = ("train", "val", "test").index(stage)
        return cuts[number], cuts[number + 1]

    def _time_cuts(self, store: EventStore) -> list[NDArray[np.int64]]:
        if store.timestamp is None:
            raise ValueError("split 'time' needs timestamps, and the data has none: choose 'leave_one_out' or 'user'.")
        shares = [1 - self.val_share - self.test_share, 1 - self.test_share]
        bounds = np.quantile(store.timestamp, shares, method="higher")
        early = [np.concatenate([[0], np.cumsum(store.timestamp < bound)]) for bound in bounds]
        first, last = store.offsets[:-1], store.offsets[1:]
        # Rows of a user are in time order, so those before a bound come first.
        return [first, *(first + counts[last] - counts[first] for counts in early), last]

    def _roles(self, users: int) -> NDArray[np.int64]:
        """0 train, 1 validation, 2 test for each user."""
        draw = np.random.default_rng(self.seed).permutation(users) / max(users, 1)
        return np.where(draw < self.test_share, 2, np.where(draw < self.test_share + self.val_share, 1, 0))


def retrieval_cases(store: EventStore, split: Split, stage: Stage, max_seqlen: int, all_windows: bool = False) -> Cases:
    """Cases of next-item prediction; the newest `max_seqlen` rows are kept.

    Args:
        store: The events.
        split: How they are parted.
        stage: In "train" every row of a user's training events but the last has a label. Else the events of the stage
            are the labels (with a split by user, the last event of its users).
        max_seqlen: Most rows that are read.
        all_windows: Training: users longer than that give further cases of older rows, so that every event is a label
            once an epoch.
    """
    begin = store.offsets[:-1]
    first, last = split.ranges(store, stage)
    if stage != "train" and split.name == "user":
        first = np.maximum(first, last - 1)
    # Event e is predicted from row e - 1, so a user's very first event never is.
    first = np.maximum(first, begin + 1)
    users = np.flatnonzero(last > first)
    first, last, begin = first[users], last[users], begin[users]
    stop, first_label = last - 1, first - 1
    start = np.maximum(begin, stop - max_seqlen)
    training = stage == "train"
    newest = Cases(users, start, _labels_from(first_label, start, begin, max_seqlen, not training), stop)
    if training and not all_windows:
        return newest
    return _with_older(newest, begin, first_label, max_seqlen, keep_history=not training)


def _labels_from(
    first_label: NDArray, start: NDArray, begin: NDArray, max_seqlen: int, keep_history: bool
) -> NDArray[np.int64]:
    """First labelled row of a window; with `keep_history` a cut-off window's older half is history only, so that every
    label has some."""
    return np.maximum(first_label, start + (np.where(start > begin, max_seqlen // 2, 0) if keep_history else 0))


def _with_older(
    newest: Cases, begin: NDArray, first_label: NDArray, max_seqlen: int, keep_history: bool = False
) -> Cases:
    """Further cases of the older labels that the newest window leaves out, newest first, each label once."""
    parts, current = [newest], newest
    while True:
        left = np.flatnonzero(current.first_label > first_label)
        if not len(left):
            break
        current, begin, first_label = current.take(left), begin[left], first_label[left]
        stop = current.first_label
        start = np.maximum(begin, stop - max_seqlen)
        labels = _labels_from(first_label, start, begin, max_seqlen, keep_history)
        current = Cases(current.user, start, labels, stop)
        parts.append(current)
    return Cases(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))


_FIELDS = ("user", "start", "first_label", "stop")


def ranking_cases(
    store: EventStore, split: Split, stage: Stage, max_seqlen: int, num_candidates: int, min_history: int = 1
) -> Cases:
    """Cases of candidates after a history; every event of the stage is a candidate once, if enough history precedes.

    A user's events are cut into blocks of `num_candidates`, counted from the user's first event, so that blocks fall
    on sessions of that length; a block that the split cuts is cut there too.

    Args:
        store: The events.
        split: How they are parted.
        stage: Of which part.
        max_seqlen: Most rows of history; the newest are kept.
        num_candidates: Most candidates of a case.
        min_history: Events that must precede a block.
    """
    first, last = split.ranges(store, stage, num_candidates)
    begin = store.offsets[:-1]
    if stage != "train" and split.name == "user":
        first = np.maximum(first, begin + (np.maximum(last - begin - 1, 0) // num_candidates) * num_candidates)
    low, high = (first - begin) // num_candidates, -((begin - last) // num_candidates)
    blocks = np.where(last > first, high - low, 0)
    user = np.repeat(np.arange(store.num_users), blocks)
    place = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    block_start = begin[user] + (low[user] + place) * num_candidates
    candidates = np.maximum(block_start, first[user])
    stop = np.minimum(block_start + num_candidates, last[user])
    kept = candidates - begin[user] >= min_history
    user, candidates, stop = user[kept], candidates[kept], stop[kept]
    start = np.maximum(begin[user], candidates - max_seqlen)
    return Cases(user, start, candidates, stop)


def target_hash(store: EventStore, cases: Cases, kind: Literal["retrieval", "ranking"]) -> str:
    """16 hex digits of a hash of who is to be predicted what: raw user ids and raw item ids, in the cases' order."""
    shift = 1 if kind == "retrieval" else 0
    lengths = cases.stop - cases.first_label
    rows = np.repeat(cases.first_label + shift - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    items = np.asarray(store.item[rows], np.int64)
    items = store.item_keys[items] if len(store.item_keys) else items
    users = np.repeat(store.user_keys[cases.user], lengths)
    return hashlib.sha256(users.tobytes() + items.tobytes()).hexdigest()[:16]
