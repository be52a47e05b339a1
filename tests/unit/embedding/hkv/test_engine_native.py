"""The engine's own C++ tests under sanitizers, and its shared headers under the CUDA compiler."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[4] / "csrc"
ENGINE = ["common/thread_pool.cpp", "hkv/api.cpp", "hkv/kernels.cpp", "hkv/kernels_generic.cpp", "hkv/lookup.cpp",
          "hkv/storage.cpp", "hkv/table.cpp", "hkv/tests/engine_test.cpp"]  # fmt: skip
# Flags as in csrc/hkv/CMakeLists.txt.
WIDE = {
    "hkv/kernels_avx2.cpp": "-mavx2 -mfma -mbmi -mbmi2",
    "hkv/kernels_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mbmi -mbmi2",
}


COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build(folder: Path, sanitizer: str) -> Path:
    """engine_test with the engine's sources, all compiled for the sanitizer."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread", f"-I{SOURCES}",
             f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]  # fmt: skip
    # Threads share no data inside the loops over rows: there the address sanitizer looks at each instruction set.
    wide = WIDE if platform.machine() in ("x86_64", "AMD64") and sanitizer != "thread" else {}
    flags += ["-DGENREC_HKV_X86=1"] if wide else []

    def compiled(name: str) -> str:
        target = str(folder / f"{Path(name).stem}.o")
        subprocess.run(
            [COMPILER, *flags, *wide.get(name, "").split(), "-c", str(SOURCES / name), "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*ENGINE, *wide]))
    program = folder / "engine_test"
    subprocess.run([COMPILER, *flags, *objects, "-o", str(program)], check=True)
    return program


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_engine_under_sanitizer(tmp_path, sanitizer):
    program = build(tmp_path, sanitizer)
    # ThreadSanitizer of some compilers can't live with randomised addresses.
    fixed = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    for isa in ("", "generic") if sanitizer != "thread" else ("",):  # "": the widest of the machine
        environment = {**os.environ, "GENREC_HKV_ISA": isa}
        run = subprocess.run(
            [*fixed, str(program)], env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.count("ok ") == 14 + 3 + 3


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_shared_headers_compile_for_the_device(tmp_path):
    source = tmp_path / "device.cu"
    source.write_text(
        """
        #include "hkv/bucket.h"
        #include "hkv/initializer.h"
        #include "hkv/optimizer.h"
        #include "hkv/storage.h"
        using namespace genrec::hkv;
        __global__ void probe(IndexView view, Initializer init, OptimizerParams params, StoreView store, int64_t key,
                              int64_t* out, float* row) {
          const uint64_t mixed = mix64(static_cast<uint64_t>(key));
          const Placement place = placement(view, mixed, 5, true);
          const uint64_t bucket = place.slot / kBucketSlots;
          const int slot = place.slot % kBucketSlots;
          out[0] = place.evicts ? promotion_slot(view, bucket, slot, 5, store.first[0], store.first[1]) : place.slot;
          out[1] = view.row(bucket, slot) + digest_of(mixed) + owner_rank(mixed, 3) + unmix64(mixed);
          out[2] = touched_score(ScoreMode::kLfu, 1, 2, 0) + reinterpret_cast<int64_t>(store.row(store.weights, 7));
          row[0] = init_value(init, init_stream(init, mixed), 3);
          row[1] = adam_element(params, row[0], prepared_gradient(params, 1.0f, row[0]), row + 2, row + 3);
          row[4] = adagrad_element(params, row[0], 1.0f, row + 5);
        }
        """
    )
    subprocess.run(
        ["nvcc", "-std=c++17", "-Werror", "all-warnings", "-arch=sm_90", "-cubin", f"-I{SOURCES}", str(source),
         "-o", str(tmp_path / "o")],
        check=True,
    )  # fmt: skip
