"""Which configuration a call runs with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from genrec.attention.triton.configs import Config, Kind, candidates

if TYPE_CHECKING:
    from genrec.attention.triton.launch import Call


def run(kind: Kind, call: Call, launch: Callable[[Config], None], clear: Callable[[], None] | None = None) -> None:
    """Launches with the default."""
    launch(candidates(kind, call.shape)[0])


def with_waves(config: Config) -> Config:
    """The same, with a fixed number of programs."""
    return replace(config, waves=1)
