# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""Batches, readers, splits and data modules. Nothing here imports Lightning but the data modules themselves."""

from genrec.environment import require_torchrec

require_torchrec()

from genrec.data.batch import SequenceBatch

__all__ = ["SequenceBatch"]
