"""Synthetic logs whose best reachable metrics are known exactly.

Ranking. Every user has one interest at a time, out of `num_interests`, that may change from one session to the next.
A session shows `session_length` items, drawn by a Zipf law whatever the interest. Each item belongs to one topic, its
side feature; the chance of a click is high where the topic is the interest, low elsewhere, both shifted by the item's
own appeal. A clicked item is liked, and viewed long, with chances of its own. So what a user does next depends on what
the user did before, and only through the interest. Since the interest is a hidden Markov chain over few states, the
forward algorithm gives exactly P(interest | all earlier sessions), hence the exact chance of each label given the
history before its session: no predictor that reads the same history can rank better in expectation. These chances are
stored beside the events, and their AUC is the best reachable.

Retrieval. The next item is one of `num_successors` fixed successors of the last one with probability
`follow_probability`, else drawn by the Zipf law. The best list of ten is known, and so is the HR@10 that it reaches.

`arriving`: items are ever-new. The catalogue is a window that moves on with time, ids are large and never repeat: what
dynamic tables are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from genrec.data.cache import EventChunk, Tables
from genrec.data.schema import FeatureSchema

TASKS = ["click", "like", "long_view"]
GENERATOR_VERSION = 2
_START = 1_600_000_000
_SESSION_GAP, _EVENT_GAP = 86_400, 30
_USERS_A_CHUNK = 2048
_ARRIVING_BASE = 1 << 40


@dataclass
class Synthetic:
    """A seeded log. Users, items and chances depend on the arguments alone.

    Args:
        kind: "ranking" (sessions with actions) or "retrieval" (a walk over items).
        num_users: U.
        num_items: Items of the catalogue (of its window with `arriving`).
        events_per_user: Events of each user; for "ranking" rounded down to whole sessions.
        num_interests: Interests, and topics of items.
        session_length: Items of a session.
        drift: Chance that the interest changes between sessions.
        zipf: Exponent of the items' popularity.
        num_successors: Retrieval: successors of each item.
        follow_probability: Retrieval: chance that a successor follows.
        arriving: Ranking: share of the catalogue that is replaced by new ids from one session to the next.
        seed: Of everything.
    """

    kind: Literal["ranking", "retrieval"] = "ranking"
    num_users: int = 4000
    num_items: int = 100
    events_per_user: int = 60
    num_interests: int = 3
    session_length: int = 10
    drift: float = 0.05
    zipf: float = 0.8
    num_successors: int = 4
    follow_probability: float = 0.7
    arriving: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("ranking", "retrieval"):
            raise ValueError(f"kind must be 'ranking' or 'retrieval', got '{self.kind}'.")
        if self.events_per_user < self.session_length and self.kind == "ranking":
            raise ValueError("events_per_user must hold at least one session (session_length).")
        if self.arriving and self.kind == "retrieval":
            raise ValueError("arriving items are for kind 'ranking'.")
        rng = np.random.default_rng(self.seed)
        ranks = rng.permutation(self.num_items)
        weights = 1.0 / (1.0 + ranks) ** self.zipf
        self._popularity = weights / weights.sum()
        self._topic = rng.integers(self.num_interests, size=self.num_items)
        self._appeal = rng.normal(0.0, 0.5, size=self.num_items)
        self._like = rng.uniform(0.2, 0.8, size=self.num_items)
        self._long = rng.uniform(0.2, 0.8, size=self.num_items)
        self._successors = rng.integers(self.num_items, size=(self.num_items, self.num_successors))

    def files(self) -> list[Path]:
        """None: the log is generated."""
        return []

    def options(self) -> dict:
        """All arguments, and a number that changes with the code that draws the log."""
        return {**asdict(self), "generator": GENERATOR_VERSION}

    def total(self) -> int:
        """Users."""
        return self.num_users

    def chunks(self) -> Iterator[EventChunk]:
        """The log, some users at a time; each chunk has a random stream of its own."""
        for number, start in enumerate(range(0, self.num_users, _USERS_A_CHUNK)):
            users = np.arange(start, min(start + _USERS_A_CHUNK, self.num_users))
            rng = np.random.default_rng([self.seed, 1, number])
            make = self._ranking if self.kind == "ranking" else self._retrieval
            chunk = make(users, rng)
            chunk.progress = int(users[-1]) + 1
            yield chunk

    def click_probability(self, interest: NDArray, item: NDArray) -> NDArray[np.float64]:
        """P(click | interest, item): 0.75 where the topic matches, 0.15 elsewhere, moved by the item's appeal."""
        base = np.where(self._topic[item] == interest, np.log(0.75 / 0.25), np.log(0.15 / 0.85))
        return 1.0 / (1.0 + np.exp(-(base + self._appeal[item])))

    def _ranking(self, users: NDArray, rng: np.random.Generator) -> EventChunk:
        sessions, length, states = self.events_per_user // self.session_length, self.session_length, self.num_interests
        n = len(users)
        interest = np.empty((n, sessions), np.int64)
        interest[:, 0] = rng.integers(states, size=n)
        for session in range(1, sessions):
            moves = rng.random(n) < self.drift
            interest[:, session] = np.where(moves, rng.integers(states, size=n), interest[:, session - 1])
        item = rng.choice(self.num_items, p=self._popularity, size=(n, sessions, length))
        click = rng.random(item.shape) < self.click_probability(interest[:, :, None], item)
        like = click & (rng.random(item.shape) < self._like[item])
        long_view = click & (rng.random(item.shape) < self._long[item])
        chance = self.filtered_click_probability(item, click)
        known = np.stack([chance, chance * self._like[item], chance * self._long[item]], axis=-1)
        bits = (click + 2 * like + 4 * long_view).reshape(-1)
        start = _START + rng.integers(0, _SESSION_GAP, size=(n, 1, 1))
        time = start + _SESSION_GAP * np.arange(sessions)[:, None] + _EVENT_GAP * np.arange(length)
        return EventChunk(
            user=np.repeat(users, sessions * length),
            item=self._raw_ids(item).reshape(-1),
            timestamp=time.reshape(-1),
            action=bits,
            labels=bits,
            known=known.reshape(-1, len(TASKS)).astype(np.float32),
        )

    def filtered_click_probability(self, item: NDArray, click: NDArray[np.bool_]) -> NDArray[np.float64]:
        """P(click of each shown item | all clicks and items of the user's earlier sessions), by the forward algorithm.

        Args:
            item: (users, sessions, session_length) items shown.
            click: The same shape.
        """
        states = self.num_interests
        chance = np.stack([self.click_probability(np.asarray(state), item) for state in range(states)])
        belief = np.full((len(item), states), 1.0 / states)
        out = np.empty(item.shape)
        for session in range(item.shape[1]):
            if session:
                belief = (1 - self.drift) * belief + self.drift / states
            given = chance[:, :, session]
            out[:, session] = np.einsum("us,sul->ul", belief, given)
            likelihood = np.where(click[:, session], given, 1 - given).prod(axis=-1).T
            belief = belief * likelihood
            belief /= belief.sum(axis=1, keepdims=True)
        return out

    def _raw_ids(self, item: NDArray) -> NDArray[np.int64]:
        """Item ids; with `arriving`, slot i of the catalogue holds another new id after every few sessions."""
        if not self.arriving:
            return item.astype(np.int64)
        session = np.arange(item.shape[1])[:, None]
        # Slots turn over one after the other: slot i for the k-th time when k + i / num_items has passed.
        generation = np.floor(session * self.arriving - item / self.num_items + 1.0).astype(np.int64)
        return _ARRIVING_BASE + generation * self.num_items + item

    def _retrieval(self, users: NDArray, rng: np.random.Generator) -> EventChunk:
        n, length = len(users), self.events_per_user
        walk = rng.choice(self.num_items, p=self._popularity, size=(n, length))
        known = np.empty((n, length, 1), np.float32)
        known[:, 0] = 0.0
        best = self._best_ten()
        for step in range(1, length):
            follows = rng.random(n) < self.follow_probability
            choice = self._successors[walk[:, step - 1], rng.integers(self.num_successors, size=n)]
            walk[:, step] = np.where(follows, choice, walk[:, step])
            known[:, step, 0] = (best[walk[:, step - 1]] == walk[:, step, None]).any(axis=1)
        time = _START + _SESSION_GAP * np.arange(length) + rng.integers(0, _SESSION_GAP, size=(n, 1))
        return EventChunk(
            user=np.repeat(users, length),
            item=walk.reshape(-1).astype(np.int64),
            timestamp=time.reshape(-1),
            known=known.reshape(-1, 1),
        )

    def _best_ten(self) -> NDArray[np.int64]:
        """(num_items, 10) the likeliest next items after each item."""
        chance = np.tile((1 - self.follow_probability) * self._popularity, (self.num_items, 1))
        np.add.at(
            chance,
            (np.arange(self.num_items)[:, None], self._successors),
            self.follow_probability / self.num_successors,
        )
        return np.argsort(-chance, axis=1, kind="stable")[:, :10]

    def tables(self) -> Tables:
        """Ranking: the topic of each item, as a side feature (1, 2, ...; ever-new items have none that is known)."""
        if self.kind == "retrieval" or self.arriving:
            return Tables()
        topics = (np.arange(self.num_items), self._topic + 1, self.num_interests + 1)
        return Tables(item_features={"topic": topics})

    def schema(self, num_items: int) -> FeatureSchema:
        """Click, like and long view; the action id is their mask."""
        if self.kind == "retrieval":
            return FeatureSchema(num_items)
        return FeatureSchema(num_items, num_actions=8, tasks=list(TASKS))
