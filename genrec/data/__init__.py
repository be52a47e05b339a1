# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""Batches, readers, splits and data modules. Nothing here imports Lightning but the data module itself."""

from genrec.environment import require_torchrec

require_torchrec()

from genrec.data.batch import SequenceBatch
from genrec.data.cache import prepare
from genrec.data.schema import FeatureSchema
from genrec.data.store import DataError, EventStore

__all__ = ["DataError", "EventStore", "FeatureSchema", "SequenceBatch", "SequenceDataModule", "prepare"]


def __getattr__(name: str) -> object:
    if name == "SequenceDataModule":
        from genrec.data.datamodule import SequenceDataModule

        return SequenceDataModule
    raise AttributeError(f"module 'genrec.data' has no attribute '{name}'")
