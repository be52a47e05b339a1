"""What genrec's metrics share: checks of their input, and columns that gather over ranks whoever has rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ColumnMetric(Metric):
    """A metric that keeps columns of equal length, row by row, and computes from all of them.

    Torchmetrics gathers a list state of a rank without rows as floats, which breaks integer columns. Columns
    declared by `add_column` keep their type.
    """

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._columns: dict[str, torch.dtype] = {}

    def add_column(self, name: str, dtype: torch.dtype) -> None:
        """Declare a column; it becomes the list state `name`, concatenated over the ranks."""
        self._columns[name] = dtype
        self.add_state(name, default=[], dist_reduce_fx="cat")

    def append(self, **rows: Tensor) -> None:
        """Add rows: a 1-D tensor for each column, all of one length."""
        for name, dtype in self._columns.items():
            getattr(self, name).append(rows[name].detach().to(dtype))

    def column(self, name: str) -> Tensor:
        """(rows,): everything appended to column `name` so far."""
        state = getattr(self, name)
        if isinstance(state, list) and not state:
            return torch.empty(0, dtype=self._columns[name], device=self.device)
        return dim_zero_cat(state)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Torchmetrics' `sync`, with a typed empty column where this rank has no rows."""
        for name, dtype in self._columns.items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)


def check_same_length(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the shapes unless all given tensors are 1-D and of one length."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tuple(tensor.shape) for tensor in given.values()}) > 1 or any(t.dim() != 1 for t in given.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"Expected 1-D tensors of one length, got {shapes}.")


def check_binary(labels: Tensor) -> None:
    """Raise ValueError unless every label is 0 or 1."""
    wrong = (labels != 0) & (labels != 1)
    if bool(wrong.any()):
        raise ValueError(f"Labels of a binary task must be 0 or 1, got {labels[wrong][0].item()}.")


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator as float32; NaN, not an error, where nothing was counted."""
    return (numerator / denominator).float()
