"""Attention backends by name: who can serve a call, and why another can't. Never a silent fallback."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "genrec.attention_backends"


class UnsupportedAttentionError(ValueError):
    """The named backend can't serve this call; the message holds its reason and the backends that can."""


@runtime_checkable
class AttentionBackend(Protocol):
    """What a backend is: a name, a word on whether it runs, and the op itself.

    It may have `not_in_auto`, a reason or a method of the spec that gives one: where there is a reason, only calls that
    name the backend are served.
    """

    name: str

    def available(self) -> str | None:
        """None where this machine can run the backend at all, else the reason why not."""
        ...

    def supports(self, spec: AttentionSpec) -> str | None:
        """None where the backend can serve `spec`, else the reason why not."""
        ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        mask: AttentionMask | Tensor,
        bias: Tensor | RelativeBias | None,
        alpha: float,
        scale: float | Tensor,
        dropout: float,
        seed: int | None,
        deterministic: bool,
    ) -> Tensor:
        """(T_q, H, Dv), of v's dtype. Arguments are as in `hstu_attention`, already checked."""
        ...


# Order of preference for "auto". The value is "module:Class", imported only when the backend is asked for.
_BUILTIN = {
    "cutlass": "genrec.attention.cutlass_backend:CutlassBackend",
    "triton": "genrec.attention.triton:TritonBackend",
    "torch": "genrec.attention.torch_backend:TorchBackend",
}


@dataclass(frozen=True)
class BackendReport:
    """One line of `python -m genrec.backends`."""

    name: str
    reason: str | None
    """None where the backend can run, else why not."""
    passed_over: str | None = None
    """Why "auto" doesn't choose the backend although it can run; None where it may."""


class BackendRegistry:
    """Backends by name, built in, registered at run time, or by an entry point of another distribution."""

    def __init__(self, builtin: dict[str, str]) -> None:
        self._loaders: dict[str, Callable[[], Any]] = {
            name: partial(_import, target) for name, target in builtin.items()
        }
        self._instances: dict[str, AttentionBackend] = {}
        self._unable: dict[str, str] = {}
        self._entry_points_read = False
        self.used: set[str] = set()
        """Names of the backends that have served a call since `forget_use`; a run keeps them in its summary."""

    def forget_use(self) -> None:
        """Start `used` anew, as each run does: the runs of one process must not report each other's backends."""
        self.used.clear()

    def register(self, name: str, factory: Callable[[], AttentionBackend], *, first: bool = False) -> None:
        """Add a backend under `name`; `first` puts it before all others in the order of "auto"."""
        self._instances.pop(name, None)
        self._unable.clear()
        if first:
            self._loaders = {name: factory, **{k: v for k, v in self._loaders.items() if k != name}}
        else:
            self._loaders[name] = factory

    def names(self) -> list[str]:
        """All registered names, in the order in which "auto" tries them."""
        if not self._entry_points_read:
            self._entry_points_read = True
            for point in entry_points(group=ENTRY_POINT_GROUP):
                if point.name not in self._loaders:
                    self._loaders[point.name] = partial(_load, point)
        return list(self._loaders)

    def get(self, name: str) -> AttentionBackend:
        """The backend of that name.

        Raises:
            UnsupportedAttentionError: No such backend, or its import failed.
        """
        if name not in self._instances:
            if name not in self.names():
                raise UnsupportedAttentionError(
                    f"Unknown attention backend '{name}'. Known: {', '.join(self.names())}, or 'auto'."
                )
            try:
                self._instances[name] = self._loaders[name]()
            except ImportError as error:
                raise UnsupportedAttentionError(
                    f"Attention backend '{name}' can't be loaded: {error}. Cure: install what it needs, or choose "
                    "another; `python -m genrec.backends` lists them."
                ) from error
        return self._instances[name]

    def why_not(self, name: str, spec: AttentionSpec | None = None) -> str | None:
        """None where backend `name` can run here (and serve `spec`, if given), else the reason."""
        try:
            backend = self.get(name)
        except UnsupportedAttentionError as error:
            return str(error)
        return backend.available() or (backend.supports(spec) if spec is not None else None)

    def report(self, spec: AttentionSpec | None = None) -> list[BackendReport]:
        """A line for each backend: can it run here (and serve `spec`), or why not."""
        lines = []
        for name in self.names():
            reason = self.why_not(name, spec)
            aside = None if reason else getattr(self.get(name), "not_in_auto", None)
            if callable(aside):
                aside = None if spec is None else aside(spec)
            lines.append(BackendReport(name, reason, aside))
        return lines

    def resolve(self, name: str, spec: AttentionSpec) -> AttentionBackend:
        """The backend that serves `spec`: the one named, or for "auto" the first that can.

        Raises:
            UnsupportedAttentionError: The named backend can't serve the call, or none can.
        """
        if name != "auto":
            reason = self.why_not(name, spec)
            if reason is None:
                self.used.add(name)
                return self.get(name)
            able = [other.name for other in self.report(spec) if other.reason is None]
            raise UnsupportedAttentionError(
                f"Attention backend '{name}' can't serve this call: {reason.rstrip('.')}. "
                f"Backends that can: {', '.join(able) or 'none'}."
            )
        chosen = self._resolve_auto(spec)
        self.used.add(chosen)
        return self.get(chosen)

    def _resolve_auto(self, spec: AttentionSpec) -> str:
        reasons: list[str] = []
        for name in self.names():
            reason = self._passed_over(name, spec)
            if reason is None:
                _log_choice(name, "; ".join(reasons))
                return name
            reasons.append(f"{name}: {reason}")
        raise UnsupportedAttentionError("No attention backend can serve this call. " + "; ".join(reasons))

    def _passed_over(self, name: str, spec: AttentionSpec) -> str | None:
        """Why "auto" does not choose the backend, or None. What can't run here is not asked again, for each call."""
        if name not in self._unable:
            reason = self.why_not(name)
            if reason is None:
                backend = self.get(name)
                aside = getattr(backend, "not_in_auto", None)
                return backend.supports(spec) or (aside(spec) if callable(aside) else aside)
            self._unable[name] = reason
        return self._unable[name]


@lru_cache(maxsize=64)
def _log_choice(name: str, passed_over: str) -> None:
    """Logged once for each different choice."""
    log.info("Attention backend: %s%s", name, f" (not {passed_over})" if passed_over else "")


def _import(target: str) -> AttentionBackend:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except AttributeError as error:
        raise ImportError(f"{module} is not complete: {error}") from error


def _load(point: EntryPoint) -> AttentionBackend:
    return point.load()()


registry = BackendRegistry(_BUILTIN)
