"""MovieLens 100K, 1M and 20M, in GroupLens' own layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec.data.cache import EventChunk, Tables
from genrec.data.readers._text import category, find, read_chunks
from genrec.data.schema import FeatureSchema
from genrec.data.store import DataError

TASKS = ["like", "love"]
"""Binary labels: rating >= 4, rating = 5."""


@dataclass
class MovieLens:
    """Ratings; action ids are the rating in stars (rounded up), labels `like` (>= 4) and `love` (= 5).

    User features, where the release has them: gender, age (in the release's groups, for 100K in tens of years),
    occupation. Item features: genres (the set of a film's genres as one id) and year.

    Args:
        path: Folder with u.data (100K), ratings.dat (1M) or ratings.csv (20M).
    """

    path: str | Path

    def files(self) -> list[Path]:
        """The ratings, then what is there of users and films."""
        ratings = find(self.path, "u.data", "ratings.dat", "ratings.csv")
        further = {"u.data": ["u.user", "u.item"], "ratings.dat": ["users.dat", "movies.dat"]}
        names = further.get(ratings.name, ["movies.csv"])
        return [ratings, *(ratings.parent / name for name in names if (ratings.parent / name).is_file())]

    def options(self) -> dict:
        """None beside the files."""
        return {}

    def total(self) -> int:
        """Bytes of the ratings."""
        return self.files()[0].stat().st_size

    def chunks(self) -> Iterator[EventChunk]:
        """The ratings in the order of the file."""
        import polars as pl

        ratings = self.files()[0]
        names = ["user", "item", "rating", "time"]
        if ratings.name == "ratings.dat":
            # "::" is read as ":" with empty columns between.
            kinds: dict = {"user": pl.Int64, "_1": pl.String, "item": pl.Int64, "_2": pl.String}
            kinds |= {"rating": pl.Float32, "_3": pl.String, "time": pl.Int64}
            frames = _double_colon(ratings, kinds)
        elif ratings.name == "u.data":
            kinds = {"user": pl.Int64, "item": pl.Int64, "rating": pl.Float32, "time": pl.Int64}
            frames = (frame for frame, _ in read_chunks(ratings, kinds, separator="\t", header=False))
        else:
            kinds = {"userId": pl.Int64, "movieId": pl.Int64, "rating": pl.Float32, "timestamp": pl.Int64}
            frames = (frame for frame, _ in read_chunks(ratings, kinds, separator=",", header=True))
            names = list(kinds)
        done, lines = 0, 1 + (ratings.suffix == ".csv")
        for frame in frames:
            user, item, rating, time = (frame[name].to_numpy() for name in names)
            if not (fits := (rating >= 0) & (rating <= 5)).all():
                wrong = int(np.argmin(fits))
                raise DataError(f"{ratings}, line {lines + wrong}: rating {rating[wrong]:g} is not in [0, 5].")
            lines += len(frame)
            done = min(self.total(), done + len(frame) * 20)
            labels = (rating >= 4) + 2 * (rating >= 5)
            yield EventChunk(user, item, time, np.ceil(rating).astype(np.int32), labels, rating, progress=done)

    def tables(self) -> Tables:
        """Users' demographics and films' genres and years."""
        tables = Tables()
        for file in self.files()[1:]:
            kind, parse, names = _PARSERS[file.name]
            lines = file.read_text(encoding="utf8" if file.suffix == ".csv" else "latin-1").rstrip("\n").split("\n")
            rows = []
            for number, line in enumerate(lines, start=1):
                if number == 1 and file.suffix == ".csv":
                    continue
                try:
                    rows.append(parse(line))
                except (ValueError, IndexError):
                    raise DataError(f"{file}, line {number}: malformed: {line[:80]!r}.") from None
            keys = np.array([row[0] for row in rows], np.int64)
            target = tables.user_features if kind == "user" else tables.item_features
            for column, name in enumerate(names, start=1):
                ids, size = category([row[column] for row in rows])
                target[name] = (keys, ids, size)
        return tables

    def schema(self, num_items: int) -> FeatureSchema:
        """Ratings as actions, two binary labels."""
        return FeatureSchema(num_items, num_actions=6, tasks=list(TASKS), has_value=True)


def _double_colon(path: Path, kinds: dict) -> Iterator:
    import polars as pl

    kept = {name: kind for name, kind in kinds.items() if not name.startswith("_")}
    loose = {name: (pl.String if name.startswith("_") else kind) for name, kind in kinds.items()}
    for frame, _ in read_chunks(path, loose, separator=":", header=False, optional=set(kinds) - set(kept)):
        yield frame.select(list(kept))


def _year(title: str) -> str:
    """The year in parentheses at the end of a title, or ''."""
    end = title.rstrip().rstrip('"')
    return end[-5:-1] if end.endswith(")") and end[-5:-1].isdigit() else ""


def _user_100k(line: str) -> tuple:
    user, age, gender, occupation, _ = line.split("|")
    return int(user), gender, f"{int(age) // 10:02d}", occupation


def _item_100k(line: str) -> tuple:
    parts = line.split("|")
    if len(parts) != 24:
        raise ValueError(line)
    return int(parts[0]), "".join(parts[5:]), parts[2][-4:]


def _user_1m(line: str) -> tuple:
    user, gender, age, occupation, _ = line.split("::")
    return int(user), gender, f"{int(age):02d}", occupation


def _item_1m(line: str) -> tuple:
    item, title, genres = line.split("::")
    return int(item), genres, _year(title)


def _item_csv(line: str) -> tuple:
    item, rest = line.split(",", 1)
    title, genres = rest.rsplit(",", 1)
    return int(item), genres, _year(title)


# File name -> (what it describes, parser of a line, names of the features after the id).
_PARSERS: dict[str, tuple[str, Callable[[str], tuple], list[str]]] = {
    "u.user": ("user", _user_100k, ["gender", "age", "occupation"]),
    "users.dat": ("user", _user_1m, ["gender", "age", "occupation"]),
    "u.item": ("item", _item_100k, ["genres", "year"]),
    "movies.dat": ("item", _item_1m, ["genres", "year"]),
    "movies.csv": ("item", _item_csv, ["genres", "year"]),
}
