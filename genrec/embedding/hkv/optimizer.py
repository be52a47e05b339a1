"""The optimizer's face of tables that update themselves in the backward pass: learning rates in, nothing else out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.fused import FusedOptimizer

from genrec.embedding.hkv.ops import set_rate_source
from genrec.embedding.hkv.table import HkvTable


class HkvFusedOptimizer(FusedOptimizer):
    """One parameter group for each table; `lr` of a group is the rate of the table's next backward pass.

    The rows and their optimizer state stay in the tables and are saved with them, so the state here is empty. A group's
    parameter is an empty placeholder, as schedulers and TorchRec expect one.
    """

    reads_rates_in_backward = True

    def __init__(self, tables: Sequence[HkvTable], prefix: str = "") -> None:
        params: dict[str, Tensor] = {f"{prefix}{table.config.name}.weight": torch.empty(0) for table in tables}
        state: dict[Any, Any] = {placeholder: {} for placeholder in params.values()}
        groups = [
            {"params": [placeholder], "lr": table.config.optimizer.learning_rate}
            for placeholder, table in zip(params.values(), tables, strict=True)
        ]
        super().__init__(params, state, groups)
        for index, table in enumerate(tables):
            set_rate_source(table, self._rate_source(index))

    def _rate_source(self, index: int) -> Callable[[], float]:
        return lambda: self.param_groups[index]["lr"]

    def step(self, closure: Any = None) -> None:
        """Nothing: rows are updated in the backward pass."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing: tables keep no gradients."""

    def __repr__(self) -> str:
        return f"HkvFusedOptimizer({', '.join(self.params)})"
