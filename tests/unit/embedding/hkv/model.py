"""What a dynamic table should do, in plain Python: buckets of 128 slots, scores, eviction, growth, pinning."""

from __future__ import annotations

import math

M64 = 2**64 - 1
SLOTS, BLOCK = 128, 64


def mix64(key: int) -> int:
    k = key & M64
    k ^= k >> 33
    k = k * 0xFF51AFD7ED558CCD & M64
    k ^= k >> 33
    k = k * 0xC4CEB9FE1A85EC53 & M64
    return k ^ k >> 33


def buckets_of(key: int, num_buckets: int, choices: int) -> list[int]:
    mixed = mix64(key)
    first = mixed * num_buckets >> 64
    if choices == 1:
        return [first]
    base = first // BLOCK * BLOCK
    size = min(BLOCK, num_buckets - base)
    if size == 1:
        return [first]
    second = base + ((mixed >> 8 & 0xFFFF) * size >> 16)
    return [first, second if second != first else base + (second - base + 1) % size]


class Entry:
    def __init__(self, key: int, value: float, step: int) -> None:
        self.key, self.value, self.step, self.score, self.update = key, value, step, 0, 0

    def order(self, mode: str) -> tuple[int, int, int]:
        return (self.step if mode in ("lru", "none") else self.score, self.step, mix64(self.key))


class ModelTable:
    """`value` stands for a row: tests write the same number into all its elements."""

    def __init__(
        self, initial: int, most: int, mode: str, choices: int, load: float, start: float = 0.0
    ) -> None:  # fmt: skip
        self.most, self.mode, self.choices, self.load, self.start = most, mode, choices, load, start
        self.buckets: list[list[Entry | None]] = [[None] * SLOTS for _ in range(initial)]
        self.step, self.epoch = 0, 0
        self.pinned_from: int | None = None
        self.evicted: list[int] = []
        self.refused = 0

    def entries(self) -> dict[int, Entry]:
        return {entry.key: entry for bucket in self.buckets for entry in bucket if entry is not None}

    def find(self, key: int) -> Entry | None:
        for b in buckets_of(key, len(self.buckets), self.choices):
            for entry in self.buckets[b]:
                if entry is not None and entry.key == key:
                    return entry
        return None

    def growable(self) -> bool:
        return len(self.buckets) * 2 <= self.most

    def _place(self, entry: Entry, floor: int) -> bool:
        choices = buckets_of(entry.key, len(self.buckets), self.choices)
        used = [sum(slot is not None for slot in self.buckets[b]) for b in choices]
        if len(choices) == 2 and used[1] < used[0]:
            choices.reverse()
        bucket = self.buckets[choices[0]]
        if None in bucket:
            bucket[bucket.index(None)] = entry
            return True
        if self.growable() or self.mode == "none":
            return False
        candidates = [
            (other.order(self.mode), b, s)
            for b in choices
            for s, other in enumerate(self.buckets[b])
            if other is not None and other.step < floor
        ]
        if not candidates:
            return False
        _, b, s = min(candidates)
        victim = self.buckets[b][s]
        assert victim is not None
        self.evicted.append(victim.key)
        self.buckets[b][s] = entry
        return True

    def _grow(self) -> None:
        old = self.buckets
        self.buckets = [[None] * SLOTS for _ in range(2 * len(old))]
        for bucket in old:
            for entry in bucket:
                if entry is not None:
                    assert self._place(entry, M64)

    def _remove(self, key: int) -> None:
        for b in buckets_of(key, len(self.buckets), self.choices):
            for s, entry in enumerate(self.buckets[b]):
                if entry is not None and entry.key == key:
                    self.buckets[b][s] = None

    def insert(self, keys: list[int]) -> None:
        """What a batch with insertion does to keys, steps and scores; new entries start with `start`."""
        self.step += 1
        floor = self.step if self.pinned_from is None else self.pinned_from
        while True:
            size = len(self.entries())
            for key in keys:
                entry = self.find(key)
                if entry is not None:
                    entry.step = self.step
            new: list[int] = []
            full = False
            refused = 0
            for key in keys:
                if self.find(key) is None:
                    if self._place(Entry(key, self.start, self.step), floor):
                        new.append(key)
                    elif self.growable():
                        full = True
                        break
                    else:
                        refused += 1
            limit = self.load * len(self.buckets) * SLOTS
            if not self.growable() or (not full and (not new or size + len(new) <= limit)):
                self.refused += refused
                break
            for key in new:
                self._remove(key)
            self._grow()
            while self.growable() and size + len(new) > self.load * len(self.buckets) * SLOTS:
                self._grow()
        self._score(keys)

    def train(self, keys: list[int], counters: ModelCounters) -> None:
        """`insert` with admission, in a table that doesn't grow."""
        self.step += 1
        for key in keys:
            if (entry := self.find(key)) is not None:
                entry.step = self.step
        new = []
        for key in [key for key in dict.fromkeys(keys) if self.find(key) is None]:
            count = keys.count(key)
            if counters.count(key, count, self.step) < counters.threshold:
                counters.unadmitted += count
            elif self._place(Entry(key, self.start, self.step), self.step):
                new.append(key)
            else:
                self.refused += count
        for key in new:
            counters.forget(key)
        self._score(keys)

    def _score(self, keys: list[int]) -> None:
        for key in dict.fromkeys(keys):
            entry, count = self.find(key), keys.count(key)
            if entry is None:
                continue
            entry.update = self.step
            if self.mode == "lfu":
                entry.score = min(entry.score + count, M64)
            elif self.mode == "epoch_lfu":
                entry.score = self.epoch << 32 | min((entry.score & 0xFFFFFFFF) + count, 2**32 - 1)

    def set_scores(self, keys: list[int], scores: list[int]) -> None:
        for key, score in zip(keys, scores, strict=True):
            if (entry := self.find(key)) is not None:
                entry.score = score

    def assign(self, keys: list[int], values: list[float], inserted: bool = False) -> list[bool]:
        """Rows written between two training lookups, unless just `inserted`, count as updated after the first."""
        found = [self.find(key) is not None for key in keys]
        for key, value in zip(keys, values, strict=True):
            if (entry := self.find(key)) is not None:
                entry.value, entry.update = value, self.step + (not inserted)
        return found

    def accum(self, keys: list[int], deltas: list[float]) -> list[bool]:
        found = [self.find(key) is not None for key in keys]
        for key, delta in zip(keys, deltas, strict=True):
            if (entry := self.find(key)) is not None:
                entry.value, entry.update = entry.value + delta, self.step + 1
        return found

    def erase(self, keys: list[int]) -> int:
        there = [key for key in dict.fromkeys(keys) if self.find(key) is not None]
        for key in there:
            self._remove(key)
        return len(there)

    def reserve(self, rows: int) -> None:
        while self.growable() and rows > self.load * len(self.buckets) * SLOTS:
            self._grow()


class ModelCounters:
    """Sightings of keys without rows: sets of `ways`, a full one forgets the least (count, step, mixed key)."""

    def __init__(self, sets: int, ways: int, threshold: int) -> None:
        self.sets: list[dict[int, list[int]]] = [{} for _ in range(sets)]
        self.ways, self.threshold, self.unadmitted = ways, threshold, 0

    def _set(self, key: int) -> dict[int, list[int]]:
        return self.sets[mix64(key) * len(self.sets) >> 64]

    def count(self, key: int, sightings: int, step: int) -> int:
        here = self._set(key)
        if key not in here and len(here) == self.ways:
            del here[min(here, key=lambda k: (*here[k], mix64(k)))]
        here[key] = [here.get(key, [0, 0])[0] + sightings, step]
        return here[key][0]

    def forget(self, key: int) -> None:
        self._set(key).pop(key, None)

    def contents(self) -> dict[int, list[int]]:
        return {key: count for here in self.sets for key, count in here.items()}


def bucket_growth(rows: int, initial: int) -> tuple[int, int]:
    most = max(1, math.ceil(rows / SLOTS))
    first = min(most, max(1, math.ceil(initial / SLOTS)))
    doublings = math.floor(math.log2(most / first))
    first = math.ceil(most / 2**doublings)
    return first, first << doublings
