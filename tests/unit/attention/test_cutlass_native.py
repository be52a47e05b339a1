"""What of the CUTLASS kernels can be tested without a GPU: masks and tiles, work lists, layouts, the build, the C
interface."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genrec._native import NativeLibraryError
from genrec.attention import _cutlass_binding as binding

SOURCES = Path(__file__).resolve().parents[3] / "csrc"


def _cutlass_include() -> Path | None:
    """CUTLASS's headers: of the nvidia-cutlass wheel, or the folder that GENREC_CUTLASS_INCLUDE names."""
    if "GENREC_CUTLASS_INCLUDE" in os.environ:
        return Path(os.environ["GENREC_CUTLASS_INCLUDE"])
    spec = importlib.util.find_spec("cutlass_library")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "source" / "include"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("name", ["mask_test", "schedule_test"])
def test_host_side_of_the_kernels(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if name == "schedule_test" else []
    subprocess.run(["g++", *flags, str(SOURCES / "attention/tests" / f"{name}.cpp"), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("ok ")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(_cutlass_include() is None, reason="needs CUTLASS's headers: pip install nvidia-cutlass")
def test_layouts_are_cutes(tmp_path: Path) -> None:
    program = tmp_path / "layout_test"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O1", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr",
         f"-I{SOURCES}", f"-I{_cutlass_include()}", str(SOURCES / "attention/tests/layout_test.cu"),
         "-o", str(program)],
        check=True,
    )  # fmt: skip
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("ok ")


def _cuda_includes() -> list[Path] | None:
    """The CUDA toolkit's headers, found beside nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc may be a script that calls the real one: it knows its own folders.
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = [Path(word.strip('"')[2:]) for word in said.split() if word.strip('"').startswith("-I")]
    return [path for folder in found for path in (folder, folder / "cccl") if path.is_dir()] or None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(_cutlass_include() is None, reason="needs CUTLASS's headers: pip install nvidia-cutlass")
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *((name, dim) for name in ("emulated_test", "emulated_bias_test") for dim in (32, 64, 128, 256)),
        ("emulated_sums_test", 128),
    ],
)
def test_kernels_run_on_the_host(tmp_path: Path, name: str, dim: int) -> None:
    """Thread for thread, with the GPU's own instructions emulated: barriers, tiles, masks, biases, sums, layouts."""
    includes = _cuda_includes()
    if includes is None:
        pytest.skip("needs the CUDA toolkit's headers (nvcc in PATH)")
    program = tmp_path / name
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", "-fpermissive", "-DGENREC_EMULATED", f"-DGENREC_DIM={dim}",
         *[f"-I{path}" for path in (SOURCES, _cutlass_include(), *includes)],
         str(SOURCES / "attention/tests" / f"{name}.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("ok\n")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_build_without_nvcc_says_what_is_missing(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("needs cmake")
    done = subprocess.run([cmake, "-S", str(SOURCES), "-B", str(tmp_path), "-DGENREC_CUDA=ON", "-DGENREC_NVCC=OFF"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0
    assert "GENREC_CUDA is on and nvcc was not found: install the CUDA toolkit" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    try:
        found = binding.library()
    except NativeLibraryError as error:
        pytest.skip(f"the kernels aren't built (`make cuda`): {str(error).splitlines()[0]}")
    if b"forward bf16 128 general relative" not in found.genrec_attention_instances():
        pytest.skip("the library was built for fewer dims or dtypes than these tests ask about")
    return found


def _problem(**changes: int | float) -> binding.Problem:
    words = {"dtype": 0, "heads": 4, "qk_dim": 128, "v_dim": 128, "sequences": 3, "target_group": 1, "window": -1,
             "causal": 1, "query_rows": 1000, "key_rows": 1000, "alpha": 1.0, "scale": 1.0}  # fmt: skip
    return binding.Problem(**{**words, **changes})


def test_library_lists_what_it_holds(library: ctypes.CDLL) -> None:
    lines = library.genrec_attention_instances().decode().splitlines()
    assert {line.split()[0] for line in lines} == {"forward", "backward"}
    assert all(line.split()[1] in ("bf16", "fp16") and line.split()[3] in ("causal", "general") for line in lines)
    assert {line.split()[4] for line in lines} == {"none", "relative", "dense"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"qk_dim": 50}, "dims must be multiples of 8 .*, got 50"),
        ({"v_dim": 512}, "no kernel is built for bf16, qk_dim 128, v_dim 512, bias none"),
        ({"dtype": 7}, "no kernel is built for unknown dtype"),
        ({"target_group": 0}, "target_group must be at least 1"),
        ({"sequences": -1}, "sequences must not be negative"),
        ({"query_rows": 2**31}, "rows must be fewer than 2\\^31, got 2147483648"),
    ],
)
def test_problems_that_are_refused(library: ctypes.CDLL, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        binding.call("plan_bytes", ctypes.byref(_problem(**changes)))


def test_missing_arguments_are_named(library: ctypes.CDLL) -> None:
    problem = _problem()
    good = binding.Matrix(4096, 512, 128)
    odd = binding.Matrix(4098, 512, 128)
    with pytest.raises(RuntimeError, match="plan, query_offsets and key_offsets must be given"):
        binding.call("make_plan", ctypes.byref(problem), None, None)
    with pytest.raises(RuntimeError, match="out is missing"):
        binding.call("forward", ctypes.byref(problem), 64, 64, None, good, good, good, binding.Matrix(), None)
    with pytest.raises(RuntimeError, match="out is not 16-byte aligned in every row"):
        binding.call("forward", ctypes.byref(problem), 64, 64, None, good, good, good, odd, None)
    with pytest.raises(RuntimeError, match="q is not 16-byte aligned"):
        binding.call("forward", ctypes.byref(problem), 64, 64, None, odd, good, good, good, None)
    with pytest.raises(RuntimeError, match="a batch without rows"):
        binding.call("forward", ctypes.byref(_problem(query_rows=0)), 64, 64, None, good, good, good, good, None)


def test_memory_that_a_call_needs(library: ctypes.CDLL) -> None:
    # At D = 128 short sequences have a pass for dQ; long ones, and D = 64, gather it in sums.
    short, problem = _problem(), _problem(key_rows=3 * 2048)
    assert [_workspace(short, b, d) for b, d in ((0, 0), (1, 0), (1, 1))] == [64, 128, 128]
    assert _workspace(_problem(qk_dim=64, v_dim=64), 1) > 1000 * 4 * 64 * 4
    plain, ordered = (_workspace(problem, 1, d) for d in (0, 1))
    # At least a float for each element of q, at most with each of three sequences padded to a tile of 128 rows.
    assert 1000 * 4 * 128 * 4 <= plain <= (1000 + 4 * 128) * 4 * 128 * 4 + 128
    assert plain < ordered < plain + 4096
    # Records of 32 bytes, a place for each sequence's dS.
    assert (binding.call("plan_bytes", ctypes.byref(problem)) - 12) % 32 == 0


def test_kernels_with_tiles_of_their_own_have_lists_of_their_own(library: ctypes.CDLL) -> None:
    rows, short = 3 * 4096, {size: 1000 // size + 3 for size in (64, 128, 192)}
    long = {size: rows // size + 3 for size in (64, 128, 192)}
    # Long sequences at D = 128: queries forward, keys and queries backward, which serve the kernels with a bias too;
    # 192 queries where dS or the bias is in memory, and a place for each sequence's.
    problem = _problem(query_rows=rows, key_rows=rows)
    assert binding.call("plan_bytes", ctypes.byref(problem)) == 64 + 32 * (2 * long[128] + long[64] + long[192]) + 12
    # Short ones: the pass for dQ has 128 queries, the kernels with a bias 64.
    assert (
        binding.call("plan_bytes", ctypes.byref(_problem())) == 64 + 32 * (4 * short[128] + short[64] + short[192]) + 12
    )
    # D = 256: tiles of 64 keys without a bias, of 128 keys and 64 queries with one; dS in memory without one.
    problem = _problem(qk_dim=256, v_dim=256)
    assert (
        binding.call("plan_bytes", ctypes.byref(problem))
        == 64 + 32 * (3 * short[128] + 2 * short[64] + short[192]) + 12
    )
    # D = 64 keeps a relative bias forward, D = 32 nothing.
    for dim, places in ((64, 12), (32, 0)):
        problem = _problem(qk_dim=dim, v_dim=dim)
        assert (binding.call("plan_bytes", ctypes.byref(problem)) - 64 - places) % 32 == 0


def test_memory_of_a_relative_bias(library: ctypes.CDLL) -> None:
    """Forward it lies in memory once for all heads: fp16 in cells of 192 queries and 64 keys."""
    needed = {}
    for heads in (1, 4):
        problem = _problem(heads=heads, sequences=2, query_rows=2 * 384, key_rows=2 * 384)
        assert _workspace(problem) == 64
        problem.bias.kind = 1
        needed[heads] = _workspace(problem)
        problem.bias.kind = 2
        assert _workspace(problem) == 64
    # A causal sequence has 3 and 6 cells; room for one and a half times two sequences.
    assert needed[1] == needed[4] == 128 + 3 * 9 * 192 * 64 * 2


def test_a_relative_bias_is_kept_for_the_backward_pass(library: ctypes.CDLL) -> None:
    """Where the forward pass has it in memory and the backward pass reads it: in the workspace of neither then."""
    problem = _problem(sequences=2, query_rows=2 * 384, key_rows=2 * 384)
    for kind in (0, 2):
        problem.bias.kind = kind
        assert _kept(problem) == 0
    problem.bias.kind = 1
    kept = _kept(problem)
    assert kept == 3 * 9 * 192 * 64 * 2
    assert _workspace(problem, kept=1) == 64
    problem.qk_dim = problem.v_dim = 256
    assert _kept(problem) == kept
    problem.qk_dim = problem.v_dim = 64  # the backward pass computes it
    assert _workspace(problem) == 128 + kept
    assert _kept(problem) == 0
    long = _problem(sequences=2, query_rows=2 * 8192, key_rows=2 * 8192)  # computed where it is added
    long.bias.kind = 1
    assert _kept(long) == 0
    assert _workspace(long) == 64
    good = binding.Matrix(4096, 512, 128)
    with pytest.raises(RuntimeError, match="memory was given to keep a bias in, where none is kept"):
        binding.call("forward", ctypes.byref(problem), 64, 64, 64, good, good, good, good, None)
    with pytest.raises(RuntimeError, match="memory was given to keep a bias in, where none is kept"):
        binding.call("backward", ctypes.byref(problem), 64, 64, 64, 0, *[good] * 7, None)


def _workspace(problem: binding.Problem, backward: int = 0, deterministic: int = 0, kept: int = 0) -> int:
    return binding.call("workspace_bytes", ctypes.byref(problem), backward, deterministic, kept)


def _kept(problem: binding.Problem) -> int:
    return binding.call("kept_bytes", ctypes.byref(problem))


def _in_process(size: str, dim: int, kind: int, **limits: str | None) -> subprocess.CompletedProcess[str]:
    """Prints a size with limits of memory, GENREC_ATTENTION_<name>_GIB, which the library reads once."""
    words = (f"from tests.unit.attention import test_cutlass_native as t; p = t._problem(qk_dim={dim}, v_dim={dim}); "
             f"p.bias.kind = {kind}; print(t.{size})")  # fmt: skip
    environment = {name: x for name, x in os.environ.items() if not name.startswith("GENREC_ATTENTION_")}
    environment |= {f"GENREC_ATTENTION_{name}_GIB": gib for name, gib in limits.items() if gib is not None}
    return subprocess.run([sys.executable, "-c", words], cwd=SOURCES.parent, env=environment, capture_output=True,
                          text=True)  # fmt: skip


@pytest.mark.parametrize(("dim", "kind", "backward"), [(256, 0, 1), (128, 1, 0)])
def test_memory_of_ds_and_of_a_bias_is_limited(library: ctypes.CDLL, dim: int, kind: int, backward: int) -> None:
    size = f"_workspace(p, {backward})"
    none, few, all_ = (int(_in_process(size, dim, kind, STORED=gib).stdout) for gib in ("0", "0.001", None))
    assert none < few < all_
    assert few <= none + 2**30 // 1000


def test_memory_of_a_kept_bias_is_limited(library: ctypes.CDLL) -> None:
    """All of it or nothing; what isn't kept is in the workspaces."""
    all_, just, less, none = (int(_in_process("_kept(p)", 128, 1, KEPT=gib).stdout) for gib in
                              (None, "0.001", "0.0009", "0"))  # fmt: skip
    assert 2**30 * 9 // 10000 < all_ == just <= 2**30 // 1000
    assert less == none == 0
    assert int(_in_process("_workspace(p)", 128, 1, KEPT="0").stdout) == all_ + 128
    assert int(_in_process("_kept(p)", 128, 1, STORED="0").stdout) == 0


@pytest.mark.parametrize("name", ["STORED", "KEPT"])
@pytest.mark.parametrize("text", ["many", "", "-1", "2 GiB", "nan", "1e9"])
def test_a_limit_that_is_no_number_is_refused(library: ctypes.CDLL, text: str, name: str) -> None:
    done = _in_process("_workspace(p)", 128, 0, **{name: text})
    assert done.returncode != 0
    assert f"GENREC_ATTENTION_{name}_GIB must be a number of GiB, got '{text}'" in done.stderr
