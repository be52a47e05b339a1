"""The place of the CUTLASS backend. Its kernels are not written yet: it says so, and "auto" passes it over."""

from __future__ import annotations

from typing import Any, NoReturn

from genrec.attention.spec import AttentionSpec

_REASON = "this release has no CUTLASS kernels yet; use 'triton' or 'torch'"


class CutlassBackend:
    """Serves nothing yet."""

    name = "cutlass"

    def available(self) -> str | None:
        """Why it can't run."""
        return _REASON

    def supports(self, spec: AttentionSpec) -> str | None:
        """Why it can't serve the call."""
        return _REASON

    def __call__(self, *args: Any) -> NoReturn:
        """Raises: there is nothing to run."""
        raise NotImplementedError(_REASON)
