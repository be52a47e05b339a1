"""Finds and loads genrec's compiled libraries. Every compiled call goes through `load_library`."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

LIBRARY_PATH_VARIABLE = "GENREC_LIBRARY_PATH"


class NativeLibraryError(ImportError):
    """A compiled library is missing or doesn't load; the message says where it was looked for and how to get it."""


def library_directories() -> list[Path]:
    """Where libraries are looked for, best first.

    The directories named by GENREC_LIBRARY_PATH (separated like PATH), the package's own `_lib`, and `genrec/_lib` in
    every entry of `sys.path` (an editable install puts libraries into site-packages, not beside the sources).
    """
    named = [Path(entry) for entry in os.environ.get(LIBRARY_PATH_VARIABLE, "").split(os.pathsep) if entry]
    package = [Path(__file__).parent / "_lib"]
    installed = [Path(entry or ".") / "genrec" / "_lib" for entry in sys.path]
    return list(dict.fromkeys(named + package + installed))


def load_library(name: str) -> ctypes.CDLL:
    """The library `lib<name>.so`. Calls into it release the interpreter's lock.

    What was missing once is not looked for again in the same places: backends ask in every call of an op.

    Raises:
        NativeLibraryError: No directory holds the library, or the loader refuses it.
    """
    found = _load(name, os.environ.get(LIBRARY_PATH_VARIABLE), tuple(sys.path))
    if isinstance(found, str):
        raise NativeLibraryError(found)
    return found


@cache
def _load(name: str, named: str | None, path: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library, or why there is none; `named` and `path` are where `library_directories` gets them from."""
    directories = library_directories()
    for directory in directories:
        file = directory / f"lib{name}.so"
        if file.is_file():
            try:
                return ctypes.CDLL(str(file))
            except OSError as error:
                return f"'{file}' doesn't load: {error}. Build it anew: {_CURE}"
    places = "\n  ".join(str(directory) for directory in directories)
    return f"lib{name}.so was found in none of\n  {places}\nBuild it: {_CURE}"


_CURE = (
    "run `make setup` in the repository, or `pip install --no-deps --no-build-isolation -e .` "
    "(needs a C++17 compiler and CMake 3.25), or name its directory in GENREC_LIBRARY_PATH."
)
