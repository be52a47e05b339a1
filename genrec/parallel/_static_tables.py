"""The static tables of a module, and what FBGEMM's fused optimizers can do for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from genrec.embedding.config import TableOptimizerConfig
from genrec.embedding.tables import EmbeddingTables

_ON_CPU = ("sgd", "adagrad", "rowwise_adagrad")
_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.Adam, "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}  # fmt: skip
_BY_ROW = ("row_wise", "table_wise", "table_row_wise", "data_parallel", "auto")


@dataclass(frozen=True)
class StaticTable:
    """A table of fixed rows, not yet sharded.

    Attributes:
        name: Of the table.
        path: Of its collection in the module.
        rows, dim: Of the table.
        weight: Its rows.
        optimizer: As genrec's config says; None for collections of another origin.
    """

    name: str
    path: str
    rows: int
    dim: int
    weight: nn.Parameter
    optimizer: TableOptimizerConfig | None

    @property
    def optimizer_name(self) -> str:
        """For people."""
        return self.optimizer.name if self.optimizer else "the module's own"


def static_tables(module: nn.Module) -> list[StaticTable]:
    """All of a module, in the order of their collections."""
    found: list[StaticTable] = []
    for path, child in module.named_modules():
        if isinstance(child, EmbeddingCollection):
            configs, tables = child.embedding_configs(), child.embeddings
        elif isinstance(child, EmbeddingBagCollection):
            configs, tables = child.embedding_bag_configs(), child.embedding_bags
        else:
            continue
        for c in configs:
            weight: Any = tables[c.name].weight
            optimizer = _optimizer(module, path, c.name)
            found.append(StaticTable(c.name, path, c.num_embeddings, c.embedding_dim, weight, optimizer))
    return found


def _optimizer(module: nn.Module, path: str, name: str) -> TableOptimizerConfig | None:
    while path:
        path = path.rpartition(".")[0]
        owner = module.get_submodule(path)
        if isinstance(owner, EmbeddingTables) and name in owner.configs:
            return owner.configs[name].optimizer
    return None


def not_fusible(optimizer: TableOptimizerConfig, device: torch.device) -> str | None:
    """Why FBGEMM's fused optimizers can't do what the config says; None where they can."""
    if device.type == "cpu" and optimizer.name not in _ON_CPU:
        return f"FBGEMM's tables on CPU know no {optimizer.name}"
    if optimizer.weight_decay and optimizer.name in ("sgd", "adagrad", "adam"):
        return f"FBGEMM's {optimizer.name} has no coupled weight decay"
    if optimizer.max_gradient is not None:
        return "FBGEMM clamps gradients of single lookups, not of rows, as max_gradient says"
    return None


def check_optimizer(table: StaticTable, sharding: str, device: torch.device) -> None:
    """Raise unless a table's optimizer is the same one when the table is sharded so.

    Raises:
        ValueError: It isn't, or can't be fused on the device.
    """
    if table.optimizer is None or sharding == "data_parallel":
        return
    if table.optimizer.name == "rowwise_adagrad" and sharding not in _BY_ROW:
        raise ValueError(
            f"Table '{table.name}' is to be sharded {sharding}, but rowwise_adagrad keeps one number a row and each "
            "shard of columns would keep another: choose embedding.optimizer.name=adagrad, or the sharding row_wise."
        )
    if (reason := not_fusible(table.optimizer, device)) is not None:
        raise ValueError(
            f"Table '{table.name}' is to be sharded {sharding}, but {reason}: choose "
            "embedding.optimizer.name=rowwise_adagrad, embedding.backend=hkv (dynamic tables know every optimizer), or "
            "the sharding data_parallel."
        )


@contextmanager
def optimizers_noted(tables: Iterable[StaticTable]) -> Iterator[None]:
    """Inside, planners see that each table has a fused optimizer, and of which class: they reckon with its state."""
    noted = [t for t in tables if t.optimizer and not hasattr(t.weight, "_optimizer_classes")]
    for table in noted:
        weight: Any = table.weight
        assert table.optimizer is not None
        weight._optimizer_classes, weight._in_backward_optimizers = [_CLASSES[table.optimizer.name]], []
    try:
        yield
    finally:
        for table in noted:
            weight = table.weight
            del weight._optimizer_classes, weight._in_backward_optimizers


def fuse(table: StaticTable) -> None:
    """Note the optimizer where TorchRec looks for it when it shards the table.

    Raises:
        ValueError: There is none.
    """
    optimizer = table.optimizer
    if optimizer is None:
        if not hasattr(table.weight, "_optimizer_classes"):
            raise ValueError(
                f"Table '{table.name}' of {table.path} has no optimizer: call "
                "torchrec.optim.apply_optimizer_in_backward on its weight before training, or build it with "
                "genrec.embedding.EmbeddingTables."
            )
        return
    kwargs: dict[str, Any] = {"lr": optimizer.learning_rate}
    if optimizer.name != "sgd":
        kwargs |= {"eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    if optimizer.name in ("adam", "adamw"):
        kwargs["betas"] = optimizer.betas
    apply_optimizer_in_backward(_CLASSES[optimizer.name], [table.weight], kwargs)
