"""`TableCore`: the engine's handle, its lookups and updates, and the batches in flight."""

from __future__ import annotations

import bisect
import ctypes
import time
import warnings
import weakref
from ctypes import byref
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv import _binding
from genrec.embedding.hkv._binding import ADMIT, COUNT, INSERT, TOUCH, UPDATE
from genrec.embedding.hkv.buffers import POOL
from genrec.embedding.hkv.options import HkvOptions, engine_options, state_floats, table_seed

MAX_STEP = 2**32 - 1


class HkvOverflowError(RuntimeError):
    """Keys got no row, since nothing could be evicted, and the table's `on_overflow` is "error"."""


@dataclass(frozen=True)
class Lookup:
    """A batch of n keys, sorted by unique key. Buffers have room for n; `unique` says how much counts.

    Attributes:
        rows: (n,) int64, row of each unique key, -1 without one, -2 where one was refused (`on_overflow`).
        keys: (n,) int64, the unique keys.
        offsets: (n + 1,) int32: key u is at positions[offsets[u] : offsets[u + 1]] of the batch.
        positions: (n,) int32.
        unique: Unique keys.
        rows_at: (n,) int64, row by position; None unless asked for.
        found: (n,) bool by position, the key had a row before; None unless asked for.
        step: Of the batch.
        generation: Of the table; rows hold while it is the same.
    """

    rows: Tensor
    keys: Tensor
    offsets: Tensor
    positions: Tensor
    unique: int
    rows_at: Tensor | None
    found: Tensor | None
    step: int
    generation: int


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's data; None for None."""
    return None if tensor is None else tensor.data_ptr()


class TableCore:
    """What `HkvTable` trains and evaluates with; see there."""

    _ids = count(1)
    by_id: ClassVar[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()

    def __init__(self, config: EmbeddingTableConfig, seed: int = 0, world_size: int = 1) -> None:
        if config.backend != "hkv":
            raise ValueError(f"Table '{config.name}' has backend '{config.backend}', not 'hkv'.")
        self.config, self.seed, self.world_size = config, seed, world_size
        self.options = HkvOptions.from_config(config)
        self.state_dim = state_floats(config.optimizer.name, config.dim)
        self.step = 0
        """Training lookups so far."""
        self.epoch = 0
        """Of "epoch_lfu": raises every later access over all before it."""
        self.custom_score: int | None = None
        """For score "custom": the score of all keys of the coming batches whose lookup names none."""
        self.optimizer_step = 0
        self._in_flight: dict[int, int] = {}
        self._clock: list[tuple[float, int]] = []
        unknown = self.options.unknown
        self._missing = None if isinstance(unknown, str) else torch.tensor([float(unknown)])
        self._handle = ctypes.c_void_p()
        engine = engine_options(config, self.options, seed, world_size)
        directory = (self.options.file_directory or "").encode()
        _binding.call("create", byref(engine), directory, byref(self._handle))
        weakref.finalize(self, _binding.library().genrec_hkv_destroy, self._handle)
        self.id = next(TableCore._ids)
        TableCore.by_id[self.id] = self

    def set_seed(self, seed: int) -> None:
        """Let rows start from another seed from now on. A loaded table goes on with the seed that it was saved with."""
        self.seed = seed
        _binding.call("set_init_seed", self._handle, table_seed(seed, self.config.name))

    # Sizes and counters -----------------------------------------------------------------------------------------------

    def info(self, count_tiers: bool = True) -> _binding.Info:
        """The engine's counters.

        Args:
            count_tiers: Fill `tier_rows`; in a tiered table this visits every slot.
        """
        info = _binding.Info()
        _binding.library().genrec_hkv_get_info(self._handle, count_tiers, byref(info))
        return info

    def __len__(self) -> int:
        return int(self.info(False).size)

    @property
    def size(self) -> int:
        """Keys that have rows."""
        return int(self.info(False).size)

    @property
    def capacity(self) -> int:
        """Rows for which there is room now."""
        return int(self.info(False).capacity)

    @property
    def max_capacity(self) -> int:
        """Rows to which the table may grow: the config's capacity, rounded up to whole buckets."""
        return int(self.info(False).max_capacity)

    @property
    def generation(self) -> int:
        """Changes whenever rows may have moved other than by eviction: growth, erasure, clearing."""
        return int(self.info(False).generation)

    def metrics(self) -> dict[str, float]:
        """For a logger: sizes now, and counts since the table was made."""
        info = self.info()
        counters = ("inserted", "evicted", "refused", "unadmitted", "promoted", "demoted")
        tiers = ("fast", "overflow", "file")
        return {
            "size": info.size,
            "load_factor": info.size / info.capacity,
            "hit_rate": info.hits / info.lookups if info.lookups else 0.0,
            **{name: getattr(info, name) for name in counters},
            "bytes_index": info.index_bytes + info.counter_bytes,
            **{f"bytes_{tier}": info.tier_bytes[i] for i, tier in enumerate(tiers)},
            **{f"rows_{tier}": info.tier_rows[i] for i, tier in enumerate(tiers)},
        }

    # Lookups ----------------------------------------------------------------------------------------------------------

    def check_keys(self, keys: Tensor) -> Tensor:
        """Keys as the engine takes them: contiguous int64 on the CPU.

        Raises:
            TypeError: They are not integers.
            NotImplementedError: They are on another device.
        """
        if keys.device.type != "cpu":
            raise NotImplementedError(
                f"Table '{self.config.name}': keys are on '{keys.device}', but dynamic tables have a CPU engine only; "
                "the CUDA engine is not there yet. Move the batch to the CPU, or choose backend 'fbgemm'."
            )
        if keys.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Table '{self.config.name}': keys must be int64 or int32, got {keys.dtype}.")
        return keys.detach().reshape(-1).to(torch.int64).contiguous()

    def lookup(
        self,
        keys: Tensor,
        flags: int = INSERT | ADMIT | TOUCH | UPDATE | COUNT,
        scores: Tensor | None = None,
        want_rows: bool = False,
        want_found: bool = False,
        overflow: bool = True,
    ) -> Lookup:
        """Rows for a batch of keys; with the default flags one step of training.

        Args:
            keys: Any integers; (n,) after flattening.
            flags: Bits of `_binding`.
            scores: (n,) int64 by position, for score "custom": the last one of a key counts.
            want_rows: Fill `rows_at`.
            want_found: Fill `found`.
            overflow: Act on keys that got no row as `HkvOptions.on_overflow` says; else they just have none.

        Raises:
            HkvOverflowError: See `HkvOptions.on_overflow`.
            RuntimeError: The table has seen 2^32 - 2 batches.
        """
        keys = self.check_keys(keys)
        n = keys.numel()
        if flags & TOUCH:
            self._advance()
        if scores is None and self.custom_score is not None and flags & TOUCH:
            scores = torch.full((n,), self.custom_score, dtype=torch.int64)
        if scores is not None:
            self._check_scores(scores, n)
            scores = scores.to(torch.int64).contiguous()
        rows, unique_keys = POOL.empty((n,), torch.int64), POOL.empty((n,), torch.int64)
        offsets, positions = POOL.empty((n + 1,), torch.int32), POOL.empty((n,), torch.int32)
        rows_at = POOL.empty((n,), torch.int64) if want_rows else None
        found = torch.empty(n, dtype=torch.bool) if want_found else None
        # What is updated between two training lookups was updated after the first: an increment since then has it.
        step = self.step + bool(flags & UPDATE and not flags & TOUCH)
        batch = _binding.Batch(keys.data_ptr(), n, step, self.pin_floor, self.epoch, flags, pointer(scores))
        outputs = (rows, unique_keys, offsets, positions, rows_at, found)
        result = _binding.LookupResult(*map(pointer, outputs))
        _binding.call("lookup", self._handle, byref(batch), torch.get_num_threads(), byref(result))
        if result.refused and overflow:
            self._overflow(int(result.refused))
        return Lookup(
            rows, unique_keys, offsets, positions, int(result.unique), rows_at, found, self.step, self.generation
        )

    def find(self, keys: Tensor) -> Tensor:
        """(n,) int64 rows, -1 for absent keys. Changes nothing."""
        keys = self.check_keys(keys)
        rows = POOL.empty((keys.numel(),), torch.int64)
        _binding.call(
            "find", self._handle, keys.data_ptr(), keys.numel(), torch.get_num_threads(), rows.data_ptr()
        )  # fmt: skip
        return rows

    def contains(self, keys: Tensor) -> Tensor:
        """(n,) bool. Changes nothing."""
        return self.find(keys) >= 0

    def embed(self, keys: Tensor) -> Tensor:
        """(n, dim) fp32: rows as evaluation sees them. Changes nothing; absent keys get `HkvOptions.unknown`."""
        keys = self.check_keys(keys)
        return self.gather(self.find(keys), keys)

    def gather(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(n, dim) fp32: row i, or what an absent key gets where rows[i] is -1."""
        out = POOL.empty((rows.numel(), self.config.dim), torch.float32)
        _binding.call(
            "gather", self._handle, rows.data_ptr(), keys.data_ptr(), rows.numel(), pointer(self._missing),
            torch.get_num_threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    def pool(self, rows: Tensor, keys: Tensor, bag_offsets: Tensor, weights: Tensor | None) -> Tensor:
        """(bags, dim) fp32: sums of rows over bags of positions, each row times its weight."""
        bags = bag_offsets.numel() - 1
        out = POOL.empty((bags, self.config.dim), torch.float32)
        _binding.call(
            "pool", self._handle, rows.data_ptr(), keys.data_ptr(), bag_offsets.data_ptr(), bags, pointer(weights),
            pointer(self._missing), torch.get_num_threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    def update(
        self,
        lookup: Lookup,
        gradient: Tensor,
        learning_rate: float,
        gradient_row: Tensor | None = None,
        gradient_weight: Tensor | None = None,
    ) -> None:
        """One step of the table's optimizer on the rows of a batch.

        Args:
            lookup: The batch. Rows that moved since are found again by their keys.
            gradient: (n, dim) fp32 by position, or (m, dim) with `gradient_row`.
            learning_rate: Rate of this step.
            gradient_row: (n,) int32: the gradient's row for each position.
            gradient_weight: (n,) fp32 by which each position's gradient is multiplied.
        """
        self.optimizer_step += 1
        optimizer = self.config.optimizer
        rows = lookup.rows
        if lookup.generation != self.generation:
            rows = self.find(lookup.keys[: lookup.unique])
        params = _binding.UpdateParams(
            learning_rate, *optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.max_gradient or 0.0,
            self.optimizer_step,
        )  # fmt: skip
        gradient = gradient.to(torch.float32).contiguous()
        _binding.call(
            "update", self._handle, byref(params), rows.data_ptr(), lookup.keys.data_ptr(), lookup.offsets.data_ptr(),
            lookup.positions.data_ptr(), lookup.unique, pointer(gradient_row), pointer(gradient_weight),
            gradient.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    # Batches in flight ------------------------------------------------------------------------------------------------

    @property
    def pin_floor(self) -> int:
        """Rows accessed at this step or later belong to batches whose update is still to come: they stay."""
        return min(self._in_flight, default=self.step)

    def pin(self, step: int) -> None:
        """Keep the rows of the batch of this step until `unpin`."""
        self._in_flight[step] = self._in_flight.get(step, 0) + 1

    def unpin(self, step: int) -> None:
        """Let the rows of the batch of this step go."""
        left = self._in_flight.get(step, 0) - 1
        if left > 0:
            self._in_flight[step] = left
        else:
            self._in_flight.pop(step, None)

    def _advance(self) -> None:
        if self.step + 1 >= MAX_STEP:
            raise RuntimeError(
                f"Table '{self.config.name}' has counted 2^32 - 2 batches, as many as it can. Export its rows "
                "(export_parquet) and import them into a new table."
            )
        self.step += 1
        now = time.time()
        # Ever wider apart, so that years fit into some thousand entries.
        if not self._clock or now - self._clock[-1][0] >= max(1.0, 1e-3 * (now - self._clock[0][0])):
            self._clock.append((now, self.step))

    def step_at(self, moment: float) -> int:
        """A step not after `moment` (seconds since 1970): rows updated later than the moment were updated after it.

        It may be earlier by a second, or by a thousandth of the table's age where that is more.
        """
        index = bisect.bisect_right(self._clock, (moment, MAX_STEP)) - 1
        return self._clock[index][1] - 1 if index >= 0 else 0

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_rows(self, values: Tensor, n: int, width: int) -> Tensor:
        if values.shape != (n, width):
            raise ValueError(f"Table '{self.config.name}': expected ({n}, {width}) values, got {tuple(values.shape)}.")
        return values.detach().to(device="cpu", dtype=torch.float32).contiguous()

    def _check_scores(self, scores: Tensor, n: int) -> None:
        if self.options.score != "custom":
            raise ValueError(
                f"Table '{self.config.name}' scores its rows by '{self.options.score}': it takes no scores. "
                "Set score: custom."
            )
        if scores.numel() and int(scores.min()) < 0:
            raise ValueError(f"Table '{self.config.name}': scores must not be negative, got {int(scores.min())}.")
        if scores.shape != (n,):
            raise ValueError(f"Table '{self.config.name}': expected ({n},) scores, got {tuple(scores.shape)}.")

    def _overflow(self, refused: int) -> None:
        if self.options.on_overflow == "init":
            return
        message = (
            f"Table '{self.config.name}': {refused} keys of a batch got no row, since their buckets hold only rows of "
            f"batches in flight or may not evict (score '{self.options.score}', {self.size:,} of {self.capacity:,} "
            "rows). Raise the capacity, set num_choices: 2, or set on_overflow to 'warn' or 'init'."
        )
        if self.options.on_overflow == "error":
            raise HkvOverflowError(message)
        warnings.warn(message, stacklevel=4)
