"""Peak memory and time of preparing a synthetic log: how large a log fits a small machine.

    python benchmarks/cache_memory.py --events 20_000_000

Each size is prepared in a process of its own, in a folder that is removed afterwards. Peak memory is the process's
largest resident set, the interpreter and its libraries included; "at start" is the same before the first event.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

EVENTS_PER_USER = 60


def resident() -> float:
    """Largest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(events: int) -> dict[str, float]:
    """Prepare a log of so many events in this process."""
    from genrec.data import prepare
    from genrec.data.readers import Synthetic

    reader = Synthetic(num_users=events // EVENTS_PER_USER, num_items=20_000, events_per_user=EVENTS_PER_USER)
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = prepare(reader, folder, progress=False)
        seconds = time.perf_counter() - start
        assert store.path is not None
        size = sum(file.stat().st_size for file in store.path.iterdir())
        return {
            "events": store.num_events, "users": store.num_users, "before": before, "peak": resident(),
            "seconds": seconds, "disk": size / 2**20,
        }  # fmt: skip


def main() -> None:
    """One process a size, then a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", nargs="+", type=int, default=[20_000_000])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.events[0])))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "polars"))
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {packages}\n")
    print("| events | users | peak MiB | at start MiB | prepared MiB on disk | seconds |\n|---|---|---|---|---|---|")
    for events in args.events:
        words = [sys.executable, str(Path(__file__)), "--child", "--events", str(events)]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        row = json.loads(out.strip().splitlines()[-1])
        print(
            f"| {row['events']:,} | {row['users']:,} | {row['peak']:.0f} | {row['before']:.0f} "
            f"| {row['disk']:.0f} | {row['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
