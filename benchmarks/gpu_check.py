"""One short run on a GPU: do the Triton kernels compute the right thing, how fast are which variants, what may change?

    python benchmarks/gpu_check.py                # under four minutes
    python benchmarks/gpu_check.py --limit 150    # seconds after which nothing new begins

One process has the GPU and takes stage after stage, the most important first: parity with the fp64 reference, the
gradient of the time table before all else; speed of the variants of each kernel; the layer. Others, one for each core,
compile ahead for it, without running anything. Each stage's lines, Markdown, are printed as it ends. A stage that
fails or hangs costs itself alone: the process begins again with the next. At the end stand the cases that are not
right, and the variants that were faster than the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# case:dtype:form of the backward pass (or default). MORE follows what is timed.
PROOF = [
    "causal-both:fp32:default", "years:fp32:default", "long_targets:bf16:default", "causal-both:fp32:tables",
    "ties:fp32:default", "causal-both:fp32:rows", "real128:bf16:default", "long_targets:fp32:default",
    "any_times:fp32:default", "cached_window:fp32:default", "dims16x48_h2:fp32:default",
    "deterministic:long_targets:bf16", "deterministic:long128:bf16", "real64:bf16:default", "real256:bf16:default",
    "real256:fp16:default",
]  # fmt: skip
MORE = [
    "long_targets:bf16:tables", "real128:bf16:one", "real128:bf16:tables", "real64:bf16:stored",
    "causal-both:fp32:stored", "poisoned:long128:bf16", "foreign8:long128:bf16",
    "real256:bf16:split", "causal-both:fp32:split",
    "query_times:bf16:default", "targets-both:fp16:default",
    "contexts_targets_window-both:bf16:default", "long_full:bf16:default", "poisoned:long_targets:bf16",
    "foreign8:long_full:bf16", "causal-dense:bf16:default", "dims25x25_h2:bf16:default", "dropout:250:fp32",
]  # fmt: skip
STAGES = [
    *[f"parity:{case}" for case in PROOF],
    "sweep:backward:128:1", "sweep:forward:128:0", "sweep:backward:128:0", "sweep:forward:128:1",
    "speed:4,128,4096,jagged,0", "speed:4,128,1024,full,0", "speed:4,128,4096,jagged,1", "other:flash",
    "layer:131072", "layer:16384", "layer:4096", "sweep:backward:256:0", "sweep:forward:256:0", "sweep:forward:64:0",
    "sweep:backward:64:0", "sweep:backward:64:1", *[f"parity:{case}" for case in MORE],
    "speed:4,128,4096,candidates,1", "speed:4,128,16384,full,0", "speed:4,128,256,full,0", "other:flex",
]  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LIMIT = {"parity": 45.0, "sweep": 60.0, "speed": 30.0, "other": 40.0, "layer": 45.0}
"""Seconds after which a stage counts as hung, once its compiling is done."""


# --- in the processes that have tasks ---------------------------------------------------------------------------------


def short(config: Any) -> str:
    """A configuration in a few characters."""
    passes = " stored" if config.stored else "" if config.passes == "one" else f" {config.passes}"
    return f"{config.rows}x{config.keys}/{config.warps}w/{config.stages}s{'' if config.tma else '/no tma'}{passes}"


def variants(kind: str, dim: int, bias: bool) -> list[dict[str, Any]]:
    """What a sweep times: configurations by kernel, the tuner's and some more; the first is the default."""
    from genrec.attention.triton.configs import Config, Shape, candidates

    shape = Shape(16, dim, dim, bias, True, False, bias, bias)
    found: list[dict[str, Any]] = [{kind: config} for config in candidates(kind, shape)]  # type: ignore[arg-type]
    if kind == "backward":
        for config in [c[kind] for c in found]:
            others = {"rows": ["backward_rows"], "tables": ["backward_tables"],
                      "split": ["backward_values", "backward_rows"],
                      "stored": ["stored_rows", "stored_tables"]}.get(config.passes, [])  # fmt: skip
            found += [{kind: config, other: c} for other in others for c in candidates(other, shape)[1:]]  # type: ignore[arg-type]
    more = {
        ("forward", 128): [Config(64, 128, 4, 2), Config(128, 64, 8, 4)],
        ("backward", 128): [Config(64, 128, 8, 2, False, "rows"), Config(32, 128, 8, 2, True, "rows")],
        ("backward", 64): [Config(64, 128, 8, 3, True, "rows")],
        ("backward", 256): [Config(64, 64, 8, 2, True, "rows"), Config(32, 64, 8, 1)],
    }
    found += [{kind: config} for config in more.get((kind, dim), []) if {kind: config} not in found]
    return found


def point(dim: int, bias: bool, kind: str = "full", heads: int = 4, length: int = 4096) -> Any:
    """A point of benchmarks/attention.py."""
    from benchmarks.attention import Point

    return Point(heads, dim, length, kind, bias)


def parity(name: str, dtype_name: str, form: str) -> None:
    """One case of tests/parity; raises where it is off."""
    import torch

    from genrec.attention.triton import tuning
    from tests.parity import triton_checks as checks
    from tests.parity.grid import Case, assert_parity

    if name in ("deterministic", "poisoned", "dropout") or name.startswith("foreign"):
        dtype = getattr(torch, DTYPES[form])
        if name == "dropout":
            checks.check_dropout("cuda", int(dtype_name))
        elif name.startswith("foreign"):
            checks.check_surroundings(checks.named(dtype_name), dtype, "cuda", int(name[7:]))
        else:
            getattr(checks, f"check_{name}")(checks.named(dtype_name), dtype, "cuda")
        return
    if name.startswith("real"):
        dim = int(name[4:])
        case = Case(name, lengths=(700, 1, 333, 0), heads=2, qk_dim=dim, v_dim=dim, contexts=(4, 0, 2, 0),
                    targets=(100, 1, 33, 0), position=True, time=True, strided=True)  # fmt: skip
    else:
        case = checks.named(name)
    with tuning.formed(None if form == "default" else form):  # type: ignore[arg-type]
        assert_parity("triton", case, getattr(torch, DTYPES[dtype_name]), "cuda")


def sweep(kind: str, dim: int, bias: bool, only: int | None = None) -> None:
    """A row for each variant of one kernel at S = 4096; with `only` that variant is compiled, and nothing timed."""
    import torch

    from benchmarks.attention import TOKENS, Batch, timed
    from genrec.attention.triton import tuning

    batch = Batch(point(dim, bias), TOKENS if only is None else 8192)
    leaves = [batch.q, batch.k, batch.v, *batch.tables]
    chosen = slice(None) if only is None else slice(only, only + 1)
    for variant in variants(kind, dim, bias)[chosen]:
        name = f"{kind} 4x{dim}{' +bias' if bias else ''}"
        row: dict[str, Any] = {"kernel": name, "variant": " + ".join(map(short, variant.values()))}
        try:
            with tuning.forced_all(variant):
                if kind == "forward":
                    with torch.no_grad():
                        found = timed(batch.attention, 0.08) if only is None else batch.attention()
                else:
                    out = batch.attention()
                    run = lambda: torch.autograd.grad(out, leaves, batch.d_out, retain_graph=True)  # noqa: B023, E731
                    found = timed(run, 0.08) if only is None else run()
            if only is None:
                factor = 1.0 if kind == "forward" else 2.5
                row |= {"ms": found.middle, "least": found.least, "rate": factor * batch.flops() / found.middle / 1e9}
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            row["error"] = f"{type(error).__name__} {str(error)[:100]!r}"
        if only is None:
            print("ROW " + json.dumps(row), flush=True)


def stage(name: str, only_compile: bool = False) -> None:
    """Runs a stage; what it finds goes to stdout, a line of JSON each."""
    head, *rest = name.split(":")
    row: dict[str, Any] = {"stage": name}
    if head == "parity":
        parity(*rest)
        row["ok"] = True
    elif head == "sweep":
        sweep(rest[0], int(rest[1]), rest[2] == "1", int(rest[3]) if only_compile else None)
        return
    elif head in ("speed", "other"):
        from benchmarks.attention import Batch, measure

        heads, dim, length, kind, bias = rest[0].split(",") if head == "speed" else ("4", "128", "4096", "full", "0")
        where = point(int(dim), bias == "1", kind, int(heads), int(length))
        if only_compile:
            if head == "speed":
                batch = Batch(where, 8192)
                batch.attention().sum().backward()
            return
        row["line"] = str(measure(where, "triton" if head == "speed" else rest[0]))
    else:
        from benchmarks import layer

        tokens = 4096 if only_compile else int(rest[0])
        length = min(4096, tokens)
        options = layer.parse(["--quick", "--batch", str(tokens // length), "--length", str(length),
                               "--iterations", "1" if only_compile else "5"])  # fmt: skip
        row["layer"] = layer.measure("gated", options)
    if not only_compile:
        print("ROW " + json.dumps(row), flush=True)


def compile_ahead(name: str) -> None:
    """What a stage would compile, into Triton's cache; the attention's kernels are not run."""
    from genrec.attention.triton import launch, launch_backward

    def start(kernel: Any, call: Any, config: Any, programs: int, arguments: dict[str, Any]) -> None:
        kernel.warmup(**arguments, grid=(programs,))

    if not name.startswith("layer"):
        launch.start = launch_backward.start = start
    try:
        stage(name, only_compile=True)
    except Exception as error:  # what was computed is nonsense, and parity says so
        print(f"{type(error).__name__}", file=sys.stderr)


def serve() -> None:
    """Stages by name from stdin, until it ends."""
    import torch

    from genrec.environment import headline

    torch.cuda.init()
    print("ROW " + json.dumps({"machine": headline()}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        begin = time.perf_counter()
        try:
            stage(name)
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:300]}"
            print("ROW " + json.dumps({"stage": name, "ok": False, "error": message}), flush=True)
            if "CUDA error" in str(error):
                os._exit(1)  # nothing more works in this process
        print("END " + json.dumps({"stage": name, "seconds": time.perf_counter() - begin}), flush=True)


# --- in the process that leads ----------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of the other processes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}


def say(line: str) -> None:
    """To stdout, and into gpu_check.md of the folder that OUT names, if any."""
    print(line, flush=True)
    if os.environ.get("OUT"):
        with Path(os.environ["OUT"], "gpu_check.md").open("a") as file:
            file.write(line + "\n")


class Server:
    """The process that has the GPU."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment(), cwd=ROOT)  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def run(self, name: str, seconds: float, rows: list[dict[str, Any]]) -> bool:
        """Whether the stage came to its end; its rows are added to `rows` and printed."""
        assert self.process.stdin is not None
        with suppress(OSError):  # a dead process is noticed below
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        end = time.perf_counter() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, end - time.perf_counter()))
            except queue.Empty:
                say(f"| {name} | **hung**: ended after {seconds:.0f} s |")
                break
            if line is None:
                say(f"| {name} | **the process died** |")
                break
            kind, _, body = line.partition(" ")
            if kind == "ROW":
                rows.append(json.loads(body))
                say(shown(rows[-1]))
            elif kind == "END":
                return True
        self.process.kill()
        return False


def shown(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    if "machine" in row:
        return f"\n{row['machine']}\n"
    if "kernel" in row:
        return f"| {row['kernel']} | {row['variant']} | " + (
            row["error"] if "error" in row else f"{row['ms']:.3f} ({row['least']:.3f}) ms | {row['rate']:.0f} TFLOP/s |"
        )
    if "layer" in row:
        return "\n".join(f"| {row['stage']} | {line} |" for line in row["layer"])
    if "line" in row:
        return str(row["line"])
    return f"| {row['stage']} | {'ok' if row.get('ok') else '**FAILED** ' + str(row.get('error'))} |"


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Which cases are right, and which variants beat the defaults."""
    passed = {row["stage"].removeprefix("parity:") for row in rows if row.get("ok")}
    lines = ["", "## What follows", ""]
    missing = [case for case in [*PROOF, *MORE] if case not in passed]
    lines.append(f"- wrong or not run: {', '.join(missing)}" if missing else f"- right: all {len(passed)} cases")
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            kernels.setdefault(row["kernel"], []).append(row)
    for kernel, found in kernels.items():
        best = min(found, key=lambda row: row["ms"])
        gain = found[0]["ms"] / best["ms"] - 1
        lines.append(f"- {kernel}: default {found[0]['variant']} {found[0]['ms']:.3f} ms, best {best['variant']} "
                     f"{best['ms']:.3f} ms{f' (make it the default: {gain:.0%})' if gain > 0.02 else ''}")  # fmt: skip
    for dim in (64, 128, 256):
        plain, biased = (min((row["ms"] for row in kernels.get(f"backward 4x{dim}{bias}", [])), default=None)
                         for bias in ("", " +bias"))  # fmt: skip
        if plain and biased:
            lines.append(f"- backward 4x{dim}: with the bias {biased / plain:.2f} times the time without (target 1.35)")
    return lines


def main() -> int:
    """Prints what comes of it; always 0, since the lines say what failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--limit", type=float, default=225.0, help="seconds after which no stage begins")
    p.add_argument("--workers", type=int, default=max(2, min(14, (os.cpu_count() or 4) - 2)))
    p.add_argument("--only", help="stages whose name holds this")
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--compile", help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.serve:
        serve()
        return 0
    if options.compile:
        compile_ahead(options.compile)
        return 0
    begin = time.perf_counter()
    stages = [name for name in STAGES if not options.only or options.only in name]
    rows: list[dict[str, Any]] = []
    say("| stage | result |\n|---|---|")
    with ThreadPoolExecutor(options.workers) as pool:
        ahead = {name: [pool.submit(_compile, part, begin + options.limit) for part in parts(name)] for name in stages}
        server = Server()
        waiting = list(stages)
        while waiting and time.perf_counter() - begin < options.limit:
            name = _next(waiting, ahead)
            if name is None:
                time.sleep(0.2)
                continue
            waiting.remove(name)
            left = options.limit + 12 - (time.perf_counter() - begin)
            if not server.run(name, min(LIMIT[name.split(":")[0]], left), rows):
                server = Server()
        for futures in ahead.values():
            for future in futures:
                future.cancel()
        for name in waiting:
            say(f"| {name} | no time left |")
        server.process.kill()
    for line in [*verdict(rows), f"- {time.perf_counter() - begin:.0f} s in all"]:
        say(line)
    return 0


def parts(name: str) -> list[str]:
    """What is compiled ahead for a stage, each in a process of its own."""
    if name.startswith("sweep"):
        _, kind, dim, bias = name.split(":")
        return [f"{name}:{n}" for n in range(len(variants(kind, int(dim), bias == "1")))]
    return [] if name.startswith("other") else [name]


def _next(waiting: list[str], ahead: dict[str, list[Future[None]]]) -> str | None:
    """The first stage that is compiled. What is timed waits until all parity that comes before it is done."""
    for name in waiting:
        if all(future.done() for future in ahead[name]):
            return name
        if not name.startswith("parity"):
            return None
    return None


def _compile(name: str, end: float) -> None:
    """A process of its own, no longer than there is time."""
    left = end - time.perf_counter()
    if left > 1:
        command = [sys.executable, str(Path(__file__).resolve()), "--compile", name]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=left, env=environment(), cwd=ROOT, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
