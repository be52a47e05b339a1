"""Kernels compile for Hopper on a machine without a GPU, add every number once and read a stored bias as it is stored.

Small blocks, as fp32 takes them, lie in all warps at once: a kernel that added from each of them was wrong on a GPU and
right in the interpreter, which has no threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

CODE = """
import json
from types import SimpleNamespace
import torch, triton, triton.language as tl
from benchmarks.attention_compile import _Hopper, compile_kernel, make_call
from genrec.attention.triton.configs import Config
from tests.ptx_adds import additions, tile_elements

triton.runtime.driver.set_active(_Hopper())

@triton.jit
def add_twice(x, table):
    tile = tl.load(x + tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :])
    tl.inline_asm_elementwise("{ red.global.add.f32 [$1], $2; mov.b32 $0, $2; }", "=r,l,r",
                              [(table + (tile > 0).to(tl.int32)).to(tl.int64), tile], dtype=tl.float32, is_pure=False,
                              pack=1)

@triton.jit
def add_once(x, table):
    tile = tl.load(x + tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :])
    tl.atomic_add(table + (tile > 0).to(tl.int32), tile)

found = {}
def note(name, kernel, warps):
    found[name] = additions(kernel.asm["ptx"], 32 * warps), tile_elements(kernel.asm["ttgir"])

for kernel in (add_twice, add_once):
    compiled = kernel.warmup(torch.float32, torch.float32, grid=(1,), num_warps=16)
    note(kernel.__name__, compiled, 16)
small = Config(32, 32, 4, 1, tma=False)
cases = [("backward", small, "one"), ("backward_rows", small, "rows"), ("backward_tables", small, "tables"),
         ("stored_tables", small, "stored")]
for kind, config, passes in cases:
    options = SimpleNamespace(dtype="fp32", contexts=True, targets=True, dropout=0.0, deterministic=False)
    config = Config(config.rows, config.keys, config.warps, config.stages, config.tma, passes)
    note(f"{kind} {passes}", compile_kernel(kind, make_call(options, 32, "both"), config), config.warps)
print(json.dumps(found))
"""


STORED = """
import json, re
from dataclasses import replace
from types import SimpleNamespace
import triton
from benchmarks.attention_compile import _Hopper, compile_kernel, make_call
from genrec.attention.triton.configs import candidates

triton.runtime.driver.set_active(_Hopper())
options = SimpleNamespace(dtype="bf16", contexts=False, targets=False, dropout=0.0, deterministic=False)
found = {}
for kind, dim in (("forward", 64), ("forward", 128), ("forward", 256), ("backward", 64), ("backward", 128)):
    call = make_call(options, dim, "both")
    for config in candidates(kind, call.shape):
        if not config.stored and config.passes != "stored":
            continue
        code = compile_kernel(kind, call, config).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\\w+) = (.*)$", code, re.MULTILINE))
        loads = re.findall(r"ld\\.global\\.nc\\.v4.*-> tensor<(\\d+)x(\\d+)xf16, (#\\w+)>", code)
        found[f"{dim} {config}"] = config.warps, [(int(x), int(y), layouts[name]) for x, y, name in loads]
compile_kernel("stored_rows", call, replace(candidates("stored_rows", call.shape)[0], passes="stored"))
print(json.dumps(found))
"""


@pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_stored_bias_is_read_in_the_layout_that_it_is_stored_in(tmp_path: Path) -> None:
    """`load_fragments` would read nonsense in any other: warps stacked, instructions as wide as the tile."""
    found = json.loads(run(STORED, tmp_path))
    assert len(found) == 7
    for config, (warps, loads) in found.items():
        assert len(loads) == 2, config  # without a mask and with one
        for lines, columns, layout in loads:
            assert lines % (16 * warps) == 0
            assert "nvidia_mma<{versionMajor = 3," in layout, config
            assert f"warpsPerCTA = [{warps}, 1], instrShape = [16, {columns}, 16]" in layout, config


def run(code: str, folder: Path) -> str:
    """The last line that a script prints which compiles for a GPU that isn't there."""
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    environment.pop("TRITON_INTERPRET", None)
    script = folder / "script.py"  # Triton reads the source of its kernels
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment,
                          cwd=root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_number_is_added_once(tmp_path: Path) -> None:
    found = json.loads(run(CODE, tmp_path))
    # The check itself: 256 elements in 512 threads.
    assert found.pop("add_twice") == [512, 0]
    assert found.pop("add_once") == [256, 256]
    assert len(found) == 4
    for name, (made, meant) in found.items():
        assert made == meant > 0, f"{name}: threads add {made} numbers where tiles have {meant}"
