"""`PredictionWriter`: what `trainer.predict` finds, as Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

if TYPE_CHECKING:  # models import without it
    import pyarrow as pa
    import pyarrow.parquet as pq


class PredictionWriter(BasePredictionWriter):
    """Writes the predictions of a run to `<directory>/predictions-<rank>.parquet`, batch by batch.

    The rank is the data-parallel one; of ranks that share their batches the first writes.

    Each tensor that `predict_step` returns is a column: (n,) a plain one, (n, k) one of lists. The file appears when
    the run is complete; until then it has the suffix `.part`. Use it with
    `trainer.predict(..., return_predictions=False)`, so that nothing piles up in memory.

    Args:
        directory: Made if it doesn't exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(write_interval="batch")
        self.directory = Path(directory)
        self._writer: pq.ParquetWriter | None = None
        self._path = self.directory
        self._writes = True

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name this rank's file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        rank = getattr(trainer.strategy, "data_parallel_rank", trainer.global_rank)
        self._path = self.directory / f"predictions-{rank}.parquet"
        self._writes = getattr(trainer.strategy, "tensor_parallel_rank", 0) == 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._writes:
            return
        table = pa.table({name: _column(values) for name, values in prediction.items()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, table.schema)
        self._writer.write_table(table)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the file."""
        self._close()
        if self._writes and self._partial.exists():
            self._partial.replace(self._path)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the unfinished file; it keeps its suffix."""
        self._close()

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + ".part")

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _column(values: Tensor) -> pa.Array:
    import pyarrow as pa

    array = values.detach().cpu().numpy()
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
