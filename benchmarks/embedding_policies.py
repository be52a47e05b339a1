"""Hit rate of bucketed eviction under a drifting Zipf stream, beside exact LRU and LFU over the whole capacity.

    python benchmarks/embedding_policies.py

Each batch is a set of lookups; a lookup hits where its key had a row before the batch. Rows of the batch itself are not
evicted, by the table and by the simulators alike. LFU counts a key's sightings since it entered.
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict

import numpy as np
import torch

from genrec.embedding.config import EmbeddingTableConfig, TableOptimizerConfig
from genrec.embedding.hkv import HkvTable
from genrec.environment import headline


def drifting_zipf(batches: int, size: int, items: int, exponent: float, drift: float, seed: int) -> np.ndarray:
    """(batches, size) ids: popularity falls with rank like a power law, and the ranks move over the ids with time."""
    generator = np.random.default_rng(seed)
    mass = np.cumsum(1.0 / np.arange(1, items + 1) ** exponent)
    ranks = np.searchsorted(mass / mass[-1], generator.random((batches, size)))
    spread = generator.permutation(4 * items)
    moved = (drift * np.arange(batches)).astype(np.int64)[:, None]
    return spread[(ranks + moved) % (4 * items)].astype(np.int64)


def exact_lru(stream: np.ndarray, capacity: int) -> float:
    """Share of lookups that find their key in an exact LRU cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for batch in stream.tolist():
        hits += sum(key in cache for key in batch)
        for key in dict.fromkeys(batch):
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / stream.size


def exact_lfu(stream: np.ndarray, capacity: int) -> float:
    """Share of lookups that find their key in an exact LFU cache; ties go to the older step."""
    counts: dict[int, int] = {}
    seen: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = 0
    for step, batch in enumerate(stream.tolist()):
        hits += sum(key in counts for key in batch)
        for key in batch:
            counts[key] = counts.get(key, 0) + 1
            seen[key] = step
        while len(counts) > capacity:
            _, when, key = heapq.heappop(heap)
            if seen.get(key) == when:  # else the entry is an old one of a key seen since
                del counts[key], seen[key]
        for key in dict.fromkeys(batch):
            heapq.heappush(heap, (counts[key], step, key))
    return hits / stream.size


def table_hit_rate(stream: np.ndarray, capacity: int, score: str, choices: int) -> float:
    """Share of lookups that find their key in a dynamic table."""
    table = HkvTable(
        EmbeddingTableConfig(
            "items", 1, ["items"], backend="hkv", capacity=capacity, optimizer=TableOptimizerConfig("sgd"),
            options={"score": score, "num_choices": choices, "initial_capacity": capacity},
        )
    )  # fmt: skip
    for batch in stream:
        table.lookup(torch.from_numpy(batch))
    return table.metrics()["hit_rate"]


def compare(batches: int, size: int, items: int, capacity: int, exponent: float, drift: float) -> list[dict]:
    """One row for each policy: exact, one choice, two choices."""
    stream = drifting_zipf(batches, size, items, exponent, drift, seed=0)
    rows = []
    for score, simulate in (("lru", exact_lru), ("lfu", exact_lfu)):
        row = {"policy": score, "capacity": capacity / items, "exponent": exponent, "drift": drift}
        row["exact"] = simulate(stream, capacity)
        for choices in (1, 2):
            row[f"choices {choices}"] = table_hit_rate(stream, capacity, score, choices)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--items", type=int, default=65_536)
    arguments = parser.parse_args()
    print(headline())
    print("policy  capacity  exponent  drift  exact   1 choice  2 choices")
    for exponent in (0.8, 1.05, 1.2):
        for share in (0.1, 0.5):
            for drift in (0.0, 20.0):
                capacity = int(arguments.items * share) // 128 * 128
                results = compare(arguments.batches, arguments.size, arguments.items, capacity, exponent, drift)
                for row in results:
                    print(
                        f"{row['policy']:6}  {share:8.2f}  {exponent:8.2f}  {drift:5.0f}  {row['exact']:.4f}  "
                        f"{row['choices 1']:8.4f}  {row['choices 2']:9.4f}"
                    )


if __name__ == "__main__":
    main()
