"""ctypes signatures of csrc/attention/genrec_attention.h. Nothing here knows more than the header does."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

from genrec._native import NativeLibraryError, load_library

ABI_VERSION = 5


class Matrix(ctypes.Structure):
    """genrec_attention_tensor."""

    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64)]


class Bias(ctypes.Structure):
    """genrec_attention_bias."""

    _fields_ = [
        *[(name, c_int32) for name in ("kind", "max_positions", "buckets")],
        *[(name, c_void_p) for name in ("position", "time", "edges", "key_times", "query_times", "dense")],
        *[(f"dense_{name}_stride", c_int64) for name in ("batch", "head", "row")],
        *[(name, c_void_p) for name in ("d_position", "d_time", "d_dense")],
        *[(f"d_dense_{name}_stride", c_int64) for name in ("batch", "head", "row")],
    ]


class Problem(ctypes.Structure):
    """genrec_attention_problem."""

    _fields_ = [
        *[(name, c_int32) for name in ("dtype", "heads", "qk_dim", "v_dim", "sequences")],
        *[(name, c_int32) for name in ("target_group", "window", "causal")],
        *[(name, c_int64) for name in ("query_rows", "key_rows")],
        *[(name, c_void_p) for name in ("query_offsets", "key_offsets", "contexts", "targets", "scales")],
        *[(name, c_float) for name in ("alpha", "scale")],
        ("bias", Bias),
    ]


_P, _I, _M = c_void_p, c_int32, POINTER(Matrix)
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "check": ([POINTER(Problem), _I], c_int32),
    "plan_bytes": ([POINTER(Problem)], c_int64),
    "make_plan": ([POINTER(Problem), _P, _P], c_int32),
    "kept_bytes": ([POINTER(Problem)], c_int64),
    "workspace_bytes": ([POINTER(Problem), _I, _I, _I], c_int64),
    "forward": ([POINTER(Problem), _P, _P, _P, _M, _M, _M, _M, _P], c_int32),
    "backward": ([POINTER(Problem), _P, _P, _P, _I, _M, _M, _M, _M, _M, _M, _M, _P], c_int32),
}


@cache
def library() -> ctypes.CDLL:
    """The kernels, their functions declared. Loads on a machine without a GPU too.

    Raises:
        NativeLibraryError: They aren't built, or were built from other sources than this package.
    """
    lib = load_library("genrec_attention")
    lib.genrec_attention_error.restype = c_char_p
    lib.genrec_attention_instances.restype = c_char_p
    lib.genrec_attention_abi_version.restype = c_int32
    found = lib.genrec_attention_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"libgenrec_attention.so has interface version {found}, this package needs {ABI_VERSION}: run `make cuda`."
        )
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(lib, f"genrec_attention_{name}")
        function.argtypes, function.restype = arguments, result
    return lib


def why_not(problem: Problem, backward: bool) -> str | None:
    """None where the library holds kernels for the problem, else its reason."""
    lib = library()
    if lib.genrec_attention_check(ctypes.byref(problem), int(backward)) == 0:
        return None
    return lib.genrec_attention_error().decode()


def call(name: str, *arguments: Any) -> int:
    """Call genrec_attention_<name>.

    Returns:
        What it returns: 0, or a number of bytes.

    Raises:
        RuntimeError: The library's own message.
    """
    lib = library()
    result = int(getattr(lib, f"genrec_attention_{name}")(*arguments))
    if result < 0:
        raise RuntimeError(f"CUTLASS attention: {lib.genrec_attention_error().decode()}")
    return result
