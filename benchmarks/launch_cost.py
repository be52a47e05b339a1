"""What a call of the Triton attention costs in Python before its kernels start, measured on any CPU: no GPU is needed.

    python benchmarks/launch_cost.py              # microseconds a call, by how far down the call goes
    python benchmarks/launch_cost.py --profile    # and the functions that take the time

Everything runs but the kernels themselves: Triton finds a kernel that does nothing where it would compile one. So the
times hold the checks, the choice of a backend, PyTorch's dispatch and autograd, the arguments and Triton's own launch
path. What they lack of a real call: the choice of the device and the stream, the encoding of tensor descriptors and the
driver's launch, some 5 to 10 microseconds a kernel.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention_compile import _Hopper
from genrec.attention import RelativeBias, hstu_attention
from genrec.attention.triton import backend, launch
from genrec.attention.triton.configs import Shape
from genrec.environment import headline

HEADS, DIM, LENGTH, SEQUENCES, BUCKETS = 4, 128, 16, 8, 129


class _Idle(_Hopper):
    """The same, beside tensors that are really there."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _kernel_of_nothing(self: JITFunction, key: Any, *_: Any, **__: Any) -> Any:
    """In place of `JITFunction._do_compile`."""
    kernel = SimpleNamespace(run=_nothing, function=0, packed_metadata=(), launch_metadata=_nothing)
    self.device_caches[0][0][key] = kernel
    return kernel


@property  # type: ignore[misc]
def _hopper_shape(call: launch.Call) -> Shape:
    """In place of `Call.shape`: the choices of a Hopper GPU, descriptors among them."""
    return replace(_true_shape(call), hopper=True)


_true_shape = launch.Call.shape.func


class Calls:
    """The same call at several depths."""

    def __init__(self, bias: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        total = SEQUENCES * LENGTH
        projection = torch.randn(total, HEADS, 4 * DIM, generator=draw).bfloat16()
        _, v, q, k = projection.split(DIM, dim=-1)
        self.leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        self.offsets = torch.arange(SEQUENCES + 1) * LENGTH
        self.bias: RelativeBias | None = None
        if bias:
            tables = [torch.randn(n, generator=draw).requires_grad_() for n in (2 * LENGTH - 1, BUCKETS)]
            self.bias = RelativeBias(*tables, torch.arange(total) * 977)
            self.leaves += tables
        self.d_out = torch.ones(total, HEADS, DIM, dtype=torch.bfloat16)
        self.out = self.whole()

    def whole(self) -> Tensor:
        """As a model calls it."""
        return hstu_attention(*self.leaves[:3], self.offsets, LENGTH, bias=self.bias, alpha=0.1, scale=0.01,
                              backend="triton")  # fmt: skip

    def inferring(self) -> Tensor:
        """Without autograd."""
        with torch.no_grad():
            return self.whole()

    def backward(self) -> None:
        """The backward pass alone."""
        torch.autograd.grad(self.out, self.leaves, self.d_out, retain_graph=True)

    def inner(self) -> Tensor:
        """Below PyTorch's dispatch: plans, arguments, Triton."""
        q, k, v = (x.detach() for x in self.leaves[:3])
        tables = (None, None) if self.bias is None else (x.detach() for x in self.leaves[3:])
        times = None if self.bias is None else self.bias.timestamps
        return launch.run_forward(
            launch.Call(q, k, v, self.offsets, self.offsets, None, None, None, *tables, times, None, None, LENGTH,
                        LENGTH, 1, -1, True, 0.1, 0.01, 0.0, 0, False, True)
        )  # fmt: skip


def microseconds(run: Callable[[], Any], calls: int) -> str:
    """Median (least - most) of so many calls."""
    for _ in range(20):
        run()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e6)
    return f"{statistics.median(times):.0f} ({min(times):.0f} - {sorted(times)[-len(times) // 20]:.0f})"


def profile(run: Callable[[], Any], calls: int, lines: int) -> None:
    """Where the time goes."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        run()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def main() -> int:
    """Prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--calls", type=int, default=300)
    p.add_argument("--profile", action="store_true")
    options = p.parse_args()
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: its kernels have no launch path to measure.")
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Idle())
    print(headline())
    print(f"{HEADS} heads x {DIM}, {SEQUENCES} sequences of {LENGTH}, bf16; median (least - 95 %), microseconds\n")
    print("| bias | forward, as a model calls it | without autograd | below the dispatch | backward |")
    print("|---|---:|---:|---:|---:|", flush=True)
    with mock.patch.object(JITFunction, "_do_compile", _kernel_of_nothing), mock.patch.object(
        backend, "INTERPRETED", True
    ), mock.patch.object(launch.Call, "shape", _hopper_shape):  # fmt: skip
        for bias in (False, True):
            calls = Calls(bias)
            runs = [calls.whole, calls.inferring, calls.inner, calls.backward]
            print(f"| {'relative' if bias else 'none'} | "
                  + " | ".join(microseconds(run, options.calls) for run in runs) + " |", flush=True)  # fmt: skip
            if options.profile:
                profile(calls.whole, options.calls, 25)
                profile(calls.backward, options.calls, 25)
    return 0


if __name__ == "__main__":
    sys.exit(main())
