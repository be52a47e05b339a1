"""The layer's Triton kernels on a GPU, one by one: milliseconds and bytes a second of several tilings.

    python benchmarks/layer_kernels.py [--tokens 131072] [--heads 4] [--head-dim 256] [--only merge]

Each kernel runs in the form of `benchmarks/layer.py --quick` (SiLU on u, v, q, k; u * norm(a); affine norms; bf16). The
line named "default" is what the library launches; "du apart": where u's gradient has a tensor of its own. Bytes are
those of the tensors that a kernel must read and write once. Kernels are compiled in several processes before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from genrec.environment import headline
from genrec.layers.triton import gate, norm, silu
from genrec.layers.triton._launch import Loop


@dataclass(frozen=True)
class Tiling:
    """Rows of a block, warps, blocks under way, programs a multiprocessor (0: a program has one block)."""

    rows: int
    warps: int
    stages: int = 0
    programs: int = 0

    def __str__(self) -> str:
        more = f", {self.stages} under way, {self.programs} programs" if self.programs else ""
        return f"{self.rows} x {self.warps} warps{more}"


LOOPS = [Tiling(rows, warps, stages, programs) for rows, warps in ((1, 4), (1, 2), (1, 1), (2, 4), (4, 4))
         for stages, programs in ((1, 4), (1, 16), (2, 4), (3, 4), (4, 4), (4, 6), (6, 4), (6, 3))]  # fmt: skip
PLAIN = [Tiling(rows, warps) for rows, warps in ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (2, 8), (4, 8), (8, 8))]
MERGE = [Tiling(rows, warps, stages, programs)
         for rows, warps in ((1, 1), (2, 1), (2, 2), (4, 4), (8, 4), (4, 2), (8, 8))
         for stages, programs in ((1, 4), (1, 16), (2, 4), (2, 8), (3, 4), (3, 6), (4, 4), (5, 4))]  # fmt: skip


@contextmanager
def tiled(tiling: Tiling | None) -> Iterator[None]:
    """The library's launches take `tiling` in place of their own."""
    if tiling is None:
        yield
        return
    names = {gate: ("tile", "loop"), norm: ("tile", "loop"), silu: ("tile", "loop")}
    before = {(module, name): getattr(module, name) for module, own in names.items() for name in own}
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count

    def tile(width: int, per_thread: int = 16, threads: int = 128) -> tuple[int, int, int]:
        return tiling.rows, max(16, 1 << (width - 1).bit_length()), tiling.warps

    def loop(
        x: torch.Tensor, width: int, groups: int, tensors: int, per_thread: int, threads: int, **more: int
    ) -> Loop:
        programs = max(1, min(-(-x.shape[0] // tiling.rows), processors * tiling.programs // groups))
        return Loop(tiling.rows, tile(width)[1], tiling.warps, tiling.stages, programs)

    try:
        for module, name in before:
            setattr(module, name, {"tile": tile, "loop": loop}[name])
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


@dataclass
class Kernel:
    """A kernel, what of its tensors moves (in tensors of a hidden state's size), and the tilings to try."""

    run: Callable[[], Any]
    units: float
    tilings: list[Tiling]


def kernels(rows: int, heads: int, dim: int) -> dict[str, Kernel]:
    """By name."""
    width = heads * dim
    parts = [torch.randn(rows, heads, dim, device="cuda").bfloat16() for _ in range(4)]
    y = torch.randn(rows, 4 * width, device="cuda").bfloat16()
    x, dy, more = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(3))
    weight, bias = (torch.randn(width, device="cuda") for _ in range(2))
    u = y.unflatten(-1, (heads, -1))[..., :dim]
    _, mean, rstd = norm.layer_norm(x, weight, bias, 1, 1e-5, torch.bfloat16)
    gated = partial(
        gate.gated_product, parts[0], u, None, weight, bias, None, 1, 1e-5, 0.0, False, True, torch.bfloat16
    )
    inputs = dy, parts[0], u, None, weight, bias, None, mean, rstd, 0.0, False, True
    room = silu.GradientRoom(4 * width, True)
    du = room.make(u)
    whole = du.as_strided(y.shape, y.stride())
    return {
        "norm": Kernel(partial(norm.layer_norm, x, weight, bias, 1, 1e-5, torch.bfloat16), 2, PLAIN),
        "norm backward": Kernel(partial(norm.layer_norm_backward, dy, x, weight, bias, mean, rstd, more), 4, LOOPS),
        "gate": Kernel(gated, 3, PLAIN),
        "gate backward": Kernel(partial(gate._backward_into, du, True, *inputs), 5, LOOPS),
        "gate backward, du apart": Kernel(partial(gate.gated_product_backward, *inputs), 5, LOOPS[:9]),
        "activate": Kernel(partial(silu.activate_uvqk, y, dim, dim, False), 6, PLAIN),
        "merge": Kernel(partial(silu._merge_into, whole, None, *parts[1:], y, True), 9, MERGE),
        "merge, du apart": Kernel(partial(silu.merge_uvqk, *parts, y, True), 11, MERGE[:9]),
    }


def timed(run: Callable[[], Any], count: int = 7) -> list[float]:
    """Milliseconds of each run."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    run()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def compile_one(job: tuple[str, Tiling | None, int, int]) -> str:
    """Fills Triton's cache; says what went wrong."""
    name, tiling, heads, dim = job
    try:
        with tiled(tiling):
            kernels(4096, heads, dim)[name].run()
    except Exception as error:
        return f"{name}, {tiling}: {str(error).splitlines()[0][:150]}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--best", type=int, default=6, help="lines for each kernel")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU.")
        return 1
    print(headline())
    found = {name: kernel for name, kernel in kernels(options.tokens, options.heads, options.head_dim).items()
             if options.only in name}  # fmt: skip
    jobs = [(name, tiling, options.heads, options.head_dim) for name, kernel in found.items()
            for tiling in (None, *kernel.tilings)]  # fmt: skip
    failed = set()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for job, text in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if text:
                failed.add(job[:2])
                print(text)
    unit = options.tokens * options.heads * options.head_dim * 2
    print("| kernel | tiling | ms (least - most) | TB/s |\n|---|---|---:|---:|")
    for name, kernel in found.items():
        lines = []
        for tiling in (None, *kernel.tilings):
            if (name, tiling) in failed:
                continue
            with tiled(tiling):
                times = timed(kernel.run)
            lines.append((statistics.median(times), tiling, times))
        default, rest = lines[0], sorted(lines[1:], key=lambda line: line[0])
        for median, tiling, times in (default, *rest[: options.best]):
            speed = kernel.units * unit / median / 1e9
            spread = f"{median:.3f} ({min(times):.3f} - {max(times):.3f})"
            print(f"| {name} | {tiling or 'default'} | {spread} | {speed:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
