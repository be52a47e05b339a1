"""How evenly the Triton attention's pieces of work end, by counting: no GPU is needed, nothing is run.

    python benchmarks/attention_schedule.py

The batches are those of benchmarks/attention.py. A piece is a block of rows (of keys, backward) of one head; it takes
as long as the blocks that it visits, plus `fixed` such blocks for its beginning and end. Slots, the programs that run
at a time, take the pieces in the order of `kernels/schedule.py`: longest sequence first, within it the most work first.

* useful: entries that a causal mask shows, of those in the visited blocks;
* even: the slots' mean time, of the time when the last one ends;
* rate: useful entries a slot, of what it would do in that time without `fixed`.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention import TOKENS, Point, lengths_of

PROCESSORS = 132


def pieces(lengths: list[int], rows: int, keys: int, of_keys: bool) -> list[int]:
    """Blocks that each piece visits under a causal mask, in the order of work."""
    found = []
    for length in sorted(lengths, reverse=True):
        if of_keys:
            found += [-(-length // rows) - block * keys // rows for block in range(-(-length // keys))]
        else:
            ends = [min((block + 1) * rows, length) for block in range(-(-length // rows))]
            found += [-(-end // keys) for end in reversed(ends)]
    return found


def last_end(times: list[float], slots: int) -> float:
    """When the last piece ends, each given to the slot that is free first."""
    free = [0.0] * slots
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def main() -> int:
    """Prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--fixed", type=float, default=1.0)
    options = p.parse_args()
    print(f"{PROCESSORS} multiprocessors, {options.heads} heads, about {TOKENS} tokens, fixed {options.fixed}\n")
    print("| batch | sequences | blocks | at a time | pieces | useful | even | rate |\n" + "|---|---:" * 4 + "|")
    for length in (1024, 4096):
        for kind in ("full", "jagged"):
            lengths = lengths_of(Point(options.heads, 128, length, kind), TOKENS, torch.Generator().manual_seed(0))
            for of_keys, rows, keys, programs in ((False, 64, 64, 2), (False, 128, 128, 1), (True, 64, 128, 1)):
                visits = [n for n in pieces(lengths, rows, keys, of_keys) for _ in range(options.heads)]
                slots = PROCESSORS * programs
                end = last_end([n + options.fixed for n in visits], slots)
                shown = sum(n * (n + 1) / 2 for n in lengths) * options.heads / (rows * keys)
                even = (sum(visits) + options.fixed * len(visits)) / slots / end
                print(f"| S = {length}, {kind} | {len(lengths)} | {rows} x {keys}{' of keys' if of_keys else ''} "
                      f"| {slots} | {len(visits)} | {shown / sum(visits):.3f} | {even:.3f} "
                      f"| {shown / slots / end:.3f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
