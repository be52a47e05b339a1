"""KuaiRand (pure, 1K, 27K): logs of short-video feeds with eight kinds of feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from genrec.data.cache import EventChunk, Tables
from genrec.data.readers._text import category, read_chunks
from genrec.data.schema import FeatureSchema
from genrec.data.store import DataError

ACTIONS = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter"]
"""The feedback columns in the order of their bits: 1, 2, 4, ..., 128."""

_USER_FEATURES = [
    "user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
    "register_days_range",
]  # fmt: skip
_VIDEO_FEATURES = ["video_type", "upload_type", "tag"]


@dataclass
class KuaiRand:
    """The standard log, sorted by time for each user; the action id is the mask of the eight feedback bits.

    Args:
        path: Folder with log_standard_*.csv, user_features_*.csv and video_features_basic_*.csv (its `data` folder).
        random_log: Read log_random_*.csv too.
    """

    path: str | Path
    random_log: bool = False

    def files(self) -> list[Path]:
        """The logs, then what there is of users and videos."""
        return [*self._logs(), *self._features("user_features_*.csv"), *self._features("video_features_basic_*.csv")]

    def _logs(self) -> list[Path]:
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: set data.path to KuaiRand's `data` folder.")
        logs = sorted(folder.glob("log_standard_*.csv"))
        if not logs:
            raise DataError(f"{folder} holds no log_standard_*.csv.")
        return logs + (sorted(folder.glob("log_random_*.csv")) if self.random_log else [])

    def _features(self, pattern: str) -> list[Path]:
        return sorted(Path(self.path).expanduser().glob(pattern))

    def options(self) -> dict:
        """Whether the random log is in."""
        return {"random_log": self.random_log}

    def total(self) -> int:
        """Bytes of the logs."""
        return sum(file.stat().st_size for file in self._logs())

    def chunks(self) -> Iterator[EventChunk]:
        """The log lines; play time in milliseconds is the value."""
        import polars as pl

        kinds = dict.fromkeys(["user_id", "video_id", "time_ms", "play_time_ms", *ACTIONS], pl.Int64)
        before = 0
        for file in self._logs():
            size = file.stat().st_size
            bytes_a_line = 0.0
            for frame, lines in read_chunks(file, kinds, separator=",", header=True):
                bytes_a_line = bytes_a_line or min(100.0, size / max(lines, 1))
                bits = sum((frame[name].to_numpy() > 0).astype(np.int32) << bit for bit, name in enumerate(ACTIONS))
                yield EventChunk(
                    user=frame["user_id"].to_numpy(),
                    item=frame["video_id"].to_numpy(),
                    timestamp=frame["time_ms"].to_numpy() // 1000,
                    action=bits,
                    labels=bits,
                    value=frame["play_time_ms"].to_numpy(),
                    progress=before + min(size, int(lines * bytes_a_line)),
                )
            before += size

    def tables(self) -> Tables:
        """User and video features: columns of the feature files as categories."""
        tables = Tables()
        for pattern, key, names, target in (
            ("user_features_*.csv", "user_id", _USER_FEATURES, tables.user_features),
            ("video_features_basic_*.csv", "video_id", _VIDEO_FEATURES, tables.item_features),
        ):
            for name, column in self._columns(pattern, key, names).items():
                target[name] = column
        return tables

    def _columns(self, pattern: str, key: str, names: list[str]) -> dict:
        import polars as pl

        files = self._features(pattern)
        if not files:
            return {}
        kinds = {key: pl.Int64, **dict.fromkeys(names, pl.String)}
        read = partial(read_chunks, columns=kinds, separator=",", header=True, optional=names)
        parts = [frame for file in files for frame, _ in read(file)]
        frame = pl.concat(parts).unique(key, keep="first", maintain_order=True)
        keys = frame[key].to_numpy()
        return {name: (keys, *category(frame[name].to_list())) for name in names}

    def schema(self, num_items: int) -> FeatureSchema:
        """Eight binary tasks; the action id is their mask."""
        return FeatureSchema(num_items, num_actions=256, tasks=list(ACTIONS), has_value=True)
