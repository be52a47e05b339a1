"""`HkvTable`: one dynamic table (or one rank's share of it) and its operations on batches of keys."""

from __future__ import annotations

from ctypes import byref, c_int64
from typing import Any

import torch
from torch import Tensor

from genrec.embedding.hkv import _binding
from genrec.embedding.hkv._binding import COUNT, INSERT, TOUCH, UPDATE
from genrec.embedding.hkv.core import MAX_STEP, HkvOverflowError, Lookup, TableCore, pointer

__all__ = ["HkvOverflowError", "HkvTable", "Lookup"]


class HkvTable(TableCore):
    """A table from int64 keys to rows, which appear on first use and leave by score when the table is full.

    Args:
        config: The table; `backend` must be "hkv".
        seed: With the table's name and the key it decides how a row starts.
        world_size: The table is one of this many equal shares: its capacity is divided by it.

    Raises:
        ValueError: The config is not one of a dynamic table, or its options are wrong.
        NativeLibraryError: The engine is not installed.
    """

    def find_or_insert(self, keys: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((n, dim) rows, (n,) bool whether the key was there). Absent keys enter with their initial row."""
        keys = self.check_keys(keys)
        lookup = self.lookup(keys, INSERT | TOUCH | UPDATE | COUNT, scores, want_rows=True, want_found=True)
        assert lookup.rows_at is not None
        assert lookup.found is not None
        return self.gather(lookup.rows_at, keys), lookup.found

    def insert_or_assign(
        self, keys: Tensor, weights: Tensor, scores: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        """Give keys their rows, present or not; the last of equal keys counts.

        Args:
            keys: (n,).
            weights: (n, dim).
            scores: (n,) for score "custom".
            state: (n, state_dim) optimizer state; without it new rows start from zero, others keep theirs.

        Returns:
            (n,) bool: the key was there before.
        """
        lookup = self.lookup(keys, INSERT | TOUCH | UPDATE, scores, want_rows=True, want_found=True)
        assert lookup.rows_at is not None
        assert lookup.found is not None
        self.write_rows(lookup.rows_at, weights, state)
        return lookup.found

    def insert_and_evict(
        self, keys: Tensor, weights: Tensor, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`insert_or_assign` that returns what had to leave: (m,) keys, (m, dim) rows, (m,) scores.

        Raises:
            ValueError: The table doesn't record what it evicts.
        """
        self.insert_or_assign(keys, weights, scores)
        evicted = self.pop_evicted()
        return evicted["keys"], evicted["weights"], evicted["scores"]

    def assign(self, keys: Tensor, weights: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """Overwrite rows or scores of the keys that are there; (n,) bool says which. Others are ignored."""
        lookup = self.lookup(keys, UPDATE if weights is not None else 0, scores, want_rows=True)
        assert lookup.rows_at is not None
        if weights is not None:
            self.write_rows(lookup.rows_at, weights)
        return lookup.rows_at >= 0

    def accum(self, keys: Tensor, deltas: Tensor) -> Tensor:
        """Add (n, dim) to the rows of the keys that are there; (n,) bool says which. Others are ignored."""
        deltas = self._check_rows(deltas, keys.numel(), self.config.dim)
        lookup = self.lookup(keys, UPDATE, want_rows=True)
        assert lookup.rows_at is not None
        _binding.call(
            "accumulate", self._handle, lookup.rows.data_ptr(), lookup.offsets.data_ptr(), lookup.positions.data_ptr(),
            lookup.unique, deltas.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return lookup.rows_at >= 0

    def erase(self, keys: Tensor) -> int:
        """Remove keys; the number that were there."""
        keys, erased = self.check_keys(keys), c_int64()
        _binding.call("erase", self._handle, keys.data_ptr(), keys.numel(), byref(erased))
        return erased.value

    def erase_if(
        self,
        min_score: int = 0,
        max_score: int = 2**64 - 1,
        min_step: int = 0,
        max_step: int = MAX_STEP,
    ) -> int:
        """Remove the keys whose score and last step lie in these closed ranges; their number."""
        erased = c_int64()
        _binding.call("erase_if", self._handle, min_score, max_score, min_step, max_step, byref(erased))
        return erased.value

    def clear(self) -> None:
        """Remove every key, counter and unfetched evicted row."""
        _binding.call("clear", self._handle)

    def reserve(self, rows: int) -> None:
        """Grow, as far as the capacity allows, until `rows` rows fit under the load factor."""
        _binding.call("reserve", self._handle, rows, torch.get_num_threads())

    def read_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """((n, dim) weights, (n, state_dim) optimizer state) of row numbers; zeros for -1."""
        weights, state = torch.zeros(rows.numel(), self.config.dim), torch.zeros(rows.numel(), self.state_dim)
        _binding.call(
            "read_rows", self._handle, rows.data_ptr(), rows.numel(), torch.get_num_threads(), weights.data_ptr(),
            state.data_ptr(),
        )  # fmt: skip
        return weights, state

    def write_rows(self, rows: Tensor, weights: Tensor | None, state: Tensor | None = None) -> None:
        """Overwrite rows by number; -1 is skipped, and the last of equal numbers counts."""
        if weights is not None:
            weights = self._check_rows(weights, rows.numel(), self.config.dim)
        if state is not None:
            state = self._check_rows(state, rows.numel(), self.state_dim)
        _binding.call(
            "write_rows", self._handle, rows.data_ptr(), rows.numel(), pointer(weights), pointer(state)
        )  # fmt: skip

    def export(self, since_step: int = 0, min_score: int = 0) -> dict[str, Tensor]:
        """Keys (m,), weights (m, dim), state (m, state_dim), scores, steps and updates (m,), sorted by mixed key.

        Args:
            since_step: Only rows updated after this step, where it is not 0.
            min_score: Only rows of this score or more.
        """
        from genrec.embedding.hkv.state import export_meta

        meta = export_meta(self, since_step + 1 if since_step else 0, min_score)
        weights, state = self.read_rows(meta.pop("rows"))
        return {"keys": meta.pop("keys"), "weights": weights, "state": state, **meta}

    def pop_evicted(self) -> dict[str, Tensor]:
        """Rows evicted since the last call: keys (m,), scores (m,), weights (m, dim), state (m, state_dim).

        Raises:
            ValueError: The table's option `record_evicted` is off.
        """
        if not self.options.record_evicted:
            raise ValueError(f"Table '{self.config.name}' doesn't record evicted rows: set record_evicted: true.")
        n = int(self.info(False).pending_evicted)
        columns = {
            "keys": torch.empty(n, dtype=torch.int64),
            "scores": torch.empty(n, dtype=torch.int64),
            "weights": torch.empty(n, self.config.dim),
            "state": torch.empty(n, self.state_dim),
        }
        _binding.call("pop_evicted", self._handle, n, *(column.data_ptr() for column in columns.values()))
        return columns

    def __reduce__(self) -> Any:
        from genrec.embedding.hkv.state import rebuild_table, table_state

        return rebuild_table, (self.config, self.seed, self.world_size, table_state(self))
