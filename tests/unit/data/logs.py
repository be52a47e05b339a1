"""Hand-made logs for the tests of data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genrec.data import EventStore, FeatureSchema, prepare
from genrec.data.cache import EventChunk, Tables
from genrec.data.splits import Cases


@dataclass
class ListReader:
    """Events of a list, `chunk` at a time.

    Args:
        events: (user, item, time) of each event; time None for a log without.
        labels: Bits of the tasks "a", "b" of each event; they are the actions too.
        value: A number for each event.
        item_features, user_features: name -> raw id -> feature id.
    """

    events: list[tuple]
    labels: list[int] | None = None
    value: list[float] | None = None
    item_features: dict[str, dict[int, int]] = field(default_factory=dict)
    user_features: dict[str, dict[int, int]] = field(default_factory=dict)
    chunk: int = 3

    def files(self) -> list[Path]:
        return []

    def options(self) -> dict:
        return vars(self)

    def total(self) -> int:
        return len(self.events)

    def chunks(self) -> Iterator[EventChunk]:
        for start in range(0, len(self.events), self.chunk):
            part = slice(start, start + self.chunk)
            user, item, time = zip(*self.events[part], strict=True)
            bits = None if self.labels is None else np.array(self.labels[part])
            yield EventChunk(
                np.array(user), np.array(item), None if time[0] is None else np.array(time), bits, bits,
                None if self.value is None else np.array(self.value[part]), progress=start,
            )  # fmt: skip

    def tables(self) -> Tables:
        def made(features: dict) -> dict:
            return {
                name: (np.array(list(ids)), np.array(list(ids.values())), max(ids.values()) + 1)
                for name, ids in features.items()
            }

        return Tables(item_features=made(self.item_features), user_features=made(self.user_features))

    def schema(self, num_items: int) -> FeatureSchema:
        labelled = self.labels is not None
        return FeatureSchema(
            num_items,
            num_actions=4 if labelled else 0,
            tasks=["a", "b"] if labelled else [],
            has_value=self.value is not None,
            has_timestamps=self.events[0][2] is not None,
        )


def store_of(reader: object, folder: Path, **options) -> EventStore:
    return prepare(reader, folder, progress=False, **options)


def histories(folder: Path, *lengths: int, step: int = 10, timed: bool = True) -> EventStore:
    """Users 100, 101, ... with so many events each; the item of event e of user u is raw id 1000 * u + e."""
    reader = ListReader(
        [
            (100 + user, 1000 * user + event, step * event + user if timed else None)
            for user, length in enumerate(lengths)
            for event in range(length)
        ]
    )
    return store_of(reader, folder)


def random_log(seed: int, users: int = 12, longest: int = 30, tasks: bool = True) -> ListReader:
    """Users of 1 .. longest events in a shuffled input, with labels, values and features."""
    rng = np.random.default_rng(seed)
    events = [
        (int(user) * 7 - 20, int(rng.integers(50)) * 3 - 10, int(rng.integers(1000)))
        for user in range(users)
        for _ in range(rng.integers(1, longest + 1))
    ]
    events = [events[i] for i in rng.permutation(len(events))]
    return ListReader(
        events,
        labels=rng.integers(4, size=len(events)).tolist() if tasks else None,
        value=rng.integers(100, size=len(events)).astype(float).tolist(),
        item_features={"kind": {i * 3 - 10: 1 + i % 4 for i in range(0, 50, 2)}},
        user_features={"age": {u * 7 - 20: 1 + u % 3 for u in range(users)}},
        chunk=17,
    )


def listed(cases: Cases) -> list[tuple[int, int, int, int]]:
    """(user, start, first_label, stop) of each case."""
    columns = (cases.user, cases.start, cases.first_label, cases.stop)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def predicted(cases: Cases, shift: int) -> list[int]:
    """Store rows of what is predicted; shift 1 for retrieval, 0 for ranking."""
    return [row + shift for _, _, first, stop in listed(cases) for row in range(first, stop)]
