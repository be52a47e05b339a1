"""A user's own table in Parquet files: one row an event, or one row a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrec.data.cache import EventChunk, Tables
from genrec.data.readers._text import Codes
from genrec.data.schema import FeatureSchema
from genrec.data.store import DataError

_BATCH_ROWS = 1 << 18


@dataclass
class ParquetTable:
    """Columns by name. Users and items may be integers or strings.

    With `layout="sequences"` each row is a user: item, timestamp, label and value columns hold lists of one length.

    Args:
        path: A Parquet file, or a folder of them, read in the order of their names.
        layout: "events" (one row an event) or "sequences" (one row a user).
        user: Column of the user.
        item: Column of the item.
        timestamp: Column of the time: integers, or a timestamp type (turned into seconds); None for data without.
        labels: Columns of the binary tasks (0 or 1, or booleans); together they are the action id.
        value: Column of a numeric value.
    """

    path: str | Path
    layout: str = "events"
    user: str = "user"
    item: str = "item"
    timestamp: str | None = "timestamp"
    labels: list[str] = field(default_factory=list)
    value: str | None = None
    _users: Codes = field(default_factory=Codes, repr=False)
    _items: Codes = field(default_factory=Codes, repr=False)

    def files(self) -> list[Path]:
        """The Parquet files."""
        path = Path(self.path).expanduser()
        if not path.exists():
            raise DataError(f"{path} does not exist: set data.path to a Parquet file or a folder of them.")
        found = [path] if path.is_file() else sorted(path.glob("*.parquet"))
        if not found:
            raise DataError(f"{path} holds no *.parquet.")
        return found

    def options(self) -> dict:
        """Layout and columns."""
        return {
            "layout": self.layout, "user": self.user, "item": self.item, "timestamp": self.timestamp,
            "labels": list(self.labels), "value": self.value,
        }  # fmt: skip

    def total(self) -> int:
        """Rows of all files."""
        return sum(_open(file).metadata.num_rows for file in self.files())

    def chunks(self) -> Iterator[EventChunk]:
        """The rows, flattened to events."""
        if self.layout not in ("events", "sequences"):
            raise ValueError(f"layout must be 'events' or 'sequences', got '{self.layout}'.")
        if len(self.labels) > 20:
            raise ValueError(f"At most 20 label columns make one action id, got {len(self.labels)}.")
        self._users, self._items = Codes(), Codes()
        wanted = [self.user, self.item, *([self.timestamp] if self.timestamp else []), *self.labels]
        wanted += [self.value] if self.value else []
        done = 0
        kinds: dict[str, Any] = {}
        for path in self.files():
            file = _open(path)
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path} has no column {', '.join(missing)}; it has {file.schema_arrow.names}.")
            for name in (self.user, self.item):
                kind = file.schema_arrow.field(name).type
                if kinds.setdefault(name, kind) != kind:
                    raise DataError(f"{path}, column {name} is of type {kind}, in the files before of {kinds[name]}.")
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                done += batch.num_rows
                columns = {name: batch.column(name) for name in wanted}
                yield self._chunk(columns if self.layout == "events" else self._flatten(columns, path), path, done)

    def _flatten(self, columns: dict[str, Any], path: Path) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.compute as pc

        lists = {name: column for name, column in columns.items() if name != self.user}
        for name, column in lists.items():
            if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
                raise DataError(f"{path}, column {name}: layout 'sequences' needs lists, found {column.type}.")
            if column.null_count:
                raise DataError(f"{path}, column {name}: {column.null_count} missing lists.")
        lengths = pc.list_value_length(lists[self.item])
        for name, column in lists.items():
            if not pc.list_value_length(column).equals(lengths):
                raise DataError(f"{path}, column {name}: its lists are not as long as those of {self.item}.")
        repeated = columns[self.user].take(pc.list_parent_indices(lists[self.item]))
        return {self.user: repeated, **{name: pc.list_flatten(column) for name, column in lists.items()}}

    def _chunk(self, columns: dict[str, Any], path: Path, done: int) -> EventChunk:
        for name, column in columns.items():
            if column.null_count:
                raise DataError(f"{path}, column {name}: {column.null_count} missing values.")
        bits = None
        for bit, name in enumerate(self.labels):
            label = self._numbers(columns[name], name, path) > 0
            bits = (label.astype(np.int64) << bit) + (0 if bits is None else bits)
        return EventChunk(
            user=self._ids(columns[self.user], self._users, self.user, path),
            item=self._ids(columns[self.item], self._items, self.item, path),
            timestamp=None if self.timestamp is None else self._times(columns[self.timestamp], path),
            action=bits,
            labels=bits,
            value=None if self.value is None else self._numbers(columns[self.value], self.value, path),
            progress=done,
        )

    def _ids(self, column: Any, codes: Codes, name: str, path: Path) -> np.ndarray:
        import polars as pl
        import pyarrow as pa

        if pa.types.is_integer(column.type):
            return column.to_numpy(zero_copy_only=False).astype(np.int64)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return codes.encode(pl.Series(name, column))
        raise DataError(f"{path}, column {name}: ids must be integers or strings, found {column.type}.")

    def _times(self, column: Any, path: Path) -> np.ndarray:
        import pyarrow as pa

        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        if not pa.types.is_integer(column.type):
            raise DataError(
                f"{path}, column {self.timestamp}: times must be integers or timestamps, not {column.type}."
            )
        return column.to_numpy(zero_copy_only=False).astype(np.int64)

    def _numbers(self, column: Any, name: str, path: Path) -> np.ndarray:
        import pyarrow as pa

        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"{path}, column {name}: expected numbers or booleans, found {kind}.")
        return column.to_numpy(zero_copy_only=False).astype(np.float64)

    def tables(self) -> Tables:
        """Names of string ids."""
        return Tables(
            item_names=self._items.names() if self._items.codes else None,
            user_names=self._users.names() if self._users.codes else None,
        )

    def schema(self, num_items: int) -> FeatureSchema:
        """As the columns say."""
        return FeatureSchema(
            num_items,
            num_actions=1 << len(self.labels) if self.labels else 0,
            tasks=list(self.labels),
            has_value=self.value is not None,
            has_timestamps=self.timestamp is not None,
        )


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}.") from None
