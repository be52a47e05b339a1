"""Arrivals at barriers that loads from shared memory may still be under way at, in compiled kernels.

    python csrc/attention/tests/arrivals.py build/cuda/attention/CMakeFiles/genrec_attention.dir/instances/*.o

A load that stands behind matrix products in a warp's queue is done when the tensor cores have taken those up; an
arrival overtakes it. Where it gives back what that load reads, the buffer may be filled anew before (`release_read` in
barriers.h). Hand-overs of records of work or of a step are listed as well and are harmless: records are overwritten
units or steps later.

Goes over each kernel's instructions from first to last, branches left aside, so that a line is a place to look, and
reads which of six counters a load raises and which an instruction waits for: bits 41 to 61 of the upper half of its
16 bytes (stall 4, yield 1, raised 3, raised by reads 3, waited for 6).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/\s+/\* (0x[0-9a-f]+) \*/")
FUNCTION = re.compile(r"Function : (\S+)")
NONE = 7
"""Of the six counters: no one."""


def disassembler() -> str:
    """cuobjdump of the CUDA toolkit, or the one that comes with Triton."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    found = shutil.which("cuobjdump") or (str(beside) if beside and beside.exists() else None)
    if found is None:
        sys.exit("cuobjdump was not found: put the CUDA toolkit's bin folder into PATH, or install triton.")
    return found


def early_arrivals(code: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """(kernel, address, arrival, addresses of the loads under way) in a disassembly."""
    for kernel in re.split(r"(?=Function : )", code)[1:]:
        name = FUNCTION.match(kernel)
        assert name is not None
        loads: dict[int, list[str]] = {}
        for address, text, upper in INSTRUCTION.findall(kernel):
            control = int(upper, 16) >> 41
            raised, waited = control >> 5 & 7, control >> 11 & 63
            for counter in [c for c in loads if waited >> c & 1]:
                del loads[counter]
            if "SYNCS.ARRIVE" in text and loads:
                yield name[1], address, text.strip(), sorted(chain.from_iterable(loads.values()))
            if re.search(r"\bLDSM?\b", text) and raised != NONE:
                loads.setdefault(raised, []).append(address)


def main() -> int:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="+", type=Path, help="object files of kernels")
    tool = disassembler()
    for path in parser.parse_args().objects:
        code = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
        before = None
        for kernel, address, arrival, loads in early_arrivals(code):
            if kernel != before:
                print(f"{path.name}: {kernel}")
            before = kernel
            print(f"    {address} {arrival}: {len(loads)} loads, from {loads[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
