"""`SequenceBatch`: the one batch that training, evaluation and serving share. Jagged: nothing is padded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class SequenceBatch(Pipelineable):
    """B sequences of T rows in all; sequence b is rows [seq_offsets[b], seq_offsets[b + 1]).

    A sequence is `history | candidates`, one row an event, oldest first; its last `num_targets[b]` rows are the
    candidates to score. Contextual features stand beside it: they become leading tokens in the model.

    Attributes:
        features: KeyedJaggedTensor of stride B with int64 ids. A sequence feature has a value for each row (lengths
            equal those of the sequences); a contextual feature has at most one value for each sequence.
        seq_offsets: (B + 1,) int64.
        timestamps: (T,) int64 seconds, or None for data without times.
        query_timestamps: (T,) int64, when the next event is asked for: the next row's time, for the last row the time
            of the request. None without times.
        num_targets: (B,) int64, candidates of each sequence; None where there are none (retrieval).
        labels: Ranking: (sum of num_targets, tasks) float, in the order of the candidates. Retrieval: (T,) int64, the
            id that follows each row; -1 where nothing is to be predicted. None at serving time.
        label_weights: Of labels' shape without its last dimension for ranking, (T,) for retrieval; None for all ones.
        user_ids: (B,) int64, for metrics per user and predictions; None where unknown.
        max_seqlen: The longest sequence of the batch, rows.
    """

    features: KeyedJaggedTensor
    seq_offsets: Tensor
    max_seqlen: int
    timestamps: Tensor | None = None
    query_timestamps: Tensor | None = None
    num_targets: Tensor | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    user_ids: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.seq_offsets.numel() - 1

    @property
    def num_rows(self) -> int:
        """T, the number of rows of all sequences."""
        reference = self.timestamps if self.timestamps is not None else self.labels
        return int(reference.shape[0]) if reference is not None else int(self.seq_offsets[-1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceBatch:
        """The batch on `device`."""
        moved = self._map(lambda value: value.to(device=torch.device(device), non_blocking=non_blocking))
        # TorchRec keeps the parts into which it once took the features (`to_dict`), and leaves those where they were.
        moved.features._jt_dict = None
        return moved

    def pin_memory(self) -> SequenceBatch:
        """The batch in page-locked host memory, for copies that overlap with compute."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the batch."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | KeyedJaggedTensor):
                value.record_stream(stream)

    def _map(self, function: Any) -> SequenceBatch:
        return SequenceBatch(
            **{
                field.name: function(value) if isinstance(value, Tensor | KeyedJaggedTensor) else value
                for field in fields(self)
                for value in [getattr(self, field.name)]
            }
        )
