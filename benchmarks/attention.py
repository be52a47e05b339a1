"""Speed of HSTU attention on a GPU: this library's kernels beside PyTorch's flex_attention and flash attention.

    python benchmarks/attention.py --quick                  # one minute: the main points
    python benchmarks/attention.py --out docs/assets        # all points, a table and heat maps
    GENREC_TRITON_AUTOTUNE=1 python benchmarks/attention.py # with measured instead of default configurations

Contenders: triton, cutlass (where it is built), flash, flex; `--contenders` names fewer. The GPU's bf16 matrix product
of 8192 cubed is timed first, the ceiling for all of them.

A point is heads x dim, a length S, and a kind of batch: full (all sequences of length S), jagged (Zipf-distributed
lengths up to S), candidates (full, S / 8 targets and 4 contexts); with or without the relative position and time bias.
Batches have about 128 k tokens. q, k, v are views of one bf16 projection, as in the layer.

TFLOP/s by the causal convention, the same for all: 2 H S^2 D for a sequence's forward pass, 2.5 times that backward,
whatever a kernel really computes. flex_attention gets the same scores and mask; its weights are a softmax, which it
always takes, and it is compiled anew for each point: 4x128 only, full without a bias at all lengths, the others at two.
With a bias it gives no gradients of the tables: PyTorch 2.11 doesn't compile those (CompilationError, "can only unsplat
single-element tensors"). Flash attention (scaled_dot_product_attention) is causal softmax without bias, full lengths
only.

A timing is the median of at least five runs in some 0.06 s, after a pause: a burst at the GPU's full clock. Under a
steady load of such kernels its power limit lowers the clock (benchmarks/layer.py, benchmarks/training_step.py).

Before anything is timed, the output and gradients of a small batch of each kind are compared with fp64. Triton's
and flex's kernels are compiled beforehand, in a process for each core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrec.attention import AttentionMask, RelativeBias, hstu_attention, registry
from genrec.environment import headline

TOKENS = 131_072
SHAPES = [(4, 64), (4, 128), (4, 256), (8, 128)]
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
FLEX_LENGTHS = [1024, 4096]
OURS = ("triton", "cutlass")
CONTENDERS = (*OURS, "flash", "flex")
NUM_BUCKETS = 129
HEAD_START = 10_000_000
"""Cycles that the GPU waits, some 5 ms."""


@dataclass(frozen=True)
class Point:
    """What is timed."""

    heads: int
    dim: int
    length: int
    kind: str = "full"
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.heads}x{self.dim} S={self.length} {self.kind}{' +bias' if self.bias else ''}"


class Batch:
    """Tensors of a point."""

    def __init__(self, point: Point, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        draw = torch.Generator().manual_seed(0)
        self.point, self.lengths = point, lengths_of(point, tokens, draw)
        self.max_len, total = max(self.lengths), sum(self.lengths)
        width = 4 * point.dim
        scale = point.dim**-0.25
        shape = total, point.heads, width
        projection = torch.randn(shape, dtype=dtype, device=device).mul_(scale)
        _, self.v, self.q, self.k = (x.detach().requires_grad_() for x in projection.split(point.dim, dim=-1))
        self.d_out = torch.randn(total, point.heads, point.dim, dtype=dtype, device=device)
        sizes = torch.tensor([0, *self.lengths])
        self.offsets = sizes.cumsum(0).to(device)
        self.mask = AttentionMask()
        if point.kind == "candidates":
            few = torch.tensor([length // 8 for length in self.lengths], device=device)
            self.mask = AttentionMask(num_contexts=torch.full_like(few, 4), num_targets=few)
        # Gaps between events from a second to a day, log-uniform.
        gaps = (10 ** (torch.rand(total, generator=draw, dtype=torch.float64) * 5)).long()
        self.times = torch.cat([part.cumsum(0) for part in gaps.split(self.lengths)]).to(device)
        self.bias: RelativeBias | None = None
        self.tables: list[Tensor] = []
        if point.bias:
            positions = torch.randn(2 * self.max_len - 1, generator=draw).mul_(0.1).to(device).requires_grad_()
            table = torch.randn(NUM_BUCKETS, generator=draw).mul_(0.1).to(device).requires_grad_()
            self.bias, self.tables = RelativeBias(positions, table, self.times), [positions, table]

    def attention(self, backend: str = "triton") -> Tensor:
        """(T, H, D)."""
        return hstu_attention(self.q, self.k, self.v, self.offsets, self.max_len, mask=self.mask, bias=self.bias,
                              alpha=self.point.dim**-0.5, scale=1 / self.max_len, backend=backend)  # fmt: skip

    def flops(self) -> float:
        """Of a forward pass."""
        return sum(2.0 * self.point.heads * length**2 * self.point.dim for length in self.lengths)


def lengths_of(point: Point, tokens: int, draw: torch.Generator) -> list[int]:
    """Lengths of the batch's sequences, about `tokens` in all."""
    if point.kind != "jagged":
        return [point.length] * max(1, tokens // point.length)
    # Zipf over 64 classes of lengths, short ones first
    weights = 1.0 / torch.arange(1, 65, dtype=torch.float64) ** 1.05
    lengths, total = [point.length], point.length
    while total < tokens:
        step = int(torch.multinomial(weights, 1, generator=draw)) + 1
        lengths.append(max(1, point.length * step // 64))
        total += lengths[-1]
    return lengths


def check(point: Point, backend: str) -> str:
    """Output and gradients of a small batch against fp64 on the same device; raises where they are off."""
    small = Point(point.heads, point.dim, 300, point.kind, point.bias)
    batch, exact = Batch(small, 1200), Batch(small, 1200, torch.float64)
    leaves = [[b.q, b.k, b.v, *b.tables] for b in (batch, exact)]
    with torch.no_grad():
        for x, y in zip(leaves[0][:3], leaves[1][:3], strict=True):
            y.copy_(x)
    outs = batch.attention(backend), exact.attention("torch")
    found = torch.autograd.grad(outs[0], leaves[0], batch.d_out)
    wanted = torch.autograd.grad(outs[1], leaves[1], batch.d_out.double())
    worst = 0.0
    for x, reference in zip([outs[0], *found], [outs[1], *wanted], strict=True):
        worst = max(worst, ((x.double() - reference).abs().max() / reference.abs().max()).item())
    if not worst < 0.02:
        raise AssertionError(f"{backend}, {small}: off by {worst:.3g} of the largest value")
    return f"{worst:.1e}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, least and most of the runs."""

    middle: float
    least: float
    most: float


def timed(run: Callable[[], Any], seconds: float = 0.06) -> Timing:
    """Runs for about so long on a warm GPU."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end_at = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end_at and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)  # the kernels are queued when it ends: Python's time is not theirs
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return Timing(statistics.median(times), min(times), max(times))


def forward_and_backward(forward: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> tuple[Timing, Timing]:
    """Timings of both passes."""
    with torch.no_grad():
        ahead = timed(forward)
    out = forward()
    back = timed(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True))
    return ahead, back


def time_ours(batch: Batch, backend: str) -> tuple[Timing, Timing]:
    """This library's kernels."""
    leaves = [batch.q, batch.k, batch.v, *batch.tables]
    return forward_and_backward(lambda: batch.attention(backend), leaves, batch.d_out)


def time_flash(batch: Batch) -> tuple[Timing, Timing]:
    """Causal softmax attention of dense batches by FlashAttention in PyTorch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, d_out = _dense(batch)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return forward_and_backward(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], d_out
        )


def flex_problem(batch: Batch) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
    """flex_attention, compiled for this shape, with the same mask and scores; leaves and gradient of the output."""
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, d_out = _dense(batch)
    count, length = len(batch.lengths), batch.point.length
    targets = length // 8 if batch.point.kind == "candidates" else 0
    contexts = 4 if batch.point.kind == "candidates" else 0

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        history_end = length - targets
        history = (j < history_end) & ((j <= i) | (i >= history_end) | (j < contexts) | (i < contexts))
        return history | ((j >= history_end) & (i == j))

    score = None
    if batch.bias is not None:
        positions, table = (x.detach() for x in batch.tables)
        times = batch.times.view(count, length)
        asked = torch.cat([times[:, 1:], times[:, -1:]], 1)

        def score(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = (asked[b, i] - times[b, j]).abs().clamp(min=1)
            bucket = (torch.log(distance.float()) / 0.301).int().clamp(max=NUM_BUCKETS - 1)
            return x + positions[j - i + length - 1] + table[bucket]

    block_mask = create_block_mask(visible, count, None, length, length, device="cuda")
    functorch.donated_buffer = False  # the backward pass is timed several times on one graph
    torch.compiler.reset()  # or shapes seen before would make this one's kernels dynamic
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda: flex(q, k, v, score_mod=score, block_mask=block_mask), [q, k, v], d_out


def time_flex(batch: Batch) -> tuple[Timing, Timing]:
    """flex_attention."""
    return forward_and_backward(*flex_problem(batch))


def _dense(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, H, S, D) of a full batch."""
    shape = (len(batch.lengths), batch.point.length, batch.point.heads, batch.point.dim)
    q, k, v, d_out = (x.detach().reshape(shape).transpose(1, 2).contiguous() for x in
                      (batch.q, batch.k, batch.v, batch.d_out))  # fmt: skip
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


@dataclass(frozen=True)
class Row:
    """A measured point."""

    point: Point
    contender: str
    forward: Timing
    backward: Timing
    flops: float

    def rates(self) -> tuple[float, float, float]:
        """TFLOP/s forward, backward, both."""
        both = self.forward.middle + self.backward.middle
        return (self.flops / self.forward.middle / 1e9, 2.5 * self.flops / self.backward.middle / 1e9,
                3.5 * self.flops / both / 1e9)  # fmt: skip

    def __str__(self) -> str:
        f, b, both = self.rates()
        return (f"| {self.point} | {self.contender} | {self.forward.middle:.3f} "
                f"({self.forward.least:.3f}-{self.forward.most:.3f}) | {self.backward.middle:.3f} "
                f"({self.backward.least:.3f}-{self.backward.most:.3f}) | {f:.0f} | {b:.0f} | {both:.0f} |")  # fmt: skip


HEADER = (
    "| point | what | forward ms (least-most) | backward ms | forward TFLOP/s | backward | both |\n"
    "|---|---|---|---|---|---|---|"
)


@lru_cache(maxsize=1)
def batch_of(point: Point) -> Batch:
    """The batch of a point, the same for its contenders, who come one after the other."""
    return Batch(point, TOKENS)


def measure(point: Point, contender: str) -> Row:
    """One row, of one of CONTENDERS."""
    batch = batch_of(point)
    if contender in OURS:
        ahead, back = time_ours(batch, contender)
    else:
        ahead, back = {"flex": time_flex, "flash": time_flash}[contender](batch)
    return Row(point, contender, ahead, back, batch.flops())


def fits(point: Point, contender: str) -> bool:
    """Whether a contender computes such a point, and is to be timed on it."""
    if contender == "flash":
        return point.kind == "full" and not point.bias
    if contender == "flex":
        plain = point.kind == "full" and not point.bias
        shape = (point.heads, point.dim) == (4, 128) and point.kind != "jagged"
        return shape and (plain or point.length in FLEX_LENGTHS)
    return True


def points(quick: bool, contenders: Sequence[str] = CONTENDERS) -> Iterator[tuple[Point, str]]:
    """What is timed: the main points of all, then the whole table, what has to be compiled at its end."""
    main = [Point(4, 128, 4096), Point(4, 128, 4096, bias=True), Point(4, 128, 4096, "jagged"), Point(4, 128, 1024),
            Point(4, 64, 4096), Point(4, 256, 4096)]  # fmt: skip
    first = [(point, contender) for point in main for contender in contenders if fits(point, contender)]
    yield from (row for row in first if row[1] != "flex" or row[0] == main[0])
    if quick:
        return
    table = [Point(heads, dim, length, kind, bias) for heads, dim in SHAPES for length in LENGTHS
             for kind in ("full", "jagged", "candidates") for bias in (False, True)]  # fmt: skip
    for point in table:
        for contender in contenders:
            if contender != "flex" and fits(point, contender) and (point, contender) not in first:
                yield point, contender
    if "flex" in contenders:
        yield from ((point, "flex") for point in table if fits(point, "flex") and point != main[0])


def compile_kernels(point: Point, contender: str) -> None:
    """Runs both passes once, so that their kernels are cached: Triton's by a small batch of a kind, flex by itself."""
    if contender == "flex":
        forward, leaves, d_out = flex_problem(Batch(point, TOKENS))
        torch.autograd.grad(forward(), leaves, d_out)
    else:
        batch = Batch(Point(point.heads, point.dim, 512, point.kind, point.bias), 2048)
        torch.autograd.grad(batch.attention(), [batch.q, batch.k, batch.v, *batch.tables], batch.d_out)
    torch.cuda.synchronize()


def compile_ahead(wanted: Sequence[tuple[Point, str]]) -> None:
    """All kernels that these points need, in a process for each core. What fails here fails again where it is timed."""
    kinds = {(p.dim, p.kind == "candidates", p.bias): (p, name) for p, name in wanted if name == "triton"}
    jobs = [*kinds.values(), *((p, name) for p, name in wanted if name == "flex")]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs) or 1, os.cpu_count() or 1), mp_context=context) as pool:
        for job in [pool.submit(compile_kernels, *of) for of in jobs]:
            job.exception()


def ceiling() -> str:
    """The GPU's rate for a large bf16 matrix product of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = timed(lambda: a @ b)
    rates = [2 * 8192**3 / ms / 1e9 for ms in (found.middle, found.most, found.least)]
    return "bf16 matrix product 8192 x 8192 x 8192: {:.0f} TFLOP/s ({:.0f}-{:.0f})".format(*rates)


def heat_map(rows: list[Row], contender: str, file: Path) -> None:
    """TFLOP/s of forward + backward by shape and length, a panel for each kind of batch and bias."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [(kind, bias) for kind in ("full", "jagged", "candidates") for bias in (False, True)]
    found = {row.point: row.rates()[2] for row in rows if row.contender == contender}
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 9), layout="constrained")
    for axis, (kind, bias) in zip(axes.flat, kinds, strict=True):
        values = [[found.get(Point(h, d, s, kind, bias), float("nan")) for s in LENGTHS] for h, d in SHAPES]
        axis.imshow(values, vmin=0, vmax=600, cmap="viridis", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, "" if value != value else f"{value:.0f}", ha="center", va="center", color="white")
        axis.set_xticks(range(len(LENGTHS)), [str(s) for s in LENGTHS])
        axis.set_yticks(range(len(SHAPES)), [f"{h}x{d}" for h, d in SHAPES])
        axis.set_title(f"{kind}{', relative bias' if bias else ''}")
    figure.suptitle(f"{contender}: TFLOP/s, forward and backward; {torch.cuda.get_device_name()}, bf16")
    figure.savefig(file, dpi=120)


def main() -> int:
    """Prints the table; 1 where a check or a point failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="the main points only")
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="who is timed (all)")
    p.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no point begins")
    p.add_argument("--out", type=Path, help="folder for attention.md and attention_CONTENDER.png")
    options = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark times kernels on a GPU, and there is none.")
    begin = time.perf_counter()
    absent = {name: registry.why_not(name) for name in OURS}
    contenders = [name for name in options.contenders if not absent.get(name)]
    lines = [f"{headline()}; bf16, about {TOKENS} tokens", ceiling()]
    lines += [f"Without {name}: {reason}" for name, reason in absent.items() if reason and name in options.contenders]
    lines += ["", HEADER]
    print("\n".join(lines), flush=True)
    wanted = list(points(options.quick, contenders))
    compile_ahead(wanted)
    failed, rows, checked = 0, [], set()
    for point, contender in wanted:
        if time.perf_counter() - begin > options.limit:
            lines.append(f"No time left for {len(wanted) - len(rows) - failed} points.")
            print(lines[-1])
            break
        try:
            kind = (point.heads, point.dim, point.kind, point.bias, contender)
            if contender in OURS and kind not in checked:
                checked.add(kind)
                check(point, contender)
            rows.append(measure(point, contender))
            lines.append(str(rows[-1]))
        except Exception as error:
            failed += 1
            lines.append(f"| {point} | {contender} | failed: {type(error).__name__}: {str(error)[:200]!r} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "attention.md").write_text("\n".join(lines) + "\n")
        for contender in set(contenders) & set(OURS):
            heat_map(rows, contender, options.out / f"attention_{contender}.png")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
