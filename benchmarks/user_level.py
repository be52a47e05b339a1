"""What a user's level does to AUC and GAUC: item means, alone and with each user's running level added.

    python benchmarks/user_level.py --data /data/ml-100k

No model is trained. A candidate's score is the logit of its item's mean label in the training period (drawn to the
mean of all labels by 5 pseudo-labels). The user's level is the mean surplus of all the user's earlier labels over their
items' means, drawn to zero by `smoothing` pseudo-labels: it is what a sequential model learns first of a user. As it
settles, the scores of early and late candidates shift against each other: AUC over all users gains, GAUC loses.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.data import EventStore, SequenceDataModule
from genrec.data.readers import MovieLens
from genrec.environment import headline
from genrec.metrics import AUC, GAUC

PSEUDO_LABELS = 5.0
SMOOTHING = (None, 20.0, 5.0)
FACTOR = 4.0
"""Logits for a surplus of one: the slope of the logit at a mean of one half."""


def rows_of(data: SequenceDataModule, stage: str) -> NDArray[np.int64]:
    """The rows of the store that are candidates in a stage."""
    cases = data.cases(stage)  # type: ignore[arg-type]
    lengths = cases.stop - cases.first_label
    return np.repeat(cases.first_label - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def item_means(store: EventStore, labels: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(V,) mean label of each item over `rows`, drawn to the mean of all."""
    items, size = store.item[rows], store.schema.num_items
    total = np.bincount(items, labels[rows], minlength=size)
    return (total + PSEUDO_LABELS * labels[rows].mean()) / (np.bincount(items, minlength=size) + PSEUDO_LABELS)


def running_level(surplus: NDArray[np.float64], offsets: NDArray[np.int64], smoothing: float) -> NDArray[np.float64]:
    """(E,) mean surplus of the same user's events before each one."""
    before = np.cumsum(surplus) - surplus
    counts = np.diff(offsets)
    first = np.repeat(offsets[:-1], counts)
    return (before - before[first]) / (np.arange(len(surplus)) - first + smoothing)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of MovieLens 100K")
    args = parser.parse_args()
    data = SequenceDataModule(MovieLens(args.data), "ranking", split="time", num_candidates=1)
    data.setup()
    store, train, test = data.opened, rows_of(data, "train"), rows_of(data, "test")
    users = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    assert store.labels is not None
    print(f"{headline()}; {len(train):,} training labels, "
          f"{len(test):,} test labels of {len(np.unique(users[test]))} users\n")  # fmt: skip
    print("| score | " + " | ".join(f"AUC {task} | GAUC {task}" for task in data.tasks) + " |")
    print("|---|" + "---|" * 2 * len(data.tasks))
    columns = [((store.labels >> column) & 1).astype(np.float64) for column in range(len(data.tasks))]
    means = [item_means(store, labels, train)[store.item] for labels in columns]
    for smoothing in SMOOTHING:
        cells = []
        for labels, mean in zip(columns, means, strict=True):
            score = np.log(mean / (1 - mean))
            if smoothing is not None:
                score = score + FACTOR * running_level(labels - mean, store.offsets, smoothing)
            found, target = torch.from_numpy(score[test]), torch.from_numpy(labels[test].astype(np.int64))
            within = GAUC()
            within.update(found, target, torch.from_numpy(users[test]))
            over_all = AUC()
            over_all.update(found, target)
            cells += [float(over_all.compute()), float(within.compute())]
        name = "item mean" if smoothing is None else f"item mean + user's level, smoothing {smoothing:.0f}"
        print(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
