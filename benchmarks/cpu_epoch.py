"""Seconds of a training epoch on MovieLens 100K: genrec's HSTU beside RecTools' HSTUModel, alternating, on one CPU.

    python benchmarks/cpu_epoch.py --data /data/ml-100k --rectools /path/to/rectools-venv/bin/python

Both: leave-one-out (the last two events of each user left out), d=64, 2 blocks, 2 heads, L=200, batch 128, Adam 1e-3,
full softmax, dropout 0.2, relative position and time bias, newest 200 events of each user. RecTools runs in
a virtual environment of its own (`pip install torch rectools[torch]`). The first epoch of each process is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

from genrec.environment import headline

HERE = Path(__file__).parent


def genrec_epochs(data: str, epochs: int, threads: int) -> list[float]:
    """Seconds of each epoch, this process."""
    warnings.filterwarnings("ignore")
    import lightning as L
    import torch

    from genrec.data import SequenceDataModule
    from genrec.data.readers import MovieLens
    from genrec.models import HSTURetrieval

    class EpochClock(L.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            seconds.append(time.perf_counter() - self.start)

    torch.set_num_threads(threads)
    seconds: list[float] = []
    module = SequenceDataModule(MovieLens(data), "retrieval", max_seqlen=200, batch_size=128, progress=False)
    module.setup()
    model = HSTURetrieval(
        module.schema.num_items,
        hidden_dim=64,
        num_layers=2,
        num_heads=2,
        max_seqlen=200,
        dropout=0.2,
        learning_rate=1e-3,
    )
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[EpochClock()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, module)
    return seconds


def run(words: list[str]) -> tuple[list[float], dict[str, str]]:
    """Epochs of a child process but the first, and its versions."""
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.strip().splitlines()[-1])
    return found["epochs"][1:], found["versions"]


def main() -> None:
    """Alternate, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with u.data")
    parser.add_argument("--rectools", help="Python of an environment with rectools[torch]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a process, the first left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        epochs = genrec_epochs(args.data, args.epochs, args.threads)
        print(
            json.dumps({"epochs": epochs, "versions": {"torch": version("torch"), "lightning": version("lightning")}})
        )
        return
    common = ["--epochs", str(args.epochs), "--threads", str(args.threads)]
    commands = {"genrec HSTURetrieval": [sys.executable, __file__, "--child", "--data", args.data, *common]}
    if args.rectools:
        script = str(HERE / "rectools_epoch.py")
        commands["RecTools HSTUModel"] = [args.rectools, script, str(Path(args.data) / "u.data"), *common]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    versions: dict[str, str] = {}
    for _ in range(args.rounds):
        for name, words in commands.items():
            measured, used = run(words)
            seconds[name] += measured
            versions[name] = ", ".join(f"{package} {number}" for package, number in used.items())
    print(f"{headline()}; {args.threads} threads a process\n")
    print("| model | epochs | median s/epoch | lowest | highest | versions |\n|---|---|---|---|---|---|")
    for name, values in seconds.items():
        print(
            f"| {name} | {len(values)} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} "
            f"| {versions[name]} |"
        )
    if args.rectools:
        ours, theirs = (statistics.median(values) for values in seconds.values())
        print(f"\ngenrec is {theirs / ours:.1f} times as fast.")


if __name__ == "__main__":
    main()
