"""The kernels of the Triton backward pass one by one on a GPU, with several blocks each, and the whole pass.

    python benchmarks/attention_backward.py                          # 4 heads of 256, S = 4096 and 1024: under a minute
    python benchmarks/attention_backward.py --bias                   # the same with a relative bias
    python benchmarks/attention_backward.py --dim 128 --bias --lengths 4096

Processes, one for each core, compile ahead. Each kernel's results are compared with the fp64 reference on a small batch
(sequences of 700, 1, 333 and 366 tokens) before it is timed; a launch is timed without Python's share. The whole pass
follows: the default, the other forms, and "split" with the fastest blocks of each of its kernels. TFLOP/s count the
products that a kernel makes, causal (one product: H S^2 D for each sequence), for the whole pass the usual five.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.attention import TOKENS, Batch, Point, timed  # noqa: E402
from genrec.attention import AttentionMask  # noqa: E402
from genrec.attention.triton import launch, launch_backward, tuning  # noqa: E402
from genrec.attention.triton.configs import Config, Kind, Passes  # noqa: E402
from genrec.environment import headline  # noqa: E402

BOUND = 0.02
"""Of the largest value of a gradient."""


@dataclass(frozen=True)
class Part:
    """A launch of one kernel: which gradients it makes, and in which form."""

    name: str
    kind: Kind
    passes: Passes
    products: int
    config: Config

    def __str__(self) -> str:
        c = self.config
        return f"{c.rows} x {c.keys}, {c.warps} warps, {c.stages}{'' if c.tma else ', no TMA'}"


def parts(dim: int, bias: bool) -> list[Part]:
    """What is timed; blocks are rows x keys."""
    blocks: dict[tuple[str, Kind, Passes, int], list[tuple[Any, ...]]] = {}
    dv: tuple[str, Kind, Passes, int] = ("dv", "backward_values", "split", 2)
    dk: tuple[str, Kind, Passes, int] = ("dk", "backward", "split", 3)
    dq: tuple[str, Kind, Passes, int] = ("dq", "backward_rows", "split", 3)
    both: tuple[str, Kind, Passes, int] = ("dk, dv", "backward", "rows", 4)
    tables: tuple[str, Kind, Passes, int] = ("tables", "backward_tables", "tables", 2)
    if dim == 256:
        blocks[dv] = [(64, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 2)]
        blocks[dk] = [(32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 1), (64, 64, 8, 2), (32, 64, 4, 1)]
        blocks[dq] = [(128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1), (64, 64, 8, 2), (64, 32, 4, 1)]
        blocks[both] = [(64, 64, 8, 2)]
        blocks[tables] = [(64, 64, 8, 1), (32, 64, 8, 2)]
    else:
        blocks[dv] = [(64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)]
        blocks[dk] = [(64, 128, 8, 2), (64, 64, 4, 2)]
        blocks[dq] = [(64, 64, 4, 2), (128, 64, 8, 2)]
        blocks[both] = [(64, 128, 8, 2), (64, 128, 8, 2, False)]
        blocks[tables] = [(64, 64, 8, 2), (64, 128, 8, 2)]
    if bias:
        blocks["dk, dv, dq", "backward", "tables", 5] = [(64, 128, 8, 2, False) if dim < 256 else (64, 64, 8, 1)]
        blocks["dq, tables", "backward_rows", "rows", 3] = [(64, 64, 4, 2) if dim < 256 else (64, 64, 8, 1)]
    else:
        del blocks[tables]
    return [Part(*key, Config(*block)) for key, found in blocks.items() for block in found]


def call_of(batch: Batch) -> launch.Call:
    """What the batch's attention gives to the launches."""
    bias = batch.bias
    position, table, times = (None, None, None) if bias is None else (*batch.tables, batch.times)
    q, k, v, position, table = (None if x is None else x.detach() for x in (batch.q, batch.k, batch.v, position, table))
    return launch.Call(q, k, v, batch.offsets, batch.offsets, None, None, None, position, table, times, None, None,
                       batch.max_len, batch.max_len, 1, -1, True, batch.point.dim**-0.5, 1 / batch.max_len, 0.0, 0,
                       False, True)  # fmt: skip


def launcher(part: Part, call: launch.Call, d_out: Tensor) -> tuple[Callable[[], None], launch_backward.Gradients]:
    """A function that launches the kernel, and what it fills."""
    gradients = launch_backward.Gradients(call, [True, True, False])
    gradients.begin(part.passes)
    starts = {
        "backward": launch_backward.launch_keys,
        "backward_values": launch_backward.launch_values,
        "backward_rows": launch_backward.launch_rows,
        "backward_tables": launch_backward.launch_tables,
    }
    return partial(starts[part.kind], call, d_out, gradients, part.config), gradients


class Small:
    """A small batch with its gradients in fp64: blocks whole and cut, and rows that belong to the next sequence."""

    def __init__(
        self, dim: int, bias: bool, device: str = "cuda", cuts: tuple[int, ...] = (700, 701, 1034, 1400),
        mask: AttentionMask | None = None,
    ) -> None:  # fmt: skip
        self.batch, exact = (Batch(Point(4, dim, cuts[0], "full", bias), cuts[-1], dtype, device)
                             for dtype in (torch.bfloat16, torch.float64))  # fmt: skip
        self.batch.offsets = exact.offsets = torch.tensor([0, *cuts], device=device)
        if mask is not None:
            self.batch.mask = exact.mask = mask
        leaves = [exact.q, exact.k, exact.v, *exact.tables]
        self.reference: dict[str, Tensor] = {}
        with torch.no_grad():
            given = (self.batch.q, self.batch.k, self.batch.v, self.batch.d_out)
            for mine, theirs in zip((exact.q, exact.k, exact.v, exact.d_out), given, strict=True):
                mine.copy_(theirs)
        out = exact.attention("torch")
        found = torch.autograd.grad(out, leaves, exact.d_out)
        self.reference = dict(zip(("dq", "dk", "dv", "d_position", "d_time"), found, strict=False))
        self.names = ("out", *self.reference)
        self.reference["out"] = out.detach()

    def error(self, part: Part) -> float:
        """Largest error of what the kernel makes, as a share of the largest value."""
        run, gradients = launcher(part, call_of(self.batch), self.batch.d_out)
        run()
        made = {"dv": gradients.dv, "dk": gradients.dk, "dq": gradients.dq}
        if gradients.dq is None and gradients.dq_sum is not None:
            made["dq"] = gradients.dq_sum
        wanted = part.name.replace("tables", "d_position, d_time").split(", ")
        for name in ("d_position", "d_time"):
            copies = getattr(gradients, name)
            made[name] = None if copies is None else copies.sum(0)
        return max(self.distance(name, made[name]) for name in wanted)

    def error_of_pass(self) -> float:
        """The same for a whole pass, as it is configured now."""
        batch = self.batch
        found = torch.autograd.grad(batch.attention(), [batch.q, batch.k, batch.v, *batch.tables], batch.d_out)
        return max(self.distance(name, x) for name, x in zip(self.names[1:], found, strict=True))

    def distance(self, name: str, found: Tensor | None) -> float:
        """As a share of the largest value; what is missing or not a number counts as infinite."""
        if found is None:
            return float("inf")
        reference = self.reference[name]
        off = ((found.double() - reference).abs().max() / reference.abs().max()).item()
        return off if off == off else float("inf")


def compile_only() -> None:
    """From here on this process compiles what it launches, into Triton's cache, and runs nothing."""

    def keep(kernel: Any, call: Any, config: Any, programs: int, arguments: dict[str, Any]) -> None:
        kernel.warmup(**arguments, grid=(programs,))

    launch.start = launch_backward.start = keep
    torch.cuda.init()


def compile_part(dim: int, bias: bool, number: int) -> str:
    """In a process of its own: into Triton's cache; the kernel is not run. Number -1 is the forward kernel."""
    compile_only()
    batch = Batch(Point(4, dim, 256, "full", bias), 512)
    if number < 0:
        batch.attention()
        return ""
    part = parts(dim, bias)[number]
    try:
        launcher(part, call_of(batch), batch.d_out)[0]()
    except Exception as error:
        return f"{part.name} {part}: {type(error).__name__} {str(error)[:100]}"
    return ""


def main() -> int:
    """1 where something is wrong."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, choices=[64, 128, 256], default=256)
    p.add_argument("--bias", action="store_true")
    p.add_argument("--lengths", type=int, nargs="+", default=[4096, 1024])
    options = p.parse_args()
    dim, bias, begin = options.dim, options.bias, time.perf_counter()
    wanted = parts(dim, bias)
    with multiprocessing.get_context("spawn").Pool(min(len(wanted) + 1, (os.cpu_count() or 4))) as pool:
        for line in pool.starmap(compile_part, [(dim, bias, n) for n in range(-1, len(wanted))], 1):
            if line:
                print(line)
    print(f"{headline()}\n\n4 heads of {dim}, bf16, causal, {'relative bias' if bias else 'no bias'}, {TOKENS} tokens; "
          f"compiled in {time.perf_counter() - begin:.0f} s\n", flush=True)  # fmt: skip
    small, wrong = Small(dim, bias), 0
    batches = {length: Batch(Point(4, dim, length, "full", bias), TOKENS) for length in options.lengths}
    calls = {length: call_of(batch) for length, batch in batches.items()}
    print("| makes | blocks (rows x keys), stages | error | "
          + " | ".join(f"S = {n}, ms (least) | TFLOP/s" for n in batches) + " |\n|---|---|---:"
          + "|---:|---:" * len(batches) + "|", flush=True)  # fmt: skip
    best: dict[tuple[str, Kind], tuple[float, Config]] = {}
    for part in wanted:
        try:
            off = small.error(part)
            cells = [f"{off:.1e}" if off < BOUND else f"**{off:.1e}**"]
            wrong += not off < BOUND
            for length, batch in batches.items():
                took = timed(launcher(part, calls[length], batch.d_out)[0], 0.03)
                rate = part.products * batch.flops() / 2 / took.middle / 1e9
                cells.append(f"{took.middle:.3f} ({took.least:.3f}) | {rate:.0f}")
                key = part.name, part.kind
                if off < BOUND and length == options.lengths[0]:
                    best[key] = min(best.get(key, (float("inf"), part.config)), (took.middle, part.config),
                                    key=lambda pair: pair[0])  # fmt: skip
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            cells, wrong = [f"{type(error).__name__} {str(error)[:80]!r}"], wrong + 1
        print(f"| {part.name} | {part} | {' | '.join(cells)} |", flush=True)
    fastest = {kind: config for (name, kind), (_, config) in best.items() if ", " not in name}
    if "backward" in fastest:
        fastest["backward"] = Config(**vars(fastest["backward"]) | {"passes": "split"})
    whole: list[tuple[str, dict[Kind, Config]]] = [("default", {}), ("split, the fastest blocks", fastest)]
    if dim == 256 and not bias:
        whole.append(("rows, as before", {"backward": Config(64, 64, 8, 2, passes="rows"),
                                          "backward_rows": Config(64, 64, 8, 1)}))  # fmt: skip
    for name, configs in whole:
        with tuning.autotune(False), tuning.forced_all(configs):
            off, cells = small.error_of_pass(), []
            wrong += not off < BOUND
            for batch in batches.values():
                out, leaves = batch.attention(), [batch.q, batch.k, batch.v, *batch.tables]
                took = timed(lambda: torch.autograd.grad(out, leaves, batch.d_out, retain_graph=True), 0.05)  # noqa: B023
                rate = 2.5 * batch.flops() / took.middle / 1e9
                cells.append(f"{took.middle:.3f} ({took.least:.3f}) | {rate:.0f}")
        print(f"| the whole pass | {name} | {off:.1e} | {' | '.join(cells)} |", flush=True)
    print(f"\n{wrong} wrong; {time.perf_counter() - begin:.0f} s in all")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
