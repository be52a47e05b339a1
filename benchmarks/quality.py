"""Test metrics of a recipe over several seeds: mean and spread, models side by side.

    python benchmarks/quality.py retrieval retrieval_beauty --data /data/Beauty.txt --models hstu sasrec --seeds 1 2 3
    python benchmarks/quality.py ranking ranking_ml100k --data /data/ml-100k --models hstu mlp --metrics auc gauc

Each run is the recipe's own command line. Runs are kept in --runs and not repeated where their metrics.json is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from genrec.environment import headline


def command(args: argparse.Namespace, model: str, seed: int) -> list[str]:
    """The recipe's command line of one run."""
    words = [f"model.name={model}", f"seed={seed}", f"run.dir={folder(args, model, seed)}"]
    data = [f"data.path={args.data}"] if args.data else []
    return [sys.executable, "-m", f"genrec.recipes.{args.recipe}", "--config", args.config, *data, *words, *args.set]


def folder(args: argparse.Namespace, model: str, seed: int) -> Path:
    """Where a run leaves its files."""
    return Path(args.runs) / f"{args.config}-{model}-{seed}"


def metrics(args: argparse.Namespace, model: str, seed: int) -> dict[str, float]:
    """The run's metrics.json; runs it first where it is not there."""
    file = folder(args, model, seed) / "metrics.json"
    if not file.exists():
        words = command(args, model, seed)
        print("$", " ".join(words[1:]), file=sys.stderr)
        subprocess.run(words, check=True, stdout=sys.stderr)
    return json.loads(file.read_text())


def row(name: str, values: list[float]) -> str:
    """Mean ± standard deviation over the seeds, and the lowest and highest value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def main() -> None:
    """Run, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("ranking", "retrieval"))
    parser.add_argument("config")
    parser.add_argument("--data", help="data.path of the runs")
    parser.add_argument("--models", nargs="+", default=["hstu"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--metrics", nargs="+", default=["hr@", "ndcg@"], help="beginnings of the metrics' names")
    parser.add_argument("--runs", default="runs/quality")
    parser.add_argument("--set", nargs="*", default=[], help="further key=value of the recipe")
    args = parser.parse_args()
    found = {model: [metrics(args, model, seed) for seed in args.seeds] for model in args.models}
    names = sorted({name for runs in found.values() for run in runs for name in run if name.startswith("test/")})
    shown = [name for name in names if any(name.removeprefix("test/").startswith(m) for m in args.metrics)]
    print(f"{args.config}, seeds {args.seeds}, mean ± standard deviation (lowest–highest); {headline()}\n")
    print("| model | " + " | ".join(name.removeprefix("test/") for name in shown) + " |")
    print("|---" * (len(shown) + 1) + "|")
    for model, runs in found.items():
        print(f"| {model} | " + " | ".join(row(name, [run[name] for run in runs]) for name in shown) + " |")
    best = {
        name: value for runs in found.values() for run in runs for name, value in run.items() if "reachable" in name
    }
    if best:
        cells = [best.get(name.replace("test/", "best_reachable/")) for name in shown]
        print("| best reachable | " + " | ".join("" if cell is None else f"{cell:.4f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
