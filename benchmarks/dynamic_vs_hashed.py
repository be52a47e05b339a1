"""A stream of ever-new ids: a dynamic table keeps its AUC where a hashed static table of equal memory loses it.

    python benchmarks/dynamic_vs_hashed.py --plot docs/assets/dynamic_vs_hashed.png

Synthetic ranking data (`arriving`): from each day to the next a share of the catalogue is replaced by new ids. Each day
the model first predicts the day's clicks, then trains on them once, so every AUC is that of unseen labels. The same
HSTU model with three item tables:

* hkv: a dynamic table; its least recently used rows make room.
* hashed: a static table of the same bytes; an id's row is its hash modulo the rows.
* unbounded: a static table with a row for every id that will ever come (known here, in a simulation).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.data.collate import Collator
from genrec.data.datamodule import SequenceDataModule
from genrec.data.splits import Cases
from genrec.data.synthetic import Synthetic
from genrec.embedding.hkv.checkpoint import find_tables
from genrec.embedding.hkv.sharding import table_bytes
from genrec.embedding.hkv.state import mix_keys
from genrec.environment import headline
from genrec.models import HSTURanking
from genrec.recipes._data import task_arguments

ITEM = "item"


@dataclass
class Contender:
    """A model and how it reads ids."""

    name: str
    model: HSTURanking
    read: Any  # ids -> ids of its table
    bytes: int


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve; ties count half."""
    order = scores.argsort()
    _, inverse, counts = scores[order].unique_consecutive(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2.0)[inverse]
    positive = labels[order] > 0.5
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def with_items(batch: SequenceBatch, read: Any) -> SequenceBatch:
    """The batch with other item ids."""
    features = batch.features
    keys = features.keys()
    values = torch.cat([read(features[key].values()) if key == ITEM else features[key].values() for key in keys])
    return replace(batch, features=KeyedJaggedTensor(keys, values, lengths=features.lengths()))


def make_contenders(arguments: argparse.Namespace, items: Tensor, common: dict[str, Any]) -> list[Contender]:
    """The three models, from the same dense weights."""

    def model(rows: int, **table: Any) -> HSTURanking:
        torch.manual_seed(arguments.seed)
        return HSTURanking(num_items=rows, embedding_tables={ITEM: table}, **common)

    options = {"num_choices": 2, "initial_capacity": arguments.capacity}
    dynamic = model(2**62, backend="hkv", num_embeddings=None, capacity=arguments.capacity, options=options)
    config = dynamic.tables.configs[ITEM]
    size = table_bytes(config)
    row = 2 * 4 * config.dim  # a static row with Adagrad's state
    rows = (size.index + size.fast) // row
    hashed = model(rows)
    unbounded = model(items.numel())
    for other in (hashed, unbounded):
        other.body.load_state_dict(dynamic.body.state_dict())
    return [
        Contender("hkv", dynamic, lambda ids: ids, size.index + size.fast),
        Contender("hashed", hashed, lambda ids: (mix_keys(ids) & (2**62 - 1)) % rows, rows * row),
        Contender("unbounded", unbounded, lambda ids: torch.searchsorted(items, ids), items.numel() * row),
    ]


def predict_and_train(
    contender: Contender, batches: list[SequenceBatch], optimizer: Any
) -> float:  # fmt: skip
    """The day's AUC before training on it."""
    model = contender.model
    read = [model.prepare_batch(with_items(batch, contender.read)) for batch in batches]
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(batch)["click"].reshape(-1) for batch in read])
    labels = torch.cat([batch.labels[:, 0] for batch in batches])  # type: ignore[index]
    model.train()
    for batch in read:
        optimizer.zero_grad()
        loss, _ = model.total_loss(model.loss(model(batch), batch))
        loss.backward()
        optimizer.step()
    return auc(scores, labels)


def run(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """AUC by day of each contender, and the best reachable one."""
    reader = Synthetic(
        kind="ranking", num_users=arguments.users, num_items=arguments.window, zipf=0.5, num_interests=2,
        events_per_user=10 * (arguments.days + 3), arriving=arguments.arriving, seed=arguments.seed,
    )  # fmt: skip
    data = SequenceDataModule(
        reader,
        "ranking",
        remap_items=False,
        max_seqlen=arguments.history,
        num_candidates=10,
        progress=False,
        tasks=["click"],
    )
    store, cases = data.opened, data.cases("train")
    day = (cases.first_label - store.offsets[:-1][cases.user]) // 10
    schema = data.schema
    collator = Collator(store, "ranking", data.side_features, data.contextual_features, data.uses_actions, data.tasks)
    items = torch.from_numpy(np.unique(np.asarray(store.item)))
    common = {
        "max_seqlen": arguments.history + 10, "action_feature": schema.action_feature,
        "num_actions": schema.num_actions, "tasks": task_arguments(data), "action_mode": "summed",
        "hidden_dim": arguments.dim,
        "num_layers": 1, "num_heads": 2, "head_hidden_dims": [32], "dropout": 0.0, "input_dropout": 0.0,
        "learning_rate": 4e-3, "table_optimizer": "adagrad", "table_learning_rate": arguments.table_rate,
        "embedding_std": 0.1,
    }  # fmt: skip
    contenders = make_contenders(arguments, items, common)
    print(f"{items.numel():,} ids come in {arguments.days} days, {arguments.window:,} of them at a time")
    for contender in contenders:
        print(f"  {contender.name:10} {contender.bytes / 2**20:7.2f} MiB of item rows")
    optimizers = {c.name: c.model.configure_optimizers() for c in contenders}
    curves: dict[str, list[float]] = {c.name: [] for c in contenders}
    curves["best reachable"] = []
    generator = np.random.default_rng(arguments.seed)
    for today in range(1, arguments.days + 1):
        index = generator.permutation(np.flatnonzero(day == today))
        batches = [collator(cases.take(part)) for part in np.array_split(index, max(1, len(index) // 16))]
        labels = torch.cat([batch.labels[:, 0] for batch in batches])  # type: ignore[index]
        curves["best reachable"].append(best_reachable(store, cases.take(index), labels))
        for contender in contenders:
            curves[contender.name].append(predict_and_train(contender, batches, optimizers[contender.name]))
        if today % 5 == 0:
            print(
                f"day {today:3}  " + "  ".join(f"{name} {values[-1]:.4f}" for name, values in curves.items()),
                flush=True,
            )
    metrics = find_tables(contenders[0].model)[ITEM].metrics()
    print(
        "hkv: " + ", ".join(f"{name} {metrics[name]:,.4g}" for name in ("size", "load_factor", "hit_rate", "evicted"))
    )
    return curves


def best_reachable(store: Any, cases: Cases, labels: Tensor) -> float:
    """AUC of the generator's own chances of a click."""
    rows = np.concatenate([np.arange(a, b) for a, b in zip(cases.first_label, cases.stop, strict=True)])
    return auc(torch.from_numpy(np.asarray(store.known[rows])[:, 0].astype(np.float64)), labels)


def plot(runs: list[dict[str, list[float]]], path: Path) -> None:
    """AUC by day: the mean of the runs, and each of them faintly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    styles = {"hkv": "C0-", "hashed": "C3-", "unbounded": "C2--", "best reachable": "k:"}
    for name, style in styles.items():
        curves = np.array([one[name] for one in runs])
        days = np.arange(1, curves.shape[1] + 1)
        axes.plot(days, curves.mean(axis=0), style, label=name)
        if name != "best reachable":
            axes.plot(days, curves.T, style, alpha=0.2, linewidth=0.8)
    axes.set_xlabel("day (each brings new items)")
    axes.set_ylabel("AUC of the day's clicks, before training on them")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main() -> None:
    """Run, print a summary, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--window", type=int, default=300, help="items of the catalogue at a time")
    parser.add_argument("--arriving", type=float, default=0.1, help="share of them that is new each day")
    parser.add_argument("--days", type=int, default=45)
    parser.add_argument("--capacity", type=int, default=512, help="rows of the dynamic table")
    parser.add_argument("--history", type=int, default=20)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--table-rate", type=float, default=0.1, help="learning rate of the tables (Adagrad)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    start = time.time()
    print(headline())
    runs = [run(argparse.Namespace(**vars(arguments), seed=seed)) for seed in arguments.seeds]
    curves = {name: np.mean([one[name] for one in runs], axis=0) for name in runs[0]}
    third = max(1, arguments.days // 3)
    print(f"\n{'table':16}{'first third':>12}{'last third':>12}")
    for name, values in curves.items():
        print(f"{name:16}{np.mean(values[:third]):12.4f}{np.mean(values[-third:]):12.4f}")
    print(f"{time.time() - start:.0f} s")
    if arguments.plot is not None:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
