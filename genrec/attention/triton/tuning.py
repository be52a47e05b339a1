"""Which configuration a call runs with: one measured before, one measured now where that is allowed, or the default.

Measured ones are kept in `triton/attention.json` below GENREC_CACHE (else ~/.cache/genrec), so that a machine measures
once. Measuring is off unless asked for, since a first step would take minutes: GENREC_TRITON_AUTOTUNE=1 or `autotune`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import triton
from triton.runtime.errors import OutOfResources

from genrec.attention.triton.configs import Config, Kind, candidates

if TYPE_CHECKING:
    from genrec.attention.triton.launch import Call

log = logging.getLogger(__name__)

_chosen: dict[str, Config] = {}
_forced: dict[Kind, Config] = {}
_allowed: bool | None = None


@contextmanager
def forced(kind: Kind, config: Config) -> Iterator[None]:
    """All calls of a kernel run with `config` meanwhile."""
    before = _forced.get(kind)
    _forced[kind] = config
    try:
        yield
    finally:
        _forced.pop(kind)
        if before is not None:
            _forced[kind] = before


@contextmanager
def autotune(allowed: bool = True) -> Iterator[None]:
    """Calls of a shape without a measured configuration measure the list meanwhile (or don't, whatever the setting)."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def run(kind: Kind, call: Call, launch: Callable[[Config], None], clear: Callable[[], None] | None = None) -> None:
    """Launches with the configuration of this kind of call; `clear` undoes what a former launch added."""
    if kind in _forced:
        launch(_forced[kind])
        return
    key = key_of(kind, call)
    config = _chosen.get(key) or _kept().get(key)
    if config is not None:
        _chosen[key] = config
        launch(config)
        return
    capturing = call.q.is_cuda and torch.cuda.is_current_stream_capturing()
    allowed = os.environ.get("GENREC_TRITON_AUTOTUNE") == "1" if _allowed is None else _allowed
    found = candidates(kind, call.shape)
    if allowed and call.q.is_cuda and not capturing:
        _chosen[key] = _measure(key, found, launch, clear)
        _keep(key, _chosen[key])
        if clear is not None:
            clear()
        launch(_chosen[key])
    else:
        _chosen[key] = _first_that_fits(found, launch)


def key_of(kind: Kind, call: Call) -> str:
    """What a choice depends on; lengths by powers of two."""
    device = torch.cuda.get_device_name(call.q.device) if call.q.is_cuda else "cpu"
    bias = [name for name in ("position", "time", "dense") if getattr(call, name) is not None]
    mask = [name for name in ("num_contexts", "num_targets") if getattr(call, name) is not None]
    mask += ["window"] if call.window >= 0 else []
    mask += ["full"] if not call.causal else []
    parts = [
        device, f"triton {triton.__version__}", kind, str(call.q.dtype).removeprefix("torch."),
        f"{call.q.shape[2]}x{call.v.shape[2]}", "+".join(bias) or "no bias", "+".join(mask) or "causal",
        f"length {triton.next_power_of_2(max(1, call.max_kv_len))}", f"heads {call.q.shape[1]}",
        "dropout" if call.dropout else "", "deterministic" if call.deterministic else "",
    ]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _first_that_fits(found: list[Config], launch: Callable[[Config], None]) -> Config:
    """The first configuration whose shared memory and registers this GPU has; launched."""
    for config in found[:-1]:
        try:
            launch(config)
            return config
        except OutOfResources as error:
            log.info("Triton attention: %s does not fit: %s", config, error)
    launch(found[-1])
    return found[-1]


def _measure(
    key: str, found: list[Config], launch: Callable[[Config], None], clear: Callable[[], None] | None
) -> Config:
    times: dict[Config, float] = {}
    for config in found:
        try:
            launch(config)
        except OutOfResources:
            continue
        runs = []
        for _ in range(5):
            if clear is not None:
                clear()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(10_000_000)  # 5 ms: the launch is queued when it ends, Python's time is not the kernel's
            begin.record()
            launch(config)
            end.record()
            end.synchronize()
            runs.append(begin.elapsed_time(end))
        times[config] = median(runs)
    if not times:
        raise RuntimeError(f"No configuration fits this GPU: {key}. Use attention.backend=torch.")
    best = min(times, key=lambda config: times[config])
    log.info("Triton attention: %s: %s, %.3f ms (of %s)", key, best, times[best], sorted(times.values()))
    return best


def cache_file() -> Path:
    """Where measured configurations are kept."""
    root = Path(os.environ.get("GENREC_CACHE") or Path.home() / ".cache" / "genrec").expanduser()
    return root / "triton" / "attention.json"


@lru_cache(maxsize=1)
def _kept() -> dict[str, Config]:
    """What the file held when it was first asked for; a file of another format counts as none."""
    try:
        return {key: Config(**values) for key, values in json.loads(cache_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(key: str, config: Config) -> None:
    """Adds to the file, whole or not at all, so that processes don't disturb each other."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _kept.cache_clear()
        kept = {name: asdict(value) for name, value in _kept().items()} | {key: asdict(config)}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as aside:
            json.dump(kept, aside, indent=1)
        os.replace(aside.name, file)
        _kept.cache_clear()
    except OSError as error:
        log.warning("Triton attention: the measured configuration can't be kept in %s: %s", file, error)
