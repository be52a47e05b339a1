"""`EventStore`: a prepared data set as memory-mapped columns, sorted by user and time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genrec.data.schema import FeatureSchema

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DataError(ValueError):
    """Input that is missing or malformed; the message names the file, and the line or column."""


@dataclass
class EventStore:
    """E events of U users; events of user u are rows [offsets[u], offsets[u + 1]), oldest first.

    Columns are memory-mapped: reading a user touches only that user's rows.

    Attributes:
        schema: What the columns mean.
        offsets: (U + 1,) int64.
        user_keys: (U,) int64, the users' raw ids, or codes into `user_names`.
        item_keys: (V,) int64, raw id of each item id; of length 0 where items keep their raw ids.
        item: (E,) item ids.
        timestamp: (E,) int64, or None.
        action: (E,) action ids, or None.
        labels: (E,) uint32, bit k is task k, or None.
        value: (E,) float32, or None.
        item_features: name -> (V,) int32.
        user_features: name -> (U,) int32.
        known: Probabilities by which a synthetic label was drawn, (E, tasks) float32; None for real data.
        path: Folder of the files.
    """

    schema: FeatureSchema
    offsets: NDArray[np.int64]
    user_keys: NDArray[np.int64]
    item_keys: NDArray[np.int64]
    item: NDArray
    timestamp: NDArray[np.int64] | None
    action: NDArray | None
    labels: NDArray[np.uint32] | None
    value: NDArray[np.float32] | None
    item_features: dict[str, NDArray[np.int32]]
    user_features: dict[str, NDArray[np.int32]]
    known: NDArray[np.float32] | None = None
    path: Path | None = None

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        """E."""
        return int(self.offsets[-1])

    def item_counts(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """(V,) how often each item occurs, in all events or in those of `rows`."""
        items = self.item if rows is None else self.item[rows]
        return np.bincount(items, minlength=self.schema.num_items)

    @classmethod
    def open(cls, path: Path) -> EventStore:
        """The store in a folder that `save_manifest` closed.

        Raises:
            DataError: There is none, or it is of another format version.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except FileNotFoundError:
            raise DataError(f"{path} holds no prepared data (no {MANIFEST}).") from None
        if manifest["version"] != FORMAT_VERSION:
            raise DataError(f"{path} is of format {manifest['version']}, expected {FORMAT_VERSION}: delete the folder.")
        names = set(manifest["columns"])

        def column(name: str) -> NDArray | None:
            return np.load(path / f"{name}.npy", mmap_mode="r") if name in names else None

        def group(prefix: str) -> dict[str, NDArray]:
            picked = [name for name in sorted(names) if name.startswith(f"{prefix}.")]
            return {name.removeprefix(f"{prefix}."): np.load(path / f"{name}.npy") for name in picked}

        return cls(
            schema=FeatureSchema(**manifest["schema"]),
            offsets=np.load(path / "offsets.npy"),
            user_keys=np.load(path / "user_keys.npy"),
            item_keys=np.load(path / "item_keys.npy"),
            item=np.load(path / "item.npy", mmap_mode="r"),
            timestamp=column("timestamp"),
            action=column("action"),
            labels=column("labels"),
            value=column("value"),
            item_features=group("item_feature"),
            user_features=group("user_feature"),
            known=column("known"),
            path=path,
        )

    def names(self, kind: str) -> list[str] | None:
        """Raw names of the users ("user") or items ("item") where those are strings, by code; else None."""
        file = None if self.path is None else self.path / f"{kind}_names.json"
        return json.loads(file.read_text()) if file is not None and file.exists() else None


def save_manifest(path: Path, schema: FeatureSchema, columns: list[str], source: dict) -> None:
    """Close a folder of columns: with its manifest it is a whole store."""
    manifest = {"version": FORMAT_VERSION, "schema": asdict(schema), "columns": columns, "source": source}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
