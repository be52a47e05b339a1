"""What only dynamic tables know: `HkvOptions`, taken from `EmbeddingTableConfig.options`."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields
from typing import Literal

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv import _binding

BUCKET_SLOTS = 128

ScoreName = Literal["lru", "lfu", "epoch_lfu", "custom", "none"]
_SCORES = {"lru": 0, "lfu": 1, "epoch_lfu": 2, "custom": 3, "none": 4}
_DTYPES = {"fp32": 0, "fp16": 1, "bf16": 2}
_OPTIMIZERS = {"sgd": 0, "adam": 1, "adamw": 2, "adagrad": 3, "rowwise_adagrad": 4}
_STATE_FLOATS = {"sgd": (0, 0), "adam": (2, 0), "adamw": (2, 0), "adagrad": (1, 0), "rowwise_adagrad": (0, 1)}


@dataclass(frozen=True)
class HkvOptions:
    """Options of a dynamic table.

    Args:
        score: Which row goes first when a bucket is full: the least by last step ("lru"), by sightings ("lfu"), by
            epoch and then sightings ("epoch_lfu"; `HkvTable.epoch`, which the models raise with their own), by the
            caller's scores ("custom"), or none ("none": the table only grows). Ties go to the older step, then to the
            lower mixed key.
        initial_capacity: Rows at the start; the table doubles up to the config's capacity. None: the capacity, at most
            131,072.
        max_load_factor: Occupied share above which the table doubles, while it may.
        num_choices: Buckets that a key may lie in. 1: a table that is full to 90 % of its capacity has evicted about
            0.6 % early, since buckets fill unevenly. 2: nothing early below 98 %, for a slower insertion and lookup of
            absent keys.
        on_overflow: What to do with a key where nothing can be evicted (all rows of its bucket belong to batches in
            flight, or score is "none"): "error", or "warn" or "init", which look its initial row up and drop its
            gradient.
        unknown: What evaluation, and training for a key not yet admitted, sees for a key without a row: "initializer"
            (the row that the key would start with) or a number for all elements.
        admission_threshold: Sightings after which a key gets a row; 1: at once.
        admission_capacity: Keys whose sightings are counted at most. None: a quarter of the capacity.
        fast_capacity: Rows in the fast tier. None: all. Rounded to whole rows of each bucket.
        overflow_capacity: Rows in the overflow tier. None: all that are not in the fast tier. What is left goes to a
            memory-mapped file.
        file_directory: Where the file of the last tier lies; needed where there is one.
        record_evicted: Keep evicted rows until `pop_evicted()` fetches them.

    Raises:
        ValueError: A value is out of its range.
    """

    score: ScoreName = "lru"
    initial_capacity: int | None = None
    max_load_factor: float = 0.75
    num_choices: int = 1
    on_overflow: Literal["error", "warn", "init"] = "error"
    unknown: Literal["initializer"] | float = "initializer"
    admission_threshold: int = 1
    admission_capacity: int | None = None
    fast_capacity: int | None = None
    overflow_capacity: int | None = None
    file_directory: str | None = None
    record_evicted: bool = False

    def __post_init__(self) -> None:
        if self.score not in _SCORES:
            raise ValueError(f"score must be one of {', '.join(_SCORES)}, got '{self.score}'.")
        if self.on_overflow not in ("error", "warn", "init"):
            raise ValueError(f"on_overflow must be 'error', 'warn' or 'init', got '{self.on_overflow}'.")
        if self.num_choices not in (1, 2):
            raise ValueError(f"num_choices must be 1 or 2, got {self.num_choices}.")
        if not 0.0 < self.max_load_factor <= 1.0:
            raise ValueError(f"max_load_factor must be in (0, 1], got {self.max_load_factor}.")
        if isinstance(self.unknown, str) and self.unknown != "initializer":
            raise ValueError(f"unknown must be 'initializer' or a number, got '{self.unknown}'.")
        for name in ("initial_capacity", "admission_threshold", "admission_capacity", "fast_capacity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.overflow_capacity is not None and self.overflow_capacity < 0:
            raise ValueError(f"overflow_capacity must not be negative, got {self.overflow_capacity}.")
        if self.overflow_capacity is not None and self.fast_capacity is None:
            raise ValueError("overflow_capacity needs fast_capacity: without it all rows are in the fast tier.")

    @classmethod
    def from_config(cls, config: EmbeddingTableConfig) -> HkvOptions:
        """The options of a table's config.

        Raises:
            ValueError: An option is unknown or out of its range; the message names the table.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(config.options) - set(known))
        if unknown:
            raise ValueError(
                f"Table '{config.name}': unknown hkv options {unknown}. Known ones are {', '.join(known)}."
            )
        try:
            return cls(**config.options)
        except ValueError as error:
            raise ValueError(f"Table '{config.name}': {error}") from error


def state_floats(optimizer: str, dim: int) -> int:
    """Floats of optimizer state in a row."""
    per_element, per_row = _STATE_FLOATS[optimizer]
    return per_element * dim + per_row


def table_seed(seed: int, name: str) -> int:
    """64 bits from (seed, table name): what, with the key, decides how a row starts."""
    return ((seed & 0xFFFFFFFF) << 32 | zlib.crc32(name.encode())) * 0x9E3779B97F4A7C15 % 2**64


def growth(rows: int, initial_rows: int) -> tuple[int, int]:
    """(initial, most) buckets, so that doubling the first ends at the second, which holds `rows` rows or a few more."""
    most = max(1, math.ceil(rows / BUCKET_SLOTS))
    first = min(most, max(1, math.ceil(initial_rows / BUCKET_SLOTS)))
    doublings = math.floor(math.log2(most / first))
    first = math.ceil(most / 2**doublings)
    return first, first << doublings


def table_slots(config: EmbeddingTableConfig) -> int:
    """Rows that the table may hold: its capacity.

    Without one it shall hold all of `num_embeddings` ids, and gets slots enough for each to find a place in its bucket:
    with 60 % of the slots in use fewer than one bucket of 128 in ten million overflows.
    """
    if config.capacity:
        return config.capacity
    return math.ceil(config.rows / 0.6)


def engine_options(config: EmbeddingTableConfig, options: HkvOptions, seed: int, world_size: int) -> _binding.Options:
    """The engine's options for one of `world_size` equal shares of the table.

    Raises:
        ValueError: The tiers don't add up.
    """
    slots = table_slots(config)
    rows = math.ceil(slots / world_size)
    initial = options.initial_capacity or min(slots, 131_072)
    first, most = growth(rows, math.ceil(initial / world_size))
    fast, overflow = _tier_positions(config, options)
    kind, a, b = _initializer(config)
    counters = options.admission_capacity or max(BUCKET_SLOTS, slots // 4)
    ways = max(1, math.ceil(counters / world_size / most))
    return _binding.Options(
        dim=config.dim,
        dtype=_DTYPES[config.dtype],
        score_mode=_SCORES[options.score],
        choices=options.num_choices,
        optimizer=_OPTIMIZERS[config.optimizer.name],
        record_evicted=options.record_evicted,
        initial_buckets=first,
        max_buckets=most,
        max_load_factor=options.max_load_factor,
        fast_positions=fast,
        overflow_positions=overflow,
        admission_threshold=options.admission_threshold,
        admission_ways=ways,
        init_kind=kind,
        init_seed=table_seed(seed, config.name),
        init_a=a,
        init_b=b,
    )


def _tier_positions(config: EmbeddingTableConfig, options: HkvOptions) -> tuple[int, int]:
    """Rows of each bucket's 128 in the fast and in the overflow tier."""
    slots = table_slots(config)

    def share(rows: int) -> int:
        return round(BUCKET_SLOTS * min(1.0, rows / slots))

    if options.fast_capacity is None:
        return BUCKET_SLOTS, 0
    fast = max(1, share(options.fast_capacity))
    overflow = BUCKET_SLOTS - fast
    if options.overflow_capacity is not None:
        overflow = min(overflow, share(options.overflow_capacity))
    if fast + overflow < BUCKET_SLOTS and not options.file_directory:
        held = options.fast_capacity + (options.overflow_capacity or 0)
        raise ValueError(
            f"Table '{config.name}': fast and overflow tier hold {held:,} of {slots:,} rows. "
            "Raise overflow_capacity, or name a file_directory for the rest."
        )
    return fast, overflow


def _initializer(config: EmbeddingTableConfig) -> tuple[int, float, float]:
    """(kind, a, b) of the engine."""
    init = config.initializer
    if init.name == "constant":
        return 0, init.value, 0.0
    if init.name == "uniform":
        return 1, init.low, init.high
    if init.name == "xavier_uniform":
        bound = math.sqrt(6.0 / (config.rows + config.dim))
        return 1, -bound, bound
    return (2 if init.name == "normal" else 3), init.mean, init.std
