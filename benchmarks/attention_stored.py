"""The Triton kernels that store a relative bias and the gradients of the scores, one by one on a GPU.

    python benchmarks/attention_stored.py                            # 4 heads of 128, S = 4096: a minute
    python benchmarks/attention_stored.py --dim 64 --lengths 4096 1024
    python benchmarks/attention_stored.py --only bias forward        # these kernels, then the whole passes

Each kernel is launched with several blocks. What comes of it is compared with the fp64 reference on a small batch
(sequences of 700, 1, 333 and 366 tokens, then the same with contexts and targets) before it is timed; a launch is timed
without Python's share. The whole passes follow, beside those that store nothing, which they are compared with as well.
Processes, one for each core, compile ahead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.attention import TOKENS, Batch, Point, timed  # noqa: E402
from benchmarks.attention_backward import BOUND, Small, call_of, compile_only  # noqa: E402
from genrec.attention import AttentionMask  # noqa: E402
from genrec.attention.triton import launch, launch_backward, launch_stored, tuning  # noqa: E402
from genrec.attention.triton.configs import Config, Kind  # noqa: E402
from genrec.environment import headline  # noqa: E402

BEFORE: dict[Kind, Config] = {
    "forward": Config(64, 64, 4, 2),
    "backward": Config(64, 128, 8, 2, tma=False, passes="tables"),
    "backward_tables": Config(64, 64, 8, 2),
}
"""Blocks of the forms that store nothing, 4 x 128."""
WRITER = Config(64, 64, 4, 2, passes="stored")
"""Of the gradients of the scores that others read."""


@dataclass(frozen=True)
class Part:
    """A launch of one kernel."""

    name: str
    wanted: tuple[str, ...]
    """What comes of it."""
    config: Config
    lines: int = 0
    """Of a tile at a time, for the kernel that computes the bias."""
    settings: tuple[tuple[str, int], ...] = ()
    """Of `launch_stored`."""

    def __str__(self) -> str:
        c = self.config
        more = ("" if c.tma else ", no TMA") + f", {self.lines} lines" * bool(self.lines)
        more += "".join(f", {name} {value}" for name, value in self.settings)
        return f"{c.rows} x {c.keys}, {c.warps} warps, {c.stages}{more}"


def parts() -> list[Part]:
    """What is timed; blocks are rows x keys."""
    fill = [(32, 4, 4), (32, 4, 8), (32, 4, 2), (32, 4, 1), (16, 4, 4), (64, 4, 4), (32, 8, 4), (32, 2, 4)]
    forward = [(128, 64, 4, 2, 1), (128, 64, 4, 2, 0), (128, 64, 4, 2, 2), (128, 64, 8, 3, 1), (128, 64, 4, 3, 1)]
    keys = [(64, 64, 4, 2), (64, 128, 8, 3), (64, 64, 4, 1), (32, 64, 4, 3)]
    rows = [(128, 64, 4, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 32, 4, 4)]
    tables = [(64, 4, 4, 1024), (64, 4, 8, 1024), (64, 4, 2, 1024), (64, 4, 4, 672)]
    return [
        *(Part("bias of rows", ("out",), Config(128, 64, warps, 1, stored=True), lines,
               (("FILL_PARTS", programs),)) for lines, warps, programs in fill),
        *(Part("forward computed", ("out",), Config(*block))
          for block in ((64, 64, 4, 2), (128, 64, 8, 3))),
        *(Part("forward", ("out",), Config(*block, stored=True), 0, (("BIAS_AHEAD", ahead),))
          for *block, ahead in forward),
        *(Part("position alone", (), Config(*block)) for block in ((64, 64, 4, 2), (128, 64, 4, 2))),
        *(Part("no bias", (), Config(*block)) for block in ((128, 64, 4, 2),)),
        *(Part("bias of keys", ("dk", "dv"), Config(64, 64, warps, 1, passes="stored"), lines,
               (("FILL_PARTS", programs),)) for lines, warps, programs in fill),
        *(Part("keys", ("dk", "dv"), Config(*block, passes="stored")) for block in keys),
        *(Part("rows", ("dq",), Config(*block)) for block in rows),
        *(Part("tables", ("d_position", "d_time"), Config(block, block, warps, 1), 0,
               (("PARTS", programs), ("REGISTERS", registers))) for block, warps, programs, registers in tables),
    ]  # fmt: skip


@contextmanager
def settings(part: Part) -> Iterator[None]:
    """Of `launch_stored`, meanwhile."""
    before = {name: getattr(launch_stored, name) for name, _ in part.settings}
    try:
        for name, value in part.settings:
            setattr(launch_stored, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(launch_stored, name, value)


def launcher(part: Part, call: launch.Call, d_out: Tensor) -> tuple[Callable[[], object], Callable[[], dict[str, Any]]]:
    """A function that launches the kernel, what others make for it being there; and one for what comes of it."""
    config, of_keys = part.config, part.config.passes == "stored"
    if part.name in ("position alone", "no bias"):
        call = replace(call, time=None, timestamps=None, position=call.position if part.name[0] == "p" else None)
    fill = partial(launch_stored.fill_bias, call, config, of_keys)
    if part.lines:
        fill = partial(launch_stored.fill_bias, call, config, of_keys, part.lines, config.warps)
    if not part.wanted or part.wanted == ("out",):
        out = torch.zeros_like(d_out)
        tiles = fill() if config.stored else None
        run = partial(launch.launch_forward, call, out, config, tiles)
        if part.lines:  # with the blocks that its tiles are for
            launch.launch_forward(call, out, replace(config, warps=8, stages=2), tiles)
        return fill if part.lines else run, lambda: {"out": out}
    gradients = launch_backward.Gradients(call, [True, True, False])
    gradients.begin("stored")
    writer = config if of_keys else WRITER
    gradients.bias = fill() if of_keys else launch_stored.fill_bias(call, writer, True)
    keys = partial(launch_backward.launch_keys, call, d_out, gradients, writer)

    def results() -> dict[str, Any]:
        found = {name: getattr(gradients, name) for name in ("dq", "dk", "dv", "d_position", "d_time")}
        return {name: x.sum(0) if name[1] == "_" and x is not None else x for name, x in found.items()}

    if part.lines:
        launch_backward.launch_keys(call, d_out, gradients, replace(WRITER, tma=config.tma))
        return fill, results
    if part.name == "keys":
        return keys, results
    keys()
    if part.name == "rows":
        return partial(launch_backward.launch_stored_rows, call, gradients, config), results

    return partial(launch_backward.launch_stored_tables, call, gradients, writer, config), results


def contexts_and_targets(device: torch.device) -> AttentionMask:
    """Of four sequences."""
    return AttentionMask(torch.tensor([3, 0, 0, 5], device=device), torch.tensor([70, 1, 64, 33], device=device), 2)


def with_contexts(small: Small) -> Small:
    """The same batch with contexts and targets."""
    device, cuts = small.batch.q.device, tuple(small.batch.offsets[1:].tolist())
    return Small(small.batch.point.dim, True, str(device), cuts, contexts_and_targets(device))


PASSES = ("as before", "default", "default, contexts and targets")


def compile_part(dim: int, number: int) -> str:
    """In a process of its own: into Triton's cache; nothing is run. Below zero are whole passes."""
    compile_only()
    batch = Batch(Point(4, dim, 256, "full", True), 1024)
    if number < 0:
        if PASSES[number] == PASSES[2]:
            batch.mask = contexts_and_targets(batch.q.device)
        with tuning.forced_all(BEFORE if PASSES[number] == PASSES[0] else {}):
            whole(batch)
        return ""
    part = parts()[number]
    try:
        with settings(part):
            launcher(part, call_of(batch), batch.d_out)[0]()
    except Exception as error:
        return f"{part.name} {part}: {type(error).__name__} {str(error)[:100]}"
    return ""


def error_of(small: Small, part: Part) -> float:
    """Largest error of what the kernel makes, as a share of the largest value."""
    with settings(part):
        run, results = launcher(part, call_of(small.batch), small.batch.d_out)
        run()
        made = results()
    return max(small.distance(name, made[name]) for name in part.wanted)


def whole(batch: Batch) -> list[Tensor]:
    """Output and gradients."""
    out = batch.attention()
    return [out.detach(), *torch.autograd.grad(out, [batch.q, batch.k, batch.v, *batch.tables], batch.d_out)]


def main() -> int:
    """1 where something is wrong."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, choices=[64, 128], default=128)
    p.add_argument("--lengths", type=int, nargs="+", default=[4096])
    p.add_argument("--only", nargs="+", default=[""], metavar="START", help="kernels whose names begin so")
    options = p.parse_args()
    dim, begin, wrong = options.dim, time.perf_counter(), 0
    numbers = [n for n, part in enumerate(parts()) if part.name.startswith(tuple(options.only))]
    wanted = [parts()[n] for n in numbers]
    with multiprocessing.get_context("spawn").Pool(min(len(wanted) + 3, os.cpu_count() or 4)) as pool:
        for line in pool.starmap(compile_part, [(dim, n) for n in (-3, -2, -1, *numbers)], 1):
            if line:
                print(line)
    print(f"{headline()}\n\n4 heads of {dim}, bf16, causal, relative bias, {TOKENS} tokens; "
          f"compiled in {time.perf_counter() - begin:.0f} s\n", flush=True)  # fmt: skip
    small = Small(dim, True)
    batches = {length: Batch(Point(4, dim, length, "full", True), TOKENS) for length in options.lengths}
    calls = {length: call_of(batch) for length, batch in batches.items()}
    print("| kernel | blocks (rows x keys), stages | error | " + " | ".join(f"S = {n}, ms (least)" for n in batches)
          + " |\n|---|---|---:" + "|---:" * len(batches) + "|", flush=True)  # fmt: skip
    best: dict[str, tuple[float, Config]] = {}
    for part in wanted:
        try:
            off = error_of(small, part) if part.wanted else 0.0
            cells = [f"{off:.1e}" if off < BOUND else f"**{off:.1e}**"] if part.wanted else ["not compared"]
            wrong += not off < BOUND
            for length, batch in batches.items():
                with settings(part):
                    took = timed(launcher(part, calls[length], batch.d_out)[0], 0.03)
                cells.append(f"{took.middle:.3f} ({took.least:.3f})")
                if off < BOUND and length == options.lengths[0]:
                    best[part.name] = min(best.get(part.name, (float("inf"), part.config)), (took.middle, part.config),
                                          key=lambda pair: pair[0])  # fmt: skip
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            cells, wrong = [f"{type(error).__name__} {str(error)[:80]!r}"], wrong + 1
        print(f"| {part.name} | {part} | {' | '.join(cells)} |", flush=True)
    names: dict[str, Kind] = {
        "forward": "forward",
        "keys": "backward",
        "rows": "stored_rows",
        "tables": "stored_tables",
    }
    fastest = {kind: best[name][1] for name, kind in names.items() if name in best}
    masked = with_contexts(small)
    found: list[list[Tensor]] = []
    for name, configs in (("as before", BEFORE), ("default", {}), ("fastest", fastest)):
        with tuning.autotune(False), tuning.forced_all(configs):
            checked = [small, masked] if name == "default" else [small]
            offs = [max(s.distance(n, x) for n, x in zip(s.names, whole(s.batch), strict=True)) for s in checked]
            wrong += not max(offs) < BOUND
            cells = [", masked ".join(f"{off:.1e}" for off in offs)]
            for length, batch in batches.items():
                if length == options.lengths[0]:
                    found.append(whole(batch))
                with torch.no_grad():
                    ahead = timed(batch.attention, 0.05)
                out, leaves = batch.attention(), [batch.q, batch.k, batch.v, *batch.tables]
                took = timed(lambda: torch.autograd.grad(out, leaves, batch.d_out, retain_graph=True), 0.05)  # noqa: B023
                cells.append(f"{ahead.middle:.3f} ({ahead.least:.3f}); {took.middle:.3f} ({took.least:.3f})")
        print(f"| whole passes | {name} | {' | '.join(cells)} |", flush=True)
    for name, results in zip(("default", "fastest"), found[1:], strict=True):
        far = [((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
               for x, y in zip(results, found[0], strict=True)]  # fmt: skip
        wrong += not max(far) < BOUND
        print(f"{name} and before at S = {options.lengths[0]}, largest difference of out, dq, dk, dv and tables: "
              + ", ".join(f"{x:.1e}" for x in far))  # fmt: skip
    print(f"\n{wrong} wrong; {time.perf_counter() - begin:.0f} s in all; peak of memory "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
