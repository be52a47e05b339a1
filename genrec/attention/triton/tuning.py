"""Which configuration a call runs with: one measured before, one measured now where that is allowed, or the default.

Measured ones are kept in `triton/attention.json` below GENREC_CACHE (else ~/.cache/genrec), so that a machine measures
once. Measuring is off unless asked for, since a first step would take minutes: GENREC_TRITON_AUTOTUNE=1 or `autotune`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from genrec.attention.triton.configs import Config, Kind, Passes, candidates

if TYPE_CHECKING:
    from genrec.attention.triton.launch import Call

log = logging.getLogger(__name__)

_chosen: dict[tuple[Any, ...], Config] = {}
_forced: dict[Kind, Config] = {}
_allowed: bool | None = None
_form: Passes | None = None


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
def forced_all(configs: Mapping[Kind, Config]) -> Iterator[None]:
    """`forced`, for several kernels."""
    with ExitStack() as stack:
        for kind, config in configs.items():
            stack.enter_context(forced(kind, config))
        yield


@contextmanager
def formed(passes: Passes | None) -> Iterator[None]:
    """Backward passes have this form meanwhile, with the blocks of the list; None changes nothing."""
    global _form
    before, _form = _form, passes
    try:
        yield
    finally:
        _form = before


@contextmanager
def autotune(allowed: bool = True) -> Iterator[None]:
    """Calls of a shape without a measured configuration measure the list meanwhile (or don't, whatever the setting)."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def run(kind: Kind, call: Call, launch: Callable[[Config], None]) -> None:
    """Launches with the configuration of this kind of call; a launch leaves nothing of a former one."""
    if kind in _forced:
        launch(_forced[kind])
        return
    if _form is not None and kind == "backward":
        found = [replace(config, passes=_form) for config in candidates(kind, call.shape)]
        _first_that_fits(list(dict.fromkeys(found)), launch)
        return
    facts = facts_of(kind, call)
    config = _chosen.get(facts)
    if config is not None:
        launch(config)
        return
    key = key_of(facts)
    config = _kept().get(key)
    if config is not None:
        _chosen[facts] = config
        launch(config)
        return
    capturing = call.q.is_cuda and torch.cuda.is_current_stream_capturing()
    allowed = os.environ.get("GENREC_TRITON_AUTOTUNE") == "1" if _allowed is None else _allowed
    found = candidates(kind, call.shape)
    if allowed and call.q.is_cuda and not capturing:
        _chosen[facts] = _measure(key, found, launch)
        _keep(key, _chosen[facts])
        launch(_chosen[facts])
    else:
        _chosen[facts] = _first_that_fits(found, launch)


Facts = tuple[Any, ...]


def facts_of(kind: Kind, call: Call) -> Facts:
    """What a choice depends on, quick to make and to look up; lengths by powers of two."""
    q = call.q
    return (
        q.device, kind, q.dtype, q.shape[2], call.v.shape[2], q.shape[1],
        call.position is not None, call.time is not None, call.dense is not None,
        call.num_contexts is not None, call.num_targets is not None, call.window >= 0, call.causal,
        max(0, call.max_kv_len - 1).bit_length(), call.dropout > 0.0, call.deterministic, call.room,
    )  # fmt: skip


def key_of(facts: Facts) -> str:
    """The same in words, for the file."""
    (device, kind, dtype, qk_dim, v_dim, heads, position, time, dense, contexts, targets, window, causal, bits, dropout,
     deterministic, room) = facts  # fmt: skip
    bias = {"position": position, "time": time, "dense": dense}
    mask = {"num_contexts": contexts, "num_targets": targets, "window": window, "full": not causal}
    parts = [
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        f"triton {triton.__version__}", kind, str(dtype).removeprefix("torch."), f"{qk_dim}x{v_dim}",
        "+".join(name for name, has in bias.items() if has) or "no bias",
        "+".join(name for name, has in mask.items() if has) or "causal",
        f"length {1 << bits}", f"heads {heads}", "dropout" if dropout else "", "deterministic" if deterministic else "",
        "" if all(room) or not (position or time) else "no room for scores" if room[0] else "no room",
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


def _measure(key: str, found: list[Config], launch: Callable[[Config], None]) -> Config:
    times: dict[Config, float] = {}
    for config in found:
        try:
            launch(config)
        except OutOfResources:
            continue
        runs = []
        for _ in range(5):
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
