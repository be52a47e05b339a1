"""Checkpoint folders on disk: complete or absent at every moment, checked before they are read.

A folder holds `checkpoint.json` and one data folder that it names. A save writes a new data folder, replaces
`checkpoint.json` in one step, then removes the old data folder. Cut off at any byte, it leaves the folder as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from genrec._version import __version__

MANIFEST = "checkpoint.json"
META = "meta.pt"
TABLES = "tables"
FORMAT = 1

log = logging.getLogger("genrec.parallel")
Result = TypeVar("Result")

# Ranks ----------------------------------------------------------------------------------------------------------------

_groups: dict[str, tuple[Any, dist.ProcessGroup]] = {}


def coordination_group(purpose: str = "checkpoint") -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for one purpose: work in a thread must not meet the collectives of another."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = dist.group.WORLD
    known = _groups.get(purpose)
    if known is None or known[0] is not world:
        _groups[purpose] = (world, dist.new_group(backend="gloo"))
    return _groups[purpose][1]


def rank() -> int:
    """Of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first(function: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """What rank 0's call returns, on every rank; what it raises is raised by all."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if group is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all(function: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """What every rank's call returns, by rank. Where one raises, all do, instead of waiting for it."""
    outcome: tuple[Any, Exception | None] = (None, None)
    try:
        outcome = (function(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes = [outcome]
    if group is not None:
        outcomes = [(None, None)] * world_size()
        dist.all_gather_object(outcomes, outcome, group=group)
    failed = [(number, error) for number, (_, error) in enumerate(outcomes) if error is not None]
    if outcome[1] is not None:
        raise outcome[1]
    if failed:
        raise RuntimeError(f"Rank {failed[0][0]} failed: {failed[0][1]}") from failed[0][1]
    return [result for result, _ in outcomes]  # type: ignore[misc]


# Writing --------------------------------------------------------------------------------------------------------------


def begin(path: Path) -> str:
    """Make a new data folder below `path`; its name. Rank 0 alone."""
    if path.is_symlink():
        path.unlink()
    if path.is_file():
        # Of strategy "auto", on its way to become a folder. It stays whole under another name until that is complete.
        os.replace(path, _aside(path))
    path.mkdir(parents=True, exist_ok=True)
    name = f"data-{uuid.uuid4().hex[:12]}"
    (path / name).mkdir()
    return name


def commit(path: Path, data: str, info: dict[str, Any]) -> None:
    """Make a written data folder the checkpoint. Rank 0 alone, after all ranks have written."""
    folder = path / data
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*"))
             if file.is_file()}  # fmt: skip
    for directory in (folder, *(entry for entry in folder.rglob("*") if entry.is_dir())):
        sync_directory(directory)
    manifest = {"format": FORMAT, "data": data, "genrec": __version__, "torch": torch.__version__,
                "saved_at": time.time(), "world_size": world_size(), **info, "files": files}  # fmt: skip
    draft = path / f".{MANIFEST}.{data}"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path / MANIFEST)
    sync_directory(path)
    sync_directory(path.parent)
    for entry in path.iterdir():
        if entry.name.startswith("data-") and entry.name != data:
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name.startswith(f".{MANIFEST}."):
            entry.unlink(missing_ok=True)
    _aside(path).unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.file")


def discard(path: Path, data: str) -> None:
    """Remove a data folder that will not be finished, and `path` where it then holds nothing."""
    shutil.rmtree(path / data, ignore_errors=True)
    if not any(path.iterdir()):
        path.rmdir()
        if _aside(path).is_file():
            os.replace(_aside(path), path)


def remove(path: Path) -> None:
    """Remove a checkpoint, folder, file or link. Cut off, it leaves nothing that looks complete. Rank 0 alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def sync_directory(directory: Path) -> None:
    """Have a folder's entries on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading --------------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """What `checkpoint.json` of a folder says, once every file that it lists is found whole.

    Raises:
        FileNotFoundError: The folder, its checkpoint.json or a file is missing.
        ValueError: A file is shorter or longer than it was saved, or the format is unknown.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"'{path}' holds no complete checkpoint: {MANIFEST} is missing, so no save finished.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        format_, data, files = manifest["format"], path / manifest["data"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is damaged: {error!r}.") from error
    if format_ != FORMAT:
        raise ValueError(f"'{file}' has format {format_}, this version of genrec reads {FORMAT}.")
    for name, size in files.items():
        part = data / name
        if not part.is_file():
            raise FileNotFoundError(f"The checkpoint '{path}' is incomplete: '{part}' is missing.")
        if part.stat().st_size != size:
            raise ValueError(
                f"The checkpoint '{path}' is damaged: '{part}' has {part.stat().st_size} bytes, saved were {size}."
            )
    return manifest


def find(path: Path, fallback: bool) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint to load and its manifest (None for a file of strategy "auto"). Rank 0 alone.

    Args:
        path: The one asked for.
        fallback: Where it is incomplete, take the newest complete one beside it, and say so.

    Raises:
        FileNotFoundError, ValueError: As `read_manifest`.
    """
    if path.is_file():
        return path, None
    if not path.exists() and _aside(path).is_file():
        return _aside(path), None
    try:
        return path, read_manifest(path)
    except (FileNotFoundError, ValueError) as error:
        others = complete_beside(path) if fallback else []
        if _aside(path).is_file() and fallback:
            warnings.warn(f"{error} Taking what was there before: '{_aside(path)}'.", stacklevel=2)
            return _aside(path), None
        if not others:
            raise
        chosen, manifest = others[0]
        warnings.warn(f"{error} Taking '{chosen}' instead: {describe(manifest)}.", stacklevel=2)
        return chosen, manifest


def complete_beside(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Other complete checkpoint folders in the same directory, the furthest trained first."""
    found = []
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if entry != path and entry.is_dir() and not entry.is_symlink() and (entry / MANIFEST).is_file():
            try:
                found.append((entry, read_manifest(entry)))
            except (FileNotFoundError, ValueError) as error:
                log.warning("Passing over '%s': %s", entry, error)
    return sorted(found, key=lambda item: (item[1].get("global_step", 0), item[1]["saved_at"]), reverse=True)


def describe(manifest: dict[str, Any]) -> str:
    """In words, for the log."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["saved_at"]))
    return (
        f"step {manifest.get('global_step')}, epoch {manifest.get('epoch')}, saved {moment} by "
        f"{manifest['world_size']} ranks (tensor parallel {manifest.get('tensor_parallel_size', 1)})"
    )
