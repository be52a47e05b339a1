"""From a reader's stream of events to an `EventStore` on disk, in memory that does not grow with the events.

Chunks are appended to partitions by user; each partition is sorted by user and time; then the partitions are merged,
some users at a time, into the final columns. The folder is made aside and then renamed, so that a partial one is never
taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from genrec.data.schema import FeatureSchema
from genrec.data.store import FORMAT_VERSION, MANIFEST, DataError, EventStore, save_manifest

TieBreak = Literal["input", "item"]

_PARTITIONS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)
_OPTIONAL = {"timestamp": np.int64, "action": np.int32, "labels": np.uint32, "value": np.float32}


@dataclass
class EventChunk:
    """Some events in input order. Users and items are raw int64 ids; the other columns may be missing.

    Attributes:
        user, item: (n,) int64.
        timestamp: (n,) int64.
        action: (n,) action ids.
        labels: (n,) bits of the tasks.
        value: (n,) float.
        known: (n, tasks) true probabilities of a synthetic set.
        progress: How far through the input this chunk reaches, in the unit of `Reader.total`.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    timestamp: NDArray[np.int64] | None = None
    action: NDArray | None = None
    labels: NDArray | None = None
    value: NDArray | None = None
    known: NDArray | None = None
    progress: int = 0


@dataclass
class Tables:
    """What a reader knows of items and users beside the events, by raw id.

    Attributes:
        item_features: name -> (raw item ids, feature ids, number of feature ids).
        user_features: name -> (raw user ids, feature ids, number of feature ids).
        item_names: Item names by raw id (a code), for inputs whose ids are strings.
        user_names: User names by raw id (a code).
    """

    item_features: dict[str, tuple[NDArray, NDArray, int]] = field(default_factory=dict)
    user_features: dict[str, tuple[NDArray, NDArray, int]] = field(default_factory=dict)
    item_names: list[str] | None = None
    user_names: list[str] | None = None


class Reader(Protocol):
    """A source of events. Its dataclass fields are its options and part of the cache's key."""

    def files(self) -> list[Path]:
        """The input files; none for generated data.

        Raises:
            DataError: One is missing.
        """
        ...

    def options(self) -> dict:
        """What else decides the result: plain values."""
        ...

    def total(self) -> int:
        """Size of the input for the progress bar, in the unit of `EventChunk.progress`."""
        ...

    def chunks(self) -> Iterator[EventChunk]:
        """The events, in input order.

        Raises:
            DataError: Malformed input.
        """
        ...

    def tables(self) -> Tables:
        """Item and user features; asked for after the last chunk."""
        ...

    def schema(self, num_items: int) -> FeatureSchema:
        """The schema, once the items are counted (the features' sizes are filled in by the builder)."""
        ...


def prepare(
    reader: Reader,
    cache_dir: str | Path | None = None,
    *,
    tie_break: TieBreak = "input",
    remap_items: bool = True,
    progress: bool = True,
) -> EventStore:
    """The store of a reader's data: opened where it was prepared before, else prepared now.

    Args:
        reader: Where events come from.
        cache_dir: Folder of prepared data; None: the environment variable GENREC_CACHE, else ~/.cache/genrec.
        tie_break: Order of one user's events at the same time: "input" (the order of the input, stable) or "item"
            (ascending raw item id; of string ids, the order in which they first appear). "item" needs times.
        remap_items: Give items ids 0 .. V - 1 in the order of their raw ids. False keeps raw ids (for tables that take
            any id); item features, which are looked up by item id, are then left out.
        progress: Show a progress bar while preparing.

    Raises:
        DataError: Missing or malformed input; nothing is left behind.
        ValueError: tie_break "item" for data without times, or another name.
    """
    root = Path(cache_dir or os.environ.get("GENREC_CACHE") or Path.home() / ".cache" / "genrec").expanduser()
    source = {
        "reader": type(reader).__name__,
        "options": reader.options(),
        "files": [_fingerprint(file) for file in reader.files()],
        "tie_break": tie_break,
        "remap_items": remap_items,
        "format": FORMAT_VERSION,
    }
    key = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()[:20]
    final = root / f"{type(reader).__name__.lower()}-{key}"
    if not (final / MANIFEST).exists():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=root))
        try:
            _Builder(reader, work, tie_break, remap_items, progress).run(json.loads(json.dumps(source, default=str)))
            _move(work, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return EventStore.open(final)


def _move(work: Path, final: Path) -> None:
    """Rename into place; another process that prepared the same meanwhile has done the work already."""
    try:
        work.rename(final)
    except OSError:
        if not (final / MANIFEST).exists():
            raise


def _fingerprint(file: Path) -> list:
    """Name, size and a hash of the content; of large files the time of change and both ends instead of all of it."""
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if size <= 1 << 28:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            digest.update(str(file.stat().st_mtime_ns).encode())
            digest.update(stream.read(1 << 20))
            stream.seek(-(1 << 20), os.SEEK_END)
            digest.update(stream.read())
    return [file.name, size, digest.hexdigest()]


class _Builder:
    """One preparation."""

    def __init__(self, reader: Reader, work: Path, tie_break: str, remap_items: bool, progress: bool) -> None:
        if tie_break not in ("input", "item"):
            raise ValueError(f"tie_break must be 'input' or 'item', got '{tie_break}'.")
        self.reader, self.work, self.tie_break, self.remap = reader, work, tie_break, remap_items
        self.progress = progress
        self.columns: list[str] | None = None
        self.num_known = 0
        self.items = np.empty(0, np.int64)
        self.new_items: list[NDArray[np.int64]] = []
        self.largest_item = -1

    def run(self, source: dict) -> None:
        partitions = self.work / "partitions"
        partitions.mkdir()
        self._scatter(partitions)
        found = self._sort(partitions)
        users, sizes = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(users)
        user_keys = users[order]
        offsets = np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)
        tables = self.reader.tables()
        self._write(partitions, found, user_keys, offsets)
        shutil.rmtree(partitions)
        saved = self._finish(tables, user_keys, offsets)
        num_items = len(self.items) if self.remap else self.largest_item + 1
        schema = self.reader.schema(num_items)
        if self.remap:
            schema.side_features.update({name: size for name, (_, _, size) in tables.item_features.items()})
        schema.contextual_features.update({name: size for name, (_, _, size) in tables.user_features.items()})
        save_manifest(self.work, schema, [*self._event_columns(), *saved], source)

    def _event_columns(self) -> list[str]:
        return ["item", *(self.columns or []), *(["known"] if self.num_known else [])]

    def _record(self) -> np.dtype:
        fields: list[tuple] = [("user", np.int64), ("item", np.int64)]
        fields += [(name, _OPTIONAL[name]) for name in self.columns or []]
        if self.num_known:
            fields.append(("known", np.float32, (self.num_known,)))
        return np.dtype(fields)

    def _scatter(self, partitions: Path) -> None:
        """Append each event to the partition of its user."""
        events = 0
        files = [(partitions / f"{number}.bin").open("wb") for number in range(_PARTITIONS)]
        bar = self._bar(self.reader.total(), "reading")
        try:
            for chunk in self.reader.chunks():
                records = self._records(chunk)
                # Mixed, so that ids in steps of 64 don't fall into one partition.
                owner = (records["user"].view(np.uint64) * _MIX >> np.uint64(32)) % np.uint64(_PARTITIONS)
                order = np.argsort(owner, kind="stable")
                records, bounds = records[order], np.searchsorted(owner[order], np.arange(_PARTITIONS + 1))
                for number in range(_PARTITIONS):
                    records[bounds[number] : bounds[number + 1]].tofile(files[number])
                events += len(records)
                bar.update(max(0, chunk.progress - bar.n))
        finally:
            bar.close()
            for file in files:
                file.close()
        if not events:
            raise DataError(f"{type(self.reader).__name__}: the input has no events.")
        self._merge_items()

    def _records(self, chunk: EventChunk) -> NDArray:
        if self.columns is None:
            self.columns = [name for name in _OPTIONAL if getattr(chunk, name) is not None]
            self.num_known = 0 if chunk.known is None else chunk.known.shape[1]
            if self.tie_break == "item" and "timestamp" not in self.columns:
                raise ValueError("tie_break='item' needs timestamps, and the data has none: use tie_break='input'.")
        present = [name for name in _OPTIONAL if getattr(chunk, name) is not None]
        if present != self.columns:
            raise DataError(
                f"{type(self.reader).__name__}: the first chunk has the columns {self.columns}, a later one {present}."
            )
        records = np.empty(len(chunk.user), self._record())
        for name in self._record().names or ():
            records[name] = getattr(chunk, name)
        if self.remap:
            self.new_items.append(np.unique(chunk.item))
            # Merged only when they have become many: else each chunk would sort all items again.
            if sum(map(len, self.new_items)) > max(len(self.items), 1 << 20):
                self._merge_items()
        elif len(chunk.item):
            self.largest_item = max(self.largest_item, int(chunk.item.max()))
        return records

    def _merge_items(self) -> None:
        self.items = np.unique(np.concatenate([self.items, *self.new_items]))
        self.new_items = []

    def _sort(self, partitions: Path) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Sort each partition by user and time, in its file. Returns the users and the number of events of each."""
        found = []
        for number in range(_PARTITIONS):
            records = np.fromfile(partitions / f"{number}.bin", self._record())
            keys: list[NDArray] = [records["item"]] if self.tie_break == "item" else []
            if "timestamp" in (self.columns or []):
                keys.append(records["timestamp"])
            records = records[np.lexsort([*keys, records["user"]])]
            records.tofile(partitions / f"{number}.bin")
            found.append(np.unique(records["user"], return_counts=True))
        return found

    def _write(
        self, partitions: Path, found: list[tuple[NDArray, NDArray]], user_keys: NDArray, offsets: NDArray
    ) -> None:
        """Merge the partitions, some users at a time in the order of their ids, into the columns.

        The columns are written from front to back: neither memory nor the disk's seeks grow with the events.
        """
        total = int(offsets[-1])
        ends = np.searchsorted(offsets, np.linspace(0, total, _PARTITIONS + 1)[1:]).tolist()
        starts = [np.concatenate([[0], np.cumsum(sizes)]) for _, sizes in found]
        bar = self._bar(total, "writing")
        with ExitStack() as stack:
            out = {name: stack.enter_context(self._column(name, total)) for name in self._event_columns()}
            first = 0
            for last in ends:
                if last == first:
                    continue
                records = self._slice(partitions, found, starts, user_keys[first], user_keys[last - 1])
                for name, file in out.items():
                    column = records[name]
                    values = np.searchsorted(self.items, column) if name == "item" and self.remap else column
                    values.astype(self._kind(name)).tofile(file)
                bar.update(len(records))
                first = last
        bar.close()

    def _slice(
        self, partitions: Path, found: list[tuple[NDArray, NDArray]], starts: list[NDArray], low: int, high: int
    ) -> NDArray:
        """The events of the users from `low` to `high`, in the order of the users."""
        parts = []
        for number, (users, _) in enumerate(found):
            begin = starts[number][np.searchsorted(users, low)]
            end = starts[number][np.searchsorted(users, high, side="right")]
            size = self._record().itemsize
            parts.append(
                np.fromfile(partitions / f"{number}.bin", self._record(), int(end - begin), offset=int(begin) * size)
            )
        records = np.concatenate(parts)
        # Each user is in one partition, in order there already.
        return records[np.argsort(records["user"], kind="stable")]

    def _column(self, name: str, rows: int) -> BinaryIO:
        """A new .npy file whose header is written."""
        shape = (rows, self.num_known) if name == "known" else (rows,)
        file = (self.work / f"{name}.npy").open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._kind(name)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def _bar(self, total: int, words: str) -> tqdm:
        return tqdm(total=total, desc=words, unit_scale=True, disable=None if self.progress else True, leave=False)

    def _kind(self, name: str) -> np.dtype:
        if name == "item":
            return np.dtype(np.int32 if self.remap and len(self.items) < 2**31 else np.int64)
        return np.dtype(np.float32 if name == "known" else _OPTIONAL[name])

    def _finish(self, tables: Tables, user_keys: NDArray, offsets: NDArray) -> list[str]:
        """The small columns: users, items and their features. Returns the features' names."""
        item_keys = self.items if self.remap else np.empty(0, np.int64)
        np.save(self.work / "offsets.npy", offsets)
        np.save(self.work / "user_keys.npy", user_keys)
        np.save(self.work / "item_keys.npy", item_keys)
        for kind, names in (("user", tables.user_names), ("item", tables.item_names)):
            if names is not None:
                (self.work / f"{kind}_names.json").write_text(json.dumps(names))
        saved = []
        for prefix, keys, features in (
            ("item_feature", item_keys, tables.item_features if self.remap else {}),
            ("user_feature", user_keys, tables.user_features),
        ):
            for name, (raw, ids, _) in features.items():
                np.save(self.work / f"{prefix}.{name}.npy", _aligned(keys, raw, ids))
                saved.append(f"{prefix}.{name}")
        return saved


def _aligned(keys: NDArray, raw: NDArray, ids: NDArray) -> NDArray[np.int32]:
    """The feature id of each key, 0 (unknown) for keys that `raw` lacks."""
    order = np.argsort(raw)
    raw, ids = raw[order], ids[order]
    place = np.searchsorted(raw, keys).clip(max=max(len(raw) - 1, 0))
    found = raw[place] == keys if len(raw) else np.zeros(len(keys), bool)
    return np.where(found, ids[place] if len(raw) else 0, 0).astype(np.int32)
