"""Seconds per epoch of RecTools' HSTUModel on MovieLens 100K; run by cpu_epoch.py in RecTools' own environment.

Prints one JSON line: {"epochs": [seconds, ...], "versions": {...}}. Needs rectools[torch] and nothing of genrec.
"""

import argparse
import json
import time
import warnings
from importlib.metadata import version

warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning import Callback, Trainer  # noqa: E402
from rectools import Columns  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.models import HSTUModel  # noqa: E402

SECONDS: list[float] = []


class EpochClock(Callback):
    """Appends each epoch's wall-clock seconds to SECONDS: RecTools copies the trainer, and this with it."""

    def on_train_epoch_start(self, *_: object) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        """Stop it."""
        SECONDS.append(time.perf_counter() - self.start)


def interactions(path: str, hold_out: int) -> pd.DataFrame:
    """u.data without each user's last `hold_out` ratings, ties in time in file order."""
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    frame = pd.read_csv(path, sep="\t", names=names)
    frame = frame.sort_values([Columns.User, Columns.Datetime], kind="stable")
    left = frame.groupby(Columns.User).cumcount(ascending=False)
    frame = frame[left >= hold_out].copy()
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=args.epochs, accelerator="cpu", callbacks=[EpochClock()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    model = HSTUModel(
        n_blocks=2, n_heads=2, n_factors=64, dropout_rate=0.2, session_max_len=200, loss="softmax", lr=1e-3,
        batch_size=128, epochs=args.epochs, get_trainer_func=trainer,
    )  # fmt: skip
    model.fit(Dataset.construct(interactions(args.data, hold_out=2)))
    print(json.dumps({"epochs": SECONDS, "versions": {n: version(n) for n in ("rectools", "torch")}}))


if __name__ == "__main__":
    main()
