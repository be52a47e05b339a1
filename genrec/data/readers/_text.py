"""Delimited text in chunks: fast by Polars, and exact about the line where something is wrong."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrec.data.store import DataError

CHUNK_ROWS = 1 << 20


def find(folder: str | Path, *names: str) -> Path:
    """The first of `names` that is in `folder`.

    Raises:
        DataError: The folder or all of the files are missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: set data.path to the folder that holds {' or '.join(names)}.")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} holds none of {', '.join(names)}.")


def read_chunks(
    path: Path,
    columns: dict[str, Any],
    *,
    separator: str,
    header: bool,
    encoding: str = "utf8",
    optional: Collection[str] = (),
) -> Iterator[tuple[Any, int]]:
    """Polars frames of up to about a million lines, with the number of lines read so far.

    Args:
        path: The file.
        columns: name -> Polars type. With a header these are looked up by name, else they are the first columns.
        separator: One character.
        header: The first line has the names.
        encoding: "utf8", or "latin-1" for old files.
        optional: Columns that may be empty (null in the frame).

    Raises:
        DataError: A column is missing, or a value doesn't fit its type; the message has the line.
    """
    import polars as pl

    if header:
        _check_header(path, columns, separator)
    text = dict.fromkeys(columns, pl.String)
    try:
        if header:
            frames = pl.scan_csv(path, separator=separator, infer_schema=False).select(list(columns))
        else:
            frames = pl.scan_csv(
                path,
                separator=separator,
                has_header=False,
                schema=_wide(path, separator, text),
                quote_char=None,
                encoding="utf8-lossy" if encoding != "utf8" else "utf8",
            ).select(list(columns))
        lines = 0
        for frame in frames.collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
            yield _typed(frame, columns, path, lines + (2 if header else 1), optional), lines + len(frame)
            lines += len(frame)
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} is empty.") from None
    except pl.exceptions.ComputeError as error:
        place = _longer_line(path, separator, header)
        raise DataError(f"{path}{place}: {str(error).splitlines()[0]}") from None


def _longer_line(path: Path, separator: str, quoted: bool) -> str:
    """ ", line n": the first one with more columns than line 1; "" where there is none."""
    with path.open(encoding="utf8", errors="replace", newline="") as stream:
        lines = csv.reader(stream, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        width = len(next(lines, []))
        return next((f", line {lines.line_num}" for line in lines if len(line) > width), "")


def _check_header(path: Path, columns: dict[str, Any], separator: str) -> None:
    with path.open(encoding="utf8", errors="replace") as stream:
        names = [name.strip().strip('"') for name in stream.readline().rstrip("\r\n").split(separator)]
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; its header has: {', '.join(names)}.")


def _wide(path: Path, separator: str, columns: dict[str, Any]) -> dict[str, Any]:
    """A schema with as many columns as the first line has, the known ones first."""
    import polars as pl

    with path.open(encoding="utf8", errors="replace") as stream:
        first = stream.readline().rstrip("\r\n")
    if not first:
        raise DataError(f"{path} is empty.")
    width = len(first.split(separator))
    if width < len(columns):
        raise DataError(f"{path}, line 1: expected {len(columns)} columns ({', '.join(columns)}), found {width}.")
    return {**columns, **{f"_{number}": pl.String for number in range(len(columns), width)}}


def _typed(frame: Any, columns: dict[str, Any], path: Path, first_line: int, optional: Collection[str]) -> Any:
    """The frame with its types; a value that doesn't fit is an error with its line."""
    import polars as pl

    typed = frame.select(pl.col(name).str.strip_chars().cast(kind, strict=False) for name, kind in columns.items())
    for name, kind in columns.items():
        if name not in optional and typed[name].null_count():
            row = int(typed[name].is_null().arg_max())  # type: ignore[arg-type]
            raise DataError(f"{path}, line {first_line + row}, column {name}: {frame[name][row]!r} is not {kind}.")
    return typed


class Codes:
    """Strings (or any values) to codes 0, 1, 2, ... in the order of first appearance."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def encode(self, values: Any) -> NDArray[np.int64]:
        """Codes of a Polars series of strings."""
        import polars as pl

        unique = values.unique(maintain_order=True).to_list()
        for value in unique:
            self.codes.setdefault(value, len(self.codes))
        table = pl.DataFrame({"value": unique, "code": [self.codes[value] for value in unique]})
        joined = pl.DataFrame({"value": values}).join(table, on="value", how="left", maintain_order="left")
        return joined["code"].to_numpy().astype(np.int64)

    def names(self) -> list[str]:
        """The values by code."""
        return list(self.codes)


def category(values: Sequence[str | None]) -> tuple[NDArray[np.int32], int]:
    """Ids 1, 2, ... of the sorted distinct values (0 is for unknown: None), and the number of ids."""
    known = sorted({value for value in values if value is not None})
    distinct: dict[str | None, int] = {value: number for number, value in enumerate(known, start=1)}
    return np.array([distinct.get(value, 0) for value in values], np.int32), len(known) + 1
