"""ctypes signatures of csrc/hkv/genrec_hkv.h. Nothing here knows more than the header does."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from genrec._native import NativeLibraryError, load_library

ABI_VERSION = 3

INSERT, ADMIT, TOUCH, UPDATE, COUNT = 1, 2, 4, 8, 16


class Options(ctypes.Structure):
    """genrec_hkv_options."""

    _fields_ = [
        ("dim", c_int32),
        ("dtype", c_int32),
        ("score_mode", c_int32),
        ("choices", c_int32),
        ("optimizer", c_int32),
        ("record_evicted", c_int32),
        ("initial_buckets", c_int64),
        ("max_buckets", c_int64),
        ("max_load_factor", c_double),
        ("fast_positions", c_int32),
        ("overflow_positions", c_int32),
        ("admission_threshold", c_int32),
        ("admission_ways", c_int32),
        ("init_kind", c_int32),
        ("reserved", c_int32),
        ("init_seed", c_uint64),
        ("init_a", c_double),
        ("init_b", c_double),
    ]


class UpdateParams(ctypes.Structure):
    """genrec_hkv_update_params."""

    _fields_ = [
        *[(name, c_float) for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "max_gradient")],
        ("optimizer_step", c_int64),
    ]


class Info(ctypes.Structure):
    """genrec_hkv_info."""

    _fields_ = [
        *[(name, c_int64) for name in ("size", "capacity", "max_capacity", "generation")],
        *[(name, c_int64) for name in ("lookups", "hits", "inserted", "evicted", "refused", "unadmitted")],
        *[(name, c_int64) for name in ("promoted", "demoted", "index_bytes", "counter_bytes")],
        ("tier_bytes", c_int64 * 3),
        ("tier_rows", c_int64 * 3),
        ("pending_evicted", c_int64),
    ]


class Batch(ctypes.Structure):
    """genrec_hkv_batch."""

    _fields_ = [
        ("keys", c_void_p),
        ("n", c_int64),
        ("step", c_uint32),
        ("pin_floor", c_uint32),
        ("epoch", c_uint32),
        ("flags", c_uint32),
        ("scores", c_void_p),
    ]


class LookupResult(ctypes.Structure):
    """genrec_hkv_lookup_result."""

    _fields_ = [
        *[(name, c_void_p) for name in ("rows", "keys", "offsets", "positions", "rows_at", "found")],
        *[(name, c_int64) for name in ("unique", "inserted", "evicted", "refused", "unadmitted")],
    ]


_P, _I, _L = c_void_p, c_int32, c_int64
_SIGNATURES: dict[str, list[Any]] = {
    "create": [POINTER(Options), c_char_p, POINTER(c_void_p)],
    "set_init_seed": [_P, c_uint64],
    "find": [_P, _P, _L, _I, _P],
    "lookup": [_P, POINTER(Batch), _I, POINTER(LookupResult)],
    "gather": [_P, _P, _P, _L, _P, _I, _P],
    "pool": [_P, _P, _P, _P, _L, _P, _P, _I, _P],
    "update": [_P, POINTER(UpdateParams), _P, _P, _P, _P, _L, _P, _P, _P, _I],
    "read_rows": [_P, _P, _L, _I, _P, _P],
    "write_rows": [_P, _P, _L, _P, _P],
    "accumulate": [_P, _P, _P, _P, _L, _P, _I],
    "set_meta": [_P, _P, _L, _P, _P, _P],
    "get_meta": [_P, _P, _L, _P, _P, _P],
    "erase": [_P, _P, _L, POINTER(c_int64)],
    "erase_if": [_P, c_uint64, c_uint64, c_uint32, c_uint32, POINTER(c_int64)],
    "export": [_P, _L, _L, c_uint32, c_uint64, POINTER(c_int64), _P, _P, _P, _P, _P],
    "clear": [_P],
    "reserve": [_P, _L, _I],
    "pop_evicted": [_P, _L, _P, _P, _P, _P],
    "export_counters": [_P, _L, POINTER(c_int64), _P, _P, _P],
    "restore_counters": [_P, _L, _P, _P, _P],
}


@cache
def library() -> ctypes.CDLL:
    """The engine, its functions declared.

    Raises:
        NativeLibraryError: It is missing, or was built from other sources than this package.
    """
    lib = load_library("genrec_hkv")
    lib.genrec_hkv_error.restype = c_char_p
    lib.genrec_hkv_isa.restype = c_char_p
    lib.genrec_hkv_abi_version.restype = c_int32
    found = lib.genrec_hkv_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(
            f"libgenrec_hkv.so has interface version {found}, this package needs {ABI_VERSION}: run `make setup`."
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, f"genrec_hkv_{name}")
        function.argtypes, function.restype = arguments, c_int32
    lib.genrec_hkv_mix.argtypes, lib.genrec_hkv_mix.restype = [_P, _L, _I, _P], None
    lib.genrec_hkv_owners.argtypes, lib.genrec_hkv_owners.restype = [_P, _L, _L, _P], None
    lib.genrec_hkv_destroy.argtypes, lib.genrec_hkv_destroy.restype = [_P], None
    lib.genrec_hkv_get_info.argtypes, lib.genrec_hkv_get_info.restype = [_P, _I, POINTER(Info)], None
    return lib


def call(name: str, *arguments: Any) -> None:
    """Call genrec_hkv_<name>.

    Raises:
        RuntimeError: The engine's own message.
    """
    lib = library()
    if getattr(lib, f"genrec_hkv_{name}")(*arguments) != 0:
        raise RuntimeError(lib.genrec_hkv_error().decode())
