"""A short look at the attention kernels on a GPU: do they compute the right thing, and how fast are they?

    python benchmarks/gpu_check.py                # about two minutes
    python benchmarks/gpu_check.py --limit 140    # seconds after which nothing new begins

Every part runs in a process of its own, so that one that fails leaves the others alone. First parity with the fp64
reference and the compiling of all that is timed later, side by side on all cores; then speed, alone on the GPU, most
important first, for several configurations of each kernel. Lines come as they are known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PARITY = [
    "causal-none:bf16,causal-both:bf16,targets-both:bf16,contexts_targets_window-both:bf16",
    "causal-none:fp32,causal-both:fp32,years:fp32,long_targets:fp32",
    "long:bf16,long_targets:bf16,long_window:bf16,long_full:bf16",
    "dims64x64_h2:bf16,dims64x64_h2:fp16,dims32x128_h1:bf16,dims128x32_h1:bf16",
    "dims25x25_h2:bf16,dims50x50_h1:fp16,dims1x3_h2:bf16,dims16x48_h2:fp32",
    "causal-dense:bf16,dense_bias_heads:bf16,targets-dense:fp32,cached_dense_bias:bf16",
    "ties:fp32,any_times:fp32,query_times:bf16,few_buckets:fp32,one_bucket:bf16",
    "cached_targets:bf16,cached_long:bf16,cached_window:fp32,tensor_scale:fp16",
    "full_window-both:bf16,targets_group3_partial-both:bf16,only_contexts_or_targets-both:bf16,empty_first_last:bf16",
    "real128:bf16,real64:bf16,real256:bf16",
    "deterministic:long_targets,deterministic:dense_bias_heads,poisoned:long_targets,dropout:250",
    "foreign1:long_targets,foreign8:dims64x64_h2,foreign8:long_full",
]
LAYER = ["layer_parity:gated", "layer_parity:production", "layer_parity:paper", "layer_parity:tokens", "layer:compile"]
"""The layer around attention, from benchmarks/layer.py: parity, and the compiling of what "layer:quick" times."""

SPEED = [
    "speed:4,128,4096,full,0", "speed:4,128,4096,full,1", "layer:quick", "sweep:forward,128,0", "sweep:backward,128,0",
    "sweep:forward,128,1", "sweep:backward,128,1", "other:flash", "speed:4,128,4096,jagged,0",
    "sweep:backward,256,0", "sweep:forward,256,0", "sweep:forward,64,0", "sweep:backward,64,0", "other:flex",
    "speed:4,128,4096,candidates,1", "speed:4,128,1024,full,0", "speed:4,128,1024,full,1", "speed:4,128,256,full,0",
    "speed:4,128,16384,full,0", "speed:8,128,4096,jagged,1",
]  # fmt: skip
COMPILE = [
    *[f"compile:{kind},{dim},{bias},{n}" for dim, bias in ((128, 0), (128, 1)) for kind in ("forward", "backward")
      for n in range(8)],
    *[f"compile:{kind},{dim},0,{n}" for dim in (256, 64) for kind in ("forward", "backward") for n in range(5)],
    "compile_kind:jagged,0", "compile_kind:candidates,1",
]  # fmt: skip


def configs(kind: str, dim: int) -> list:
    """The tuner's list and some more."""
    from genrec.attention.triton.configs import Config, Shape, candidates

    found = candidates(kind, Shape(16, dim, dim, False, True, False))
    more = {
        ("forward", 128): [(128, 128, 8, 2, False), (64, 128, 4, 2), (128, 64, 8, 4)],
        ("backward", 128): [(64, 128, 8, 2, False), (64, 128, 8, 1), (64, 64, 4, 1), (128, 64, 8, 1)],
        ("forward", 64): [(128, 128, 8, 3)],
        ("backward", 64): [(64, 128, 8, 3)],
        ("backward", 256): [(32, 64, 8, 1)],
        ("forward", 256): [(128, 64, 8, 1)],
    }
    return list(dict.fromkeys([*found, *(Config(*values) for values in more.get((kind, dim), []))]))


def parity(name: str, how: str) -> None:
    """One case of tests/parity."""
    import torch

    from tests.parity import triton_checks as checks
    from tests.parity.grid import Case, assert_parity

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name == "dropout":
        checks.check_dropout("cuda", int(how))
    elif name.startswith("foreign"):
        checks.check_surroundings(checks.named(how), torch.bfloat16, "cuda", int(name[7:]))
    elif name in ("deterministic", "poisoned"):
        getattr(checks, f"check_{name}")(checks.named(how), torch.bfloat16, "cuda")
    elif name.startswith("real"):
        dim = int(name[4:])
        case = Case(name, lengths=(700, 1, 333, 0), heads=2, qk_dim=dim, v_dim=dim, contexts=(4, 0, 2, 0),
                    targets=(100, 1, 33, 0), position=True, time=True, strided=True)  # fmt: skip
        assert_parity("triton", case, dtypes[how], "cuda")
    else:
        assert_parity("triton", checks.named(name), dtypes[how], "cuda")


def _point(dim: int, bias: bool, kind: str = "full", heads: int = 4, length: int = 4096):
    from benchmarks.attention import Point

    return Point(heads, dim, length, kind, bias)


def sweep(kind: str, dim: int, bias: bool) -> None:
    """A line for each configuration of one kernel at S = 4096."""
    import torch

    from benchmarks.attention import TOKENS, Batch, timed
    from genrec.attention.triton import tuning

    batch = Batch(_point(dim, bias), TOKENS)
    for config in configs(kind, dim):
        try:
            with tuning.forced(kind, config):
                if kind == "forward":
                    with torch.no_grad():
                        found = timed(batch.attention, 0.1)
                    rate = batch.flops() / found.middle / 1e9
                else:
                    out = batch.attention()
                    leaves = [batch.q, batch.k, batch.v, *batch.tables]
                    found = timed(lambda: torch.autograd.grad(out, leaves, batch.d_out, retain_graph=True), 0.1)  # noqa: B023
                    rate = 2.5 * batch.flops() / found.middle / 1e9
            print(f"  {kind} 4x{dim} bias={int(bias)} {config}: {found.middle:.3f} ms, {rate:.0f} TFLOP/s", flush=True)
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            print(f"  {kind} 4x{dim} bias={int(bias)} {config}: {type(error).__name__} {str(error)[:120]}", flush=True)


def compile_one(kind: str, dim: int, bias: bool, number: int) -> None:
    """Fills Triton's cache for one line of a sweep."""
    import torch

    from benchmarks.attention import Batch
    from genrec.attention.triton import tuning

    found = configs(kind, dim)
    if number >= len(found):
        return
    batch = Batch(_point(dim, bias), 8192)
    with tuning.forced(kind, found[number]):
        if kind == "forward":
            batch.attention()
        else:
            torch.autograd.grad(batch.attention(), [batch.q, batch.k, batch.v, *batch.tables], batch.d_out)
    torch.cuda.synchronize()


def task(name: str) -> None:
    """Runs one part in this process; its lines go to stdout."""
    head, _, rest = name.partition(":")
    if head == "machine":
        from benchmarks.attention import machine

        print(" ", machine(), flush=True)
    elif head == "speed":
        from benchmarks.attention import measure

        heads, dim, length, kind, bias = rest.split(",")
        print(" ", measure(_point(int(dim), bias == "1", kind, int(heads), int(length)), "genrec"), flush=True)
    elif head == "other":
        from benchmarks.attention import measure

        print(" ", measure(_point(128, False), rest), flush=True)
    elif head == "sweep":
        kind, dim, bias = rest.split(",")
        sweep(kind, int(dim), bias == "1")
    elif head == "compile":
        kind, dim, bias, number = rest.split(",")
        compile_one(kind, int(dim), bias == "1", int(number))
    elif head == "compile_kind":
        from benchmarks.attention import check

        kind, bias = rest.split(",")
        print(f"  ok {kind} bias={bias} 4x128: error {check(_point(128, bias == '1', kind))}", flush=True)
    elif head == "layer_parity":
        from benchmarks import layer

        print("  ", end="")
        if rest == "tokens":
            layer.parity_of_tokens()
        else:
            layer.parity([rest])
    elif head == "layer":
        from benchmarks import layer

        # Rows that 16 divides, as those of the timed run, so that the same kernels are compiled.
        small = ["--batch", "2", "--length", "2048", "--iterations", "1"] if rest == "compile" else []
        layer.main(["--quick", "--no-parity", *small])
    else:
        for case in name.split(","):
            begin = time.perf_counter()
            try:
                parity(*case.split(":"))
                print(f"  ok   {case} ({time.perf_counter() - begin:.1f} s)", flush=True)
            except Exception as error:
                lines = traceback.format_exc().strip().splitlines()
                where = [line.strip() for line in lines if "File" in line][-1:]
                print(f"  FAIL {case}: {type(error).__name__}: {str(error)[:400]} {where}", flush=True)
                if "CUDA error" in str(error):
                    return


CUTLASS = "libgenrec_attention.so"
_say = threading.Lock()


def say(line: str) -> None:
    """To stdout, and into gpu_check.txt of the folder that OUT names, if any."""
    print(line, flush=True)
    if os.environ.get("OUT"):
        with Path(os.environ["OUT"], "gpu_check.txt").open("a") as file:
            file.write(line + "\n")


def run_apart(name: str, limit: float) -> None:
    """A task in its own process; its output is printed when it ends."""
    if limit < 3:
        with _say:
            say(f"- {name}: no time left")
        return
    begin = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--task", name]
    environment = os.environ | {
        "GENREC_TRITON_UNPROVEN": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
    }
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, cwd=ROOT)
        shown, errors, status = done.stdout, done.stderr, "" if done.returncode == 0 else f" EXIT {done.returncode}"
    except subprocess.TimeoutExpired as error:
        shown = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        errors, status = "", f" TIMEOUT after {limit:.0f} s"
    with _say:
        if shown or status:
            say(f"- {name}{status} ({time.perf_counter() - begin:.1f} s)\n{shown}".rstrip())
        if status:
            say("  " + "\n  ".join(line[:300] for line in errors.strip().splitlines()[-6:]))


def interleaved() -> Iterator[str]:
    """Compiling and parity, what is needed first at the front."""
    yield from COMPILE[:2]
    yield from PARITY[:4]
    yield from LAYER
    yield from COMPILE[2:20]
    yield from PARITY[4:]
    yield from COMPILE[20:]


def cutlass(left: float) -> None:
    """The CUTLASS kernels, where a library of them lies in .gpu (or genrec/_lib); variants beside it: times only."""
    built = [folder for folder in (ROOT / ".gpu", ROOT / "genrec" / "_lib") if (folder / CUTLASS).is_file()][:1]
    if not built:
        say(f"- cutlass: no {CUTLASS} in .gpu or genrec/_lib")
        return
    variants = sorted(path.parent for path in built[0].glob(f"*/{CUTLASS}"))
    script, end = str(Path(__file__).with_name("cutlass_check.py")), time.perf_counter() + left
    for folder, options in [(built[0], []), *[(variant, ["--only", "time"]) for variant in variants]]:
        seconds = min(30.0 if not options else 12.0, end - time.perf_counter())
        say(f"- cutlass {folder.relative_to(ROOT)}")
        command = [sys.executable, script, "--library", str(folder), "--seconds", str(seconds), *options]
        try:  # it watches its own child; this is for the case that it can't
            done = subprocess.run(command, timeout=max(seconds, 0.0) + 10, cwd=ROOT, capture_output=True)
            shown, status = done.stdout + done.stderr, ""
        except subprocess.TimeoutExpired as error:
            shown, status = error.stdout or b"", "  TIMEOUT"
        say(shown.decode(errors="replace").rstrip() + status)


def main() -> int:
    """Prints what comes of it; always 0, since the lines say what failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--limit", type=float, default=145.0, help="seconds in all")
    p.add_argument("--workers", type=int, default=max(2, min(14, (os.cpu_count() or 4) - 2)))
    p.add_argument("--task", help="one part, in this process")
    options = p.parse_args()
    if options.task:
        task(options.task)
        return 0
    begin = time.perf_counter()
    say(f"{os.cpu_count()} cores, {options.workers} workers")
    run_apart("machine", 60)
    with ThreadPoolExecutor(options.workers) as pool:
        half = 0.5 * options.limit
        for name in interleaved():
            pool.submit(lambda name=name: run_apart(name, half - (time.perf_counter() - begin)))
    say(f"== cutlass, after {time.perf_counter() - begin:.0f} s")
    cutlass(options.limit - (time.perf_counter() - begin))
    say(f"== speed, after {time.perf_counter() - begin:.0f} s")
    for name in SPEED:
        run_apart(name, min(40.0, options.limit - (time.perf_counter() - begin)))
    say(f"== done after {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
