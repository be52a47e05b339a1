"""Amazon reviews: `user item item ...` lines in time order, or `user,item,rating,timestamp` with a k-core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from genrec.data.cache import EventChunk, Tables
from genrec.data.readers._text import Codes, read_chunks
from genrec.data.schema import FeatureSchema
from genrec.data.store import DataError

_CHUNK_EVENTS = 1 << 20


@dataclass
class AmazonSequences:
    """One user a line: `user item item ...`, integers, oldest first, without times (the S3-Rec releases).

    Args:
        path: The text file, or a folder that holds exactly one *.txt.
    """

    path: str | Path

    def files(self) -> list[Path]:
        """The text file."""
        return [_one_file(self.path, "*.txt")]

    def options(self) -> dict:
        """None beside the file."""
        return {}

    def total(self) -> int:
        """Bytes of the file."""
        return self.files()[0].stat().st_size

    def chunks(self) -> Iterator[EventChunk]:
        """The lines' events."""
        file = self.files()[0]
        users: list[NDArray] = []
        items: list[NDArray] = []
        done, waiting = 0, 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                done += len(line)
                if not line.strip():
                    continue
                try:
                    ids = np.array(line.split(), np.int64)
                except (ValueError, OverflowError):
                    raise DataError(f"{file}, line {number}: expected integers `user item item ...`.") from None
                if len(ids) < 2:
                    raise DataError(f"{file}, line {number}: a user without items.")
                users.append(np.full(len(ids) - 1, ids[0]))
                items.append(ids[1:])
                waiting += len(ids) - 1
                if waiting >= _CHUNK_EVENTS:
                    yield EventChunk(np.concatenate(users), np.concatenate(items), progress=done)
                    users, items, waiting = [], [], 0
        if users:
            yield EventChunk(np.concatenate(users), np.concatenate(items), progress=done)

    def tables(self) -> Tables:
        """Nothing beside the events."""
        return Tables()

    def schema(self, num_items: int) -> FeatureSchema:
        """Items alone."""
        return FeatureSchema(num_items, has_timestamps=False)


@dataclass
class AmazonRatings:
    """`user,item,rating,timestamp` without a header (the SNAP ratings files), with a k-core.

    Args:
        path: The csv file, or a folder that holds exactly one *.csv.
        min_count: k: users and items with fewer ratings are left out.
        core: "iterative" (until all that are left have k) or "once" (counted on the raw data, users counted once more
            afterwards, as in the HSTU paper's preprocessing).
    """

    path: str | Path
    min_count: int = 5
    core: Literal["iterative", "once"] = "iterative"
    _users: Codes = field(default_factory=Codes, repr=False)
    _items: Codes = field(default_factory=Codes, repr=False)

    def files(self) -> list[Path]:
        """The csv file."""
        return [_one_file(self.path, "*.csv")]

    def options(self) -> dict:
        """The k-core."""
        return {"min_count": self.min_count, "core": self.core}

    def total(self) -> int:
        """Bytes of the file."""
        return self.files()[0].stat().st_size

    def chunks(self) -> Iterator[EventChunk]:
        """The ratings that the k-core keeps, in the order of the file."""
        import polars as pl

        if self.core not in ("iterative", "once"):
            raise ValueError(f"core must be 'iterative' or 'once', got '{self.core}'.")
        self._users, self._items = Codes(), Codes()
        kinds = {"user": pl.String, "item": pl.String, "rating": pl.Float32, "timestamp": pl.Int64}
        columns: list[list[NDArray]] = [[], [], [], []]
        for frame, _ in read_chunks(self.files()[0], kinds, separator=",", header=False):
            columns[0].append(self._users.encode(frame["user"]))
            columns[1].append(self._items.encode(frame["item"]))
            columns[2].append(frame["rating"].to_numpy())
            columns[3].append(frame["timestamp"].to_numpy())
        user, item, rating, time = (np.concatenate(parts) for parts in columns)
        kept = np.flatnonzero(k_core(user, item, self.min_count, self.core))
        for start in range(0, len(kept), _CHUNK_EVENTS):
            rows = kept[start : start + _CHUNK_EVENTS]
            done = self.total() * (start + len(rows)) // len(kept)
            yield EventChunk(user[rows], item[rows], time[rows], value=rating[rows], progress=done)

    def tables(self) -> Tables:
        """Names of users and items."""
        return Tables(item_names=self._items.names(), user_names=self._users.names())

    def schema(self, num_items: int) -> FeatureSchema:
        """Items with times and ratings."""
        return FeatureSchema(num_items, has_value=True)


def k_core(user: NDArray, item: NDArray, k: int, core: str = "iterative") -> NDArray[np.bool_]:
    """Which interactions are left when users and items with fewer than k are dropped.

    Args:
        user, item: (n,) codes from 0.
        k: Least number of interactions.
        core: "iterative", or "once": items and users counted on the raw data, then users again.
    """
    kept = np.ones(len(user), bool)
    if core == "once":
        kept &= (np.bincount(item)[item] >= k) & (np.bincount(user)[user] >= k)
        return kept & (np.bincount(user[kept], minlength=user.max(initial=0) + 1)[user] >= k)
    while True:
        users = np.bincount(user[kept], minlength=user.max(initial=0) + 1)
        items = np.bincount(item[kept], minlength=item.max(initial=0) + 1)
        left = kept & (users[user] >= k) & (items[item] >= k)
        if left.sum() == kept.sum():
            return kept
        kept = left


def _one_file(path: str | Path, pattern: str) -> Path:
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path} does not exist: set data.path to the {pattern} file or its folder.")
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{path} holds {len(found)} files {pattern}, expected one: set data.path to the file itself.")
    return found[0]
