"""Stochastic Length: train on thinned-out long histories (HSTU paper, arXiv 2402.17152, section 3.3, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from genrec.data.splits import Cases


@dataclass(frozen=True)
class StochasticLength:
    """A history of n rows, N the most that is read, alpha in (1, 2]:

    n <= N^(alpha/2): all of it; else with probability 1 - N^alpha / n^2 a subsequence of N^(alpha/2) rows, else all of
    it. So attention costs O(N^alpha) in expectation. The newest row always stays: it is what the last label follows.

    Args:
        alpha: In (1, 2]; 2 keeps everything.
        max_length: N.
        selection: "random", or "recent": rows are drawn with weight 1 - f_i / sum(f), f_i the time from row i to the
            last (the paper's feature-weighted choice; by position where there are no times).
    """

    alpha: float
    max_length: int
    selection: Literal["random", "recent"] = "random"

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha <= 2.0:
            raise ValueError(f"alpha of Stochastic Length must lie in (1, 2], got {self.alpha}.")
        if self.selection not in ("random", "recent"):
            raise ValueError(f"selection must be 'random' or 'recent', got '{self.selection}'.")

    @property
    def short_length(self) -> int:
        """N^(alpha/2), rounded down, at least 1."""
        return max(1, int(self.max_length ** (self.alpha / 2)))

    def thinning_probability(self, lengths: NDArray) -> NDArray[np.float64]:
        """Chance that a history of each length is thinned out."""
        long = lengths > self.max_length ** (self.alpha / 2)
        chance = 1.0 - self.max_length**self.alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
        return np.where(long, chance.clip(min=0.0), 0.0)

    def rows(
        self,
        cases: Cases,
        ranking: bool,
        times: NDArray | None,
        rng: np.random.Generator,
        place: tuple[int, int] = (0, 1),
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Rows that are read, how many of each case, and the place of the first labelled one in it.

        Args:
            cases: The cases.
            ranking: Candidates (rows from `first_label` on) always stay. In retrieval labels are thinned out with
                their rows.
            times: (E,) times of the store's rows, or None.
            rng: Draws, for the whole global batch.
            place: (rank, number of ranks): the cases are every so many-th of the global batch, from the rank-th on. A
                case's draws are the same however many ranks there are.
        """
        (rank, ranks), count = place, len(cases)
        chances = rng.random(count * ranks)[rank::ranks]
        # From another stream: the last batch of an epoch may be a few cases shorter with other ranks.
        seeds = rng.spawn(1)[0].integers(2**63, size=count * ranks)[rank::ranks]
        history = (cases.first_label if ranking else cases.stop) - cases.start
        thin = chances < self.thinning_probability(history)
        parts: list[NDArray] = []
        lengths = np.empty(len(cases), np.int64)
        first = np.empty(len(cases), np.int64)
        for index in range(len(cases)):
            start, stop = int(cases.start[index]), int(cases.stop[index])
            rows = np.arange(start, stop)
            if thin[index]:
                end = start + int(history[index])
                drawn = np.random.default_rng(seeds[index])
                kept = self._choose(start, end, None if times is None else times[start:end], drawn)
                rows = np.concatenate([kept, np.arange(end, stop)])
            parts.append(rows)
            lengths[index] = len(rows)
            first[index] = np.searchsorted(rows, cases.first_label[index])
        return np.concatenate(parts) if parts else np.empty(0, np.int64), lengths, first

    def _choose(self, start: int, end: int, times: NDArray | None, rng: np.random.Generator) -> NDArray[np.int64]:
        older = end - 1 - start
        weights = None
        if self.selection == "recent":
            age = (np.arange(older, 0, -1) if times is None else times[-1] - times[:-1]).astype(np.float64)
            weights = 1.0 - age / max(age.sum(), 1.0)
            # One older row alone has no weight; it isn't drawn either.
            weights = weights / weights.sum() if weights.any() else None
        chosen = rng.choice(older, size=self.short_length - 1, replace=False, p=weights)
        return np.append(start + np.sort(chosen), end - 1)
