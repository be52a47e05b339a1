"""The layer's kernels compile for Hopper and don't spill, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

CODE = """
import json, sys
from dataclasses import asdict
import torch
from tests.compiled import collect

found = collect()
from genrec.layers.triton.encodings import add_encodings, sum_rows_by_index
from genrec.layers.triton.gate import _backward_into, gated_product, gated_product_backward
from genrec.layers.triton.norm import layer_norm, layer_norm_backward
from genrec.layers.triton.rows import place_rows, take_rows
from genrec.layers.triton.silu import GradientRoom, _merge_into, activate_uvqk, merge_uvqk

rows, heads, dim, dtype = 8, int(sys.argv[1]), int(sys.argv[2]), torch.bfloat16
width = heads * dim
x, column, group = torch.zeros(rows, width, dtype=dtype), torch.zeros(width), torch.zeros(heads)
for weight in (None, column):
    y, mean, rstd = layer_norm(x, weight, weight, 1, 1e-6, dtype)
    layer_norm_backward(y, x, weight, weight, mean, rstd)
y = torch.zeros(rows, 4 * width, dtype=dtype)
activate_uvqk(y, dim, dim, False)
a, u = x.view(rows, heads, dim), y.view(rows, heads, -1)[..., :dim]
for projection in (y, None):
    merge_uvqk(a, a, a, a, projection, False)
    merge_uvqk(a, a, a, a, projection, True)
    for sums in (False, True):
        room = GradientRoom(4 * width, sums)
        du = room.make(a)
        room.put(du, a)
        _merge_into(room.take(du)[0], None, a, a, a, projection, sums)
seed = torch.zeros(1, dtype=torch.int64)
cases = [(False, None, 1, 0.0), (False, None, 1, 0.2), (True, column, 1, 0.2), (True, group, heads, 0.2)]
for concat, weight, groups, p in cases:
    y, mean, rstd = gated_product(a, u, None, weight, weight, seed, groups, 1e-6, p, concat, True, dtype)
    gated_product_backward(y, a, u, None, weight, weight, seed, mean, rstd, p, concat, True)
    _backward_into(room.make(a), True, y, a, u, None, weight, weight, seed, mean, rstd, p, concat, True)
y, mean, rstd = gated_product(a, u, x, None, None, seed, 1, 0.0, 0.2, True, True, dtype)
gated_product_backward(y, a, u, x, None, None, seed, mean, rstd, 0.2, True, True)
index = torch.arange(rows)
place_rows([x], [index])
take_rows(x, [index])
add_encodings(x, [column[None], column[None]], [index * 0, index * 0], seed, 2.0, 0.2)
sum_rows_by_index(x, index, rows, torch.float32)
print(json.dumps([asdict(kernel) for kernel in found]))
"""


@pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("heads", "dim"), [(4, 256)])
def test_kernels_compile_for_hopper_without_spilling(heads: int, dim: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", CODE, str(heads), str(dim)], capture_output=True, text=True,
                          check=False, env=environment, cwd=Path(__file__).parents[3])  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 32
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        warps = kernel["constants"].get("num_warps", 4)
        assert 3 * 32 * warps * kernel["registers"] <= 65536, kernel  # at least three programs on a multiprocessor
        # Statistics, seeds, factors of a group and indices are single numbers; all else comes 16 bytes at a time.
        assert kernel["narrow_loads"] <= 6, kernel
