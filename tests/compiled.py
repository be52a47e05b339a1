"""Compiles Triton kernels for a GPU that this machine need not have: run as a program, without TRITON_INTERPRET.

    collect() -> list of Compiled     # filled as functions launch kernels on CPU tensors; nothing is run

Launches are turned into compilations by a driver that only names its target, so that the very tile sizes, strides and
alignments of the real call are compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel."""

    name: str
    constants: dict[str, Any]
    registers: int
    stack: int
    """Bytes a thread spills to local memory."""
    narrow_loads: int
    """Loads from global memory of fewer than 16 bytes."""


class _TargetOnly:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def collect(capability: int = 90) -> list[Compiled]:
    """From now on launches compile for this compute capability; the list fills with what they compiled."""
    driver.set_active(_TargetOnly(GPUTarget("cuda", capability, 32)))
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(_read(self.fn.__module__.split(".")[-1] + self.fn.__name__, options, kernel))
        return kernel

    JITFunction.run = compile_only
    return found


def _read(name: str, constants: dict[str, Any], kernel: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None, said
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    narrow = sum(not re.search(r"v4\.b32|v2\.b64|b128|v8", load) for load in loads)
    return Compiled(name, constants, int(usage[1]), int(usage[2]), narrow)
