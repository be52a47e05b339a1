"""Batches, readers, splits and data modules. Nothing here imports Lightning but the data modules themselves."""

from genrec.data.batch import SequenceBatch

__all__ = ["SequenceBatch"]
