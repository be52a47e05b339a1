"""Dynamic tables on the CPU: find, find_or_insert and a whole training step, beside what else one could use.

    python benchmarks/embedding_cpu.py --threads 2

Rows: 1 M (--rows). Ids: Zipf 1.05 over them, scattered over int64 for those that take any key. Training step: lookup
(one row for each id), backward with a given gradient, Adagrad update, all through autograd. Contenders take turns batch
by batch; medians and 10th to 90th percentiles are reported.

* hkv: this library's engine.
* fbgemm: FBGEMM's CPU tables (static ids, no hash), EXACT_ADAGRAD.
* map: std::unordered_map and rows in a vector (embedding_map_baseline.cpp, -O3 -march=native, one thread).
* zch: TorchRec's managed-collision module (MCHManagedCollisionModule, LRU, eviction every 100 batches) in front of
  FBGEMM's tables. (Its HashZchManagedCollisionModule can't train on a CPU: FBGEMM's CPU operator only reads.)
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.embedding.config import EmbeddingTableConfig, TableOptimizerConfig
from genrec.embedding.hkv import HkvTable, _binding
from genrec.embedding.hkv.collection import TableGroup
from genrec.embedding.hkv.state import mix_keys
from genrec.environment import headline

RATE = 0.01


class HkvContender:
    """This library."""

    name = "hkv"

    def __init__(self, rows: int, dim: int) -> None:
        # 1.25 slots a row: with one choice a bucket must not overflow.
        slots = rows * 5 // 4
        config = EmbeddingTableConfig(
            "t", dim, ["t"], backend="hkv", capacity=slots, options={"initial_capacity": slots},
            optimizer=TableOptimizerConfig("adagrad", RATE),
        )  # fmt: skip
        self.group = TableGroup([config], seed=0)
        self.table: HkvTable = self.group.tables["t"]
        for ids in torch.arange(rows).split(65_536):
            self.table.find_or_insert(mix_keys(ids))

    def find(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch, nothing changed."""
        self.table.embed(keys)

    def find_or_insert(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch; new keys enter."""
        self.table.find_or_insert(keys)

    def step(self, ids: Tensor, keys: Tensor, gradient: Tensor) -> None:
        """Lookup, backward and update."""
        self.group.embed("t", keys).backward(gradient)


class FbgemmContender:
    """FBGEMM's split table-batched embeddings on the CPU."""

    name = "fbgemm"

    def __init__(self, rows: int, dim: int) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=RATE, pooling_mode=PoolingMode.NONE,
        )  # fmt: skip
        self.tables.init_embedding_weights_uniform(-0.5, 0.5)

    def _lookup(self, ids: Tensor) -> Tensor:
        return self.tables(ids, torch.tensor([0, ids.numel()]))

    def find(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch, nothing changed."""
        with torch.no_grad():
            self._lookup(ids)

    def step(self, ids: Tensor, keys: Tensor, gradient: Tensor) -> None:
        """Lookup, backward and update."""
        self._lookup(ids).backward(gradient)


class MapContender:
    """std::unordered_map."""

    name = "map"

    def __init__(self, rows: int, dim: int) -> None:
        source = Path(__file__).with_name("embedding_map_baseline.cpp")
        folder = tempfile.mkdtemp(prefix="genrec_map_")
        library = os.path.join(folder, "map.so")
        subprocess.run(
            ["g++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", library], check=True
        )
        self.lib = ctypes.CDLL(library)
        self.lib.map_create.restype = ctypes.c_void_p
        self.dim, self.handle = dim, ctypes.c_void_p(self.lib.map_create(ctypes.c_int64(dim)))
        for ids in torch.arange(rows).split(65_536):
            self.find_or_insert(ids, mix_keys(ids))

    def _call(self, name: str, keys: Tensor, values: Tensor, *more: Any) -> None:
        getattr(self.lib, name)(
            self.handle, ctypes.c_void_p(keys.data_ptr()), ctypes.c_int64(keys.numel()),
            ctypes.c_void_p(values.data_ptr()), *more,
        )  # fmt: skip

    def find(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch, nothing changed."""
        self._call("map_find", keys, torch.empty(keys.numel(), self.dim))

    def find_or_insert(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch; new keys enter."""
        self._call("map_find_or_insert", keys, torch.empty(keys.numel(), self.dim))

    def step(self, ids: Tensor, keys: Tensor, gradient: Tensor) -> None:
        """Lookup, backward and update."""
        self.find_or_insert(ids, keys)
        self._call("map_update", keys, gradient, ctypes.c_float(RATE))


class ZchContender(FbgemmContender):
    """TorchRec's managed collisions in front of FBGEMM's tables."""

    name = "zch"

    def __init__(self, rows: int, dim: int) -> None:
        from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule

        super().__init__(rows, dim)
        chunks = torch.arange(rows).split(65_536)
        # New ids can be used after the next eviction pass only: let it come when all have been seen.
        self.remapper = MCHManagedCollisionModule(
            zch_size=rows, device=torch.device("cpu"), eviction_policy=LRU_EvictionPolicy(),
            eviction_interval=len(chunks),
        )  # fmt: skip
        for ids in chunks:
            self._remap(mix_keys(ids))
        self.remapper._eviction_interval = 100

    def _remap(self, keys: Tensor) -> Tensor:
        from torchrec.sparse.jagged_tensor import JaggedTensor

        features = {"t": JaggedTensor(keys & (2**62 - 1), lengths=torch.tensor([keys.numel()]))}
        # What the collection does around a batch: count, evict where due, remap.
        features = self.remapper.preprocess(features)
        self.remapper.profile(features)
        return self.remapper.remap(features)["t"].values()

    def find_or_insert(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch; new keys enter."""
        with torch.no_grad():
            self._lookup(self._remap(keys))

    def find(self, ids: Tensor, keys: Tensor) -> None:
        """Rows of a batch, nothing changed."""
        self.remapper.eval()
        self.find_or_insert(ids, keys)
        self.remapper.train()

    def step(self, ids: Tensor, keys: Tensor, gradient: Tensor) -> None:
        """Lookup, backward and update."""
        self._lookup(self._remap(keys)).backward(gradient)


CONTENDERS = (HkvContender, FbgemmContender, MapContender, ZchContender)


def zipf_batches(rows: int, size: int, count: int, exponent: float) -> list[Tensor]:
    """Batches of ids in [0, rows); popularity has no relation to the id."""
    generator = np.random.default_rng(0)
    mass = np.cumsum(1.0 / np.arange(1, rows + 1) ** exponent)
    scatter = generator.permutation(rows)
    return [
        torch.from_numpy(scatter[np.searchsorted(mass / mass[-1], generator.random(size))]) for _ in range(count)
    ]  # fmt: skip


def measure(actions: dict[str, Callable[[int], None]], repeats: int) -> dict[str, np.ndarray]:
    """10th, 50th and 90th percentile of each action's milliseconds; they take turns, so that all see the same
    machine."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 2):
        for name, action in actions.items():
            start = time.perf_counter()
            action(repeat)
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.percentile(values, [10, 50, 90]) for name, values in times.items()}


def _one_batch(function: Callable[..., None], ids: list[Tensor], keys: list[Tensor], extra: tuple, i: int) -> None:
    function(ids[i], keys[i], *extra)


def run(rows: int, dim: int, size: int, repeats: int, exponent: float, names: list[str]) -> None:
    """One table of results."""
    batches = zipf_batches(rows, size, repeats + 2, exponent)
    keys = [mix_keys(ids) for ids in batches]
    gradient = torch.randn(size, dim)
    unique = int(np.mean([ids.unique().numel() for ids in batches]))
    contenders = [kind(rows, dim) for kind in CONTENDERS if kind.name in names]
    print(f"\ndim {dim}: {size:,} ids a batch, {unique:,} of them different, {rows:,} rows")
    print(f"{'median (p10-p90) ms':20}" + "".join(f"{c.name:>22}" for c in contenders) + "   hkv is faster than")
    for operation in ("find", "find_or_insert", "step"):
        able = [c for c in contenders if hasattr(c, operation)]
        extra = (gradient,) if operation == "step" else ()
        actions = {c.name: partial(_one_batch, getattr(c, operation), batches, keys, extra) for c in able}
        times = measure(actions, repeats)
        cells = "".join(f"{_cell(times.get(c.name)):>22}" for c in contenders)
        others = {name: value[1] / times["hkv"][1] for name, value in times.items() if name != "hkv" and "hkv" in times}
        print(f"{operation:20}{cells}   {', '.join(f'{name} {ratio:.1f}x' for name, ratio in others.items())}")


def _cell(times: np.ndarray | None) -> str:
    return "-" if times is None else f"{times[1]:.2f} ({times[0]:.1f}-{times[2]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--size", type=int, default=131_072, help="ids in a batch")
    parser.add_argument("--zipf", type=float, default=1.05)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[kind.name for kind in CONTENDERS])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    isa = _binding.library().genrec_hkv_isa().decode()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{headline()}\nthreads {arguments.threads}, instruction set {isa}, load average {load}")
    for dim in arguments.dims:
        run(arguments.rows, dim, arguments.size, arguments.repeats, arguments.zipf, arguments.only)


if __name__ == "__main__":
    main()
