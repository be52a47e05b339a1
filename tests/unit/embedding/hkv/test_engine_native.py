"""The engine's own C++ tests under sanitizers, and its shared header under the CUDA compiler."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[4] / "csrc"
ENGINE = ["common/thread_pool.cpp", "hkv/api.cpp", "hkv/kernels.cpp", "hkv/kernels_generic.cpp", "hkv/lookup.cpp",
          "hkv/storage.cpp", "hkv/table.cpp", "hkv/tests/engine_test.cpp"]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_engine_under_sanitizer(tmp_path, sanitizer):
    program = tmp_path / "engine_test"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"]
    sources = [str(SOURCES / name) for name in ENGINE]
    subprocess.run(
        ["g++", *flags, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *sources, "-o", str(program)],
        check=True,
    )
    # ThreadSanitizer of some compilers can't live with randomised addresses.
    fixed = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    run = subprocess.run([*fixed, str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == 14 + 3


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
          const uint64_t first = first_bucket(mixed, view.num_buckets);
          const uint64_t second = second_bucket(mixed, first, view.num_buckets);
          const Candidate a = least_slot(view, first, 5, 0, kBucketSlots);
          const Candidate b = least_slot(view, second, 5, 0, kBucketSlots);
          out[0] = a.before(b) ? a.slot : b.slot;
          out[1] = empty_slot(view, first) + digest_of(mixed) + owner_rank(mixed, 3) + unmix64(mixed);
          out[2] = touched_score(ScoreMode::kLfu, 1, 2, 0) + reinterpret_cast<int64_t>(store.row(store.weights, 7));
          row[0] = init_value(init, init_stream(init, mixed), 3);
          row[1] = adam_element(params, row[0], prepared_gradient(params, 1.0f, row[0]), row + 2, row + 3);
          row[4] = adagrad_element(params, row[0], 1.0f, row + 5);
        }
        """
    )
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-Werror",
            "all-warnings",
            "-ptx",
            f"-I{SOURCES}",
            str(source),
            "-o",
            str(tmp_path / "o"),
        ],
        check=True,
    )
