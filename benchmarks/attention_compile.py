"""What Triton makes of the attention kernels for a Hopper GPU, on any machine: no GPU is needed, nothing is run.

    python benchmarks/attention_compile.py                       # the default configurations of the main cases
    python benchmarks/attention_compile.py --kind backward --dim 128 --bias both --config 64,128,8,2

For each kernel: registers of a thread, bytes of them spilled to memory, how many times the main loop stores or loads a
spilled register, shared memory of a block, how many asynchronous products of matrices (wgmma) and loads by descriptor
(TMA) its code holds, and the seconds that compiling took. Spills in the main loop or a missing wgmma are the usual
causes of a slow kernel. Triton's own ptxas assembles; cuobjdump reads the result.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from genrec.attention.triton import launch, launch_backward, launch_stored
from genrec.attention.triton.configs import Config, Shape, candidates
from genrec.attention.triton.prepared import Places

KINDS: tuple[str, ...] = (
    "forward", "backward", "backward_values", "backward_rows", "backward_tables",
    "bias_rows", "bias_keys", "stored_rows", "stored_tables",
)  # fmt: skip
"""Of `configs.Kind`, and the kernel that computes the bias of tiles for the forward and for the backward pass."""
BIASES = ("none", "both", "position", "time", "dense")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Hopper:
    """What Triton asks its driver about, for a GPU that isn't there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Plans:
    """Stands in for `Prepared`: the tensors' types are all that a compiler wants."""

    batch = 32

    def __init__(self, offsets: Tensor, times: Tensor | None) -> None:
        self.offsets, self.times = (offsets, offsets), (times, None)

    def bound(self, of_keys: bool, block: int) -> int:
        return 1024

    def items(self, of_keys: bool, block: int) -> tuple[Tensor, Tensor]:
        return _meta(1024, 2, dtype=torch.int32), _meta(1, dtype=torch.int32)

    def extrema(self, of_keys: bool, block: int, longest: int) -> tuple[Tensor, Tensor]:
        return _meta(1024, dtype=torch.int64), _meta(1024, dtype=torch.int64)

    def spans(self, places: Places, buckets: int, longest: tuple[int, int]) -> Tensor:
        return _meta(places.tiles, dtype=torch.int32)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def make_call(options: argparse.Namespace, dim: int, bias: str) -> launch.Call:
    """A call without data: 4 heads, q, k, v views of one projection, as the layer makes them."""
    heads, dtype, relative = 4, DTYPES[options.dtype], bias not in ("none", "dense")
    projection = _meta(131072, heads, 4 * dim, dtype=dtype)
    _, v, q, k = projection.split(dim, dim=-1)
    counts = _meta(32, dtype=torch.int64)
    call = launch.Call.__new__(launch.Call)
    call.__dict__ |= {
        "q": q, "k": k, "v": v, "q_offsets": None, "kv_offsets": None,
        "num_contexts": counts if options.contexts else None, "num_targets": counts if options.targets else None,
        "scales": None,
        "position": _meta(8191, dtype=torch.float32) if bias in ("both", "position") else None,
        "time": _meta(129, dtype=torch.float32) if bias in ("both", "time") else None,
        "dense": _meta(32, 1, 4096, 4096, dtype=dtype) if bias == "dense" else None,
        "max_q_len": 4096, "max_kv_len": 4096, "group": 1, "window": -1, "causal": True, "alpha": 0.1, "scale": 0.001,
        "dropout": options.dropout, "seed": 7, "deterministic": options.deterministic, "reuse": False,
        "prepared": _Plans(_meta(33, dtype=torch.int64), _meta(131072, dtype=torch.int64)),
        "generation": 9,
        "shape": Shape(dtype.itemsize * 8, launch._width(dim), launch._width(dim), relative, True, False, relative,
                       relative),
    }  # fmt: skip
    return call


def compile_kernel(kind: str, call: launch.Call, config: Config) -> Any:
    """The compiled kernel that such a call would launch."""
    found: list[Any] = []

    def keep(kernel: Any, call: launch.Call, config: Config, programs: int, arguments: dict[str, Any]) -> None:
        found.append(kernel.warmup(**arguments, grid=(1,)))

    real = launch.start
    launch.start = launch_backward.start = keep
    try:
        out = _meta(*call.q.shape, dtype=call.q.dtype)
        gradients = launch_backward.Gradients(call, [True, True, True])
        gradients.begin(config.passes)
        if config.passes == "stored" and kind == "backward":
            gradients.bias = launch_stored.fill_bias(call, config, of_keys=True)
        if kind == "forward":
            launch.launch_forward(call, out, config)
        elif kind == "backward":
            launch_backward.launch_keys(call, out, gradients, config)
        elif kind == "backward_values":
            launch_backward.launch_values(call, out, gradients, config)
        elif kind == "backward_rows":
            gradients.dq = out
            launch_backward.launch_rows(call, out, gradients, config)
        elif kind in ("bias_rows", "bias_keys"):
            launch_stored.fill_bias(call, config, kind == "bias_keys", warps=config.warps)
        elif kind == "stored_rows":
            launch_backward.launch_stored_rows(call, gradients, config)
        elif kind == "stored_tables":
            launch_backward.launch_stored_tables(call, gradients, Config(128, 128), config)
        else:
            launch_backward.launch_tables(call, out, gradients, config)
    finally:
        launch.start = launch_backward.start = real
    return found[-1]


def facts(kernel: Any) -> dict[str, int]:
    """Registers, spills and instructions of a compiled kernel."""
    ptx, tools = kernel.asm["ptx"], knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tools.cuobjdump.path, "-res-usage", binary], capture_output=True, text=True).stdout
        sass = subprocess.run([tools.cuobjdump.path, "-sass", binary], capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor|cp\.reduce\.async\.bulk\.tensor", ptx)),
        "in_loop": spills_in_loop(sass),
    }


def spills_in_loop(sass: str) -> int:
    """Spilled registers that the loop over blocks seen whole stores or loads, all its branches together.

    It is the first loop with products of matrices in it. Bytes spilled say little: most lie in the second loop, over
    the few blocks that the mask cuts, or before both.
    """
    code = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(\w+)[\w.]*(.*?);", sass)
    products = [int(at, 16) for at, word, _ in code if word in ("HGMMA", "HMMA")]
    loops = []
    for at, word, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if word == "BRA" else None
        if target and int(target[1], 16) < int(at, 16):
            span = int(target[1], 16), int(at, 16)
            loops += [span] if any(span[0] <= product <= span[1] for product in products) else []
    if not loops:
        return 0
    low, high = min(span for span in loops if not any(a >= span[0] and b <= span[1] and (a, b) != span
                                                       for a, b in loops))  # fmt: skip
    return sum(word in ("LDL", "STL") and low <= int(at, 16) <= high for at, word, _ in code)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, str, Config]]:
    """What is asked for."""
    for kind in KINDS if options.kind is None else [options.kind]:
        stored = kind.startswith(("stored", "bias"))
        for dim in [64, 128, 256] if options.dim is None else [options.dim]:
            for bias in ["none", "both"][stored:] if options.bias is None else [options.bias]:
                call = make_call(options, dim, bias)
                if options.config is not None:
                    rows, keys, warps, stages, *rest = (int(x) for x in options.config.split(","))
                    tma = bool(rest[0]) if rest else True
                    passes = options.passes or ("stored" if stored else "one")
                    yield kind, dim, bias, Config(rows, keys, warps, stages, tma, passes, options.stored)
                elif kind.startswith("bias"):
                    yield kind, dim, bias, Config(128, 64) if kind == "bias_rows" else Config(64, 128)
                else:
                    found = candidates(kind, call.shape)
                    if kind.startswith("stored"):
                        found = [replace(config, passes="stored") for config in found]
                    if options.passes:
                        found = list(dict.fromkeys(replace(config, passes=options.passes) for config in found))
                    yield from ((kind, dim, bias, config) for config in (found if options.all else found[:1]))


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each kernel; 1 where one spills or lacks wgmma."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=KINDS)
    p.add_argument("--dim", type=int, help="Dqk = Dv; default 64, 128, 256")
    p.add_argument("--bias", choices=BIASES, help="default none and both")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    p.add_argument("--config", help="rows,keys,warps,stages[,tma]; default: the heuristic's")
    p.add_argument("--all", action="store_true", help="every configuration of the tuner's list")
    p.add_argument(
        "--passes", choices=["one", "tables", "rows", "split", "stored"], help="form of the backward pass, for all"
    )
    p.add_argument("--stored", action="store_true", help="with --config: the forward kernel loads a stored bias")
    p.add_argument("--contexts", action="store_true")
    p.add_argument("--targets", action="store_true")
    p.add_argument("--deterministic", action="store_true")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--save", type=Path, help="folder for the PTX and the intermediate code")
    options = p.parse_args(arguments)
    if launch.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: there is no compiling under the interpreter.")
    triton.runtime.driver.set_active(_Hopper())
    print(f"triton {triton.__version__}, sm_90, {options.dtype}")
    print("kind             dim bias     rows keys warps stages tma passes | "
          "registers spilled in loop shared wgmma tma  s", flush=True)  # fmt: skip
    poor = False
    for kind, dim, bias, config in cases(options):
        begin = time.perf_counter()
        head = (f"{kind:<15} {dim:>4} {bias:<8} {config.rows:>4} {config.keys:>4} {config.warps:>5} {config.stages:>6} "
                f"{'yes' if config.tma else 'no':>3} {'stored' if config.stored else config.passes:>6} |")  # fmt: skip
        try:
            kernel = compile_kernel(kind, make_call(options, dim, bias), config)
        except Exception as error:
            print(head, type(error).__name__, str(error)[:300].replace("\n", " "), flush=True)
            poor = True
            continue
        seconds = time.perf_counter() - begin
        found = facts(kernel)
        products = not kind.startswith("bias") and kind != "stored_tables"
        poor |= found["spilled"] > 0 or (options.dtype != "fp32" and products and found["wgmma"] == 0)
        print(head, f"{found['registers']:>9} {found['spilled']:>7} {found['in_loop']:>7} {found['shared']:>6} "
              f"{found['wgmma']:>5} {found['tma']:>3} {seconds:>4.1f}", flush=True)  # fmt: skip
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            blocks = f"{config.rows}x{config.keys}-{config.warps}-{config.stages}-{config.passes}"
            for part in ("ttgir", "ptx"):
                (options.save / f"{kind}-{dim}-{bias}-{blocks}.{part}").write_text(kernel.asm[part])
    return int(poor)


if __name__ == "__main__":
    sys.exit(main())
