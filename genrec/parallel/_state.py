"""What a training run holds, as pieces of global tensors: weights and optimizer states, by name, and back.

Names are those of the unsharded model. Optimizer states of tables that update themselves have the names and shapes that
a plain optimizer of the same kind gives them, so that either can take the other's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim import Optimizer

from genrec._optimizer_names import (
    IMPLEMENTATION,
    driven,
    fitting,
    fused_parameters,
    options_of,
    parameter_names,
    step_device,
)
from genrec.parallel._pieces import Piece

BY_COLUMNS = "@columns"
"""Ends the name of a row-wise quantity of a table cut column-wise: (rows, column shards), a value for each part."""


@dataclass(frozen=True)
class Shards:
    """Where this rank's tensor-parallel parameters lie in the whole ones.

    Args:
        dims: Dimension along which a parameter is cut, by name; all ranks hold equal blocks.
        rank, size: In the tensor-parallel group.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0
    size: int = 1

    def piece(self, key: str, name: str, tensor: Tensor, dim: int | None = None) -> Piece:
        """A tensor of the parameter `name`, or of its optimizer's state."""
        dim = self.dims.get(name) if dim is None else dim
        if self.size == 1 or dim is None or dim >= tensor.dim():
            return Piece.whole(key, tensor)
        offset, size = [0] * tensor.dim(), list(tensor.shape)
        offset[dim], size[dim] = self.rank * tensor.shape[dim], self.size * tensor.shape[dim]
        return Piece(key, tensor, tuple(offset), tuple(size))


class Source(Protocol):
    """A checkpoint that pieces can be filled from."""

    sizes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    groups: list[dict[str, Any]]
    columns: Callable[[str], list[int]]

    def read(self, pieces: list[Piece]) -> None:
        """Fill the pieces."""


# Weights --------------------------------------------------------------------------------------------------------------


def model_state(module: nn.Module, shards: Shards) -> tuple[dict[str, Any], list[Piece], dict[str, Any]]:
    """The module's own state_dict, its tensors as pieces, and what in it is no tensor.

    Raises:
        NotImplementedError: A kind of sharded tensor that is not known here.
    """
    from genrec.embedding.hkv.checkpoint import tables_saved_separately

    with tables_saved_separately():
        state = module.state_dict()
    pieces: list[Piece] = []
    extra: dict[str, Any] = {}
    for name, value in state.items():
        key = f"model.{name}"
        if isinstance(value, ShardedTensor):
            pieces += [
                Piece(key, shard.tensor, tuple(shard.metadata.shard_offsets), tuple(value.metadata().size))
                for shard in value.local_shards()
            ]
        elif type(value) is Tensor or type(value) is nn.Parameter:
            pieces.append(shards.piece(key, name, value.detach()))
        elif isinstance(value, Tensor):
            pieces.append(shards.piece(key, name, _plain(name, value)))
        elif value is not None:
            extra[name] = value
    return state, pieces, extra


def _plain(name: str, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        raise NotImplementedError(
            f"'{name}' is a DTensor, which genrec's checkpoints don't know: shard without output_dtensor."
        )
    return value.detach().as_subclass(Tensor)


# Optimizer states -----------------------------------------------------------------------------------------------------


@dataclass
class FusedTable:
    """This rank's part of a table that updates itself: its weight and the quantities that its optimizer keeps.

    Args:
        name: Of the weight.
        weight: The sharded weight.
        state: Sharded tensors, by the names that torch's optimizers use.
        optimizer: TorchRec's fused optimizer of the table.
    """

    name: str
    weight: ShardedTensor
    state: dict[str, ShardedTensor]
    optimizer: Any

    @property
    def columns(self) -> list[int]:
        """Widths of the column shards, one for a table that is not cut column-wise."""
        cuts = {s.shard_offsets[1]: s.shard_sizes[1] for s in self.weight.metadata().shards_metadata}
        return [cuts[offset] for offset in sorted(cuts)]

    def parts(self, quantity: str) -> Iterator[tuple[Tensor, tuple[int, int], int]]:
        """Each local tensor of a quantity, where its block of the weight begins, and the number of its column shard."""
        starts = sorted({s.shard_offsets[1] for s in self.weight.metadata().shards_metadata})
        shards = zip(self.weight.local_shards(), self.state[quantity].local_shards(), strict=True)
        for weight, part in shards:
            row, column = weight.metadata.shard_offsets
            yield part.tensor, (row, column), starts.index(column)

    @property
    def step(self) -> int | None:
        """Steps that the table's optimizer counts; None where the kind of optimizer doesn't ask for it."""
        return int(self.optimizer._emb_module.iter.item()) if "exp_avg_sq" in self.state else None

    @step.setter
    def step(self, value: int) -> None:
        self.optimizer.set_optimizer_step(value)
        self.optimizer._emb_module.iter_cpu.fill_(value)


def fused_tables(module: nn.Module) -> list[FusedTable]:
    """Static tables of which this rank holds a part. Dynamic tables keep their states with their rows."""
    tables = []
    for name, weight, optimizer in fused_parameters(module):
        if not isinstance(weight, ShardedTensor):
            continue
        leaf = next(leaf for leaf in _leaves(optimizer) if any(weight is other for other in leaf.params.values()))
        quantities = {key.rpartition(".")[2]: value for key, value in leaf.state[weight].items()}
        if "momentum1" in quantities:
            # TorchRec's name for the first quantity of any optimizer.
            adam = "exp_avg_sq" in quantities
            quantities = {"exp_avg" if adam else "sum": quantities.pop("momentum1"), **quantities}
        tables.append(FusedTable(name, weight, quantities, leaf))
    return tables


def _leaves(optimizer: Any) -> list[Any]:
    nested = getattr(optimizer, "optimizers", None)
    return [optimizer] if nested is None else [leaf for _, inner in nested for leaf in _leaves(inner)]


def plain_parameters(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor, Optimizer]]:
    """Name, parameter and optimizer of all that plain optimizers train.

    Raises:
        ValueError: An optimizer holds a parameter that the module doesn't have.
    """
    names = parameter_names(module)
    fused = {id(weight) for _, weight, _ in fused_parameters(module)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in fused or hasattr(parameter, "_in_backward_optimizers"):
                    continue
                if id(parameter) not in names:
                    raise ValueError(
                        f"{type(optimizer).__name__} trains a parameter of shape {tuple(parameter.shape)} that the "
                        "module doesn't have: its state has no name. Make the optimizer once the model is final."
                    )
                yield names[id(parameter)], parameter, optimizer


def optimizer_pieces(module: nn.Module, optimizers: Sequence[Optimizer], shards: Shards) -> list[Piece]:
    """All optimizer states."""
    pieces = []
    for name, parameter, optimizer in plain_parameters(module, optimizers):
        for quantity, value in optimizer.state.get(parameter, {}).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            pieces.append(shards.piece(f"optimizer.{name}.{quantity}", name, tensor))
    for table in fused_tables(module):
        for quantity in table.state:
            pieces += _fused_pieces(table, quantity)
        if table.step is not None:
            pieces.append(Piece.whole(f"optimizer.{table.name}.step", torch.tensor(float(table.step))))
    return pieces


def _fused_pieces(table: FusedTable, quantity: str) -> list[Piece]:
    key, (rows, dim), pieces = f"optimizer.{table.name}.{quantity}", table.weight.metadata().size, []
    columns = len(table.columns)
    for tensor, (row, column), number in table.parts(quantity):
        if quantity == "iter":
            pieces.append(Piece.whole(key, tensor.view(())))
        elif tensor.dim() == 2:
            pieces.append(Piece(key, tensor, (row, column), (rows, dim)))
        elif columns == 1:
            pieces.append(Piece(key, tensor, (row,), (rows,)))
        else:
            pieces.append(Piece(key + BY_COLUMNS, tensor.unsqueeze(1), (row, number), (rows, columns)))
    return pieces


def parameter_groups(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[dict[str, Any]]]:
    """Options of the parameters of each optimizer, as groups of names."""
    names = parameter_names(module)
    return [
        [
            {
                "params": [names[id(weight)] for weight in weights if id(weight) in names],
                **{key: value for key, value in group.items() if key not in IMPLEMENTATION},
            }
            for group, weights in driven(optimizer)
        ]
        for optimizer in optimizers
    ]


def fused_rates(module: nn.Module) -> dict[str, float]:
    """The rates at which tables of this rank update themselves next: a schedule may be one step ahead of them."""
    names = parameter_names(module)
    return {
        names[id(weight)]: float(group["lr"])
        for optimizer in {id(optimizer): optimizer for _, _, optimizer in fused_parameters(module)}.values()
        for group in optimizer.param_groups
        for weight in group["params"]
        if id(weight) in names
    }


# Back -----------------------------------------------------------------------------------------------------------------


class Reads:
    """Pieces to fill from a source, and what is to be done once they are."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.pieces: list[Piece] = []
        self._after: list[Callable[[], Any]] = []

    def then(self, function: Callable[[], Any]) -> None:
        """To be called after the read."""
        self._after.append(function)

    def finish(self) -> None:
        """After the read."""
        for function in self._after:
            function()


def plan_model(reads: Reads, module: nn.Module, shards: Shards, extra: Mapping[str, Any], strict: bool) -> None:
    """Have the module's tensors filled, in place.

    Raises:
        ValueError: A tensor has another size, or (`strict`) the module and the checkpoint have different ones.
    """
    from genrec.embedding.hkv.checkpoint import tables_saved_separately

    state, pieces, own_extra = model_state(module, shards)
    sizes = reads.source.sizes
    wanted, saved = _tensor_keys(state), {key for key in sizes if key.startswith("model.")}
    if strict and wanted != saved:
        raise ValueError(
            f"The checkpoint doesn't fit the module. Missing in the checkpoint: {_short(wanted - saved)}. Not in the "
            f"module: {_short(saved - wanted)}."
        )
    for piece in pieces:
        if piece.key in saved and sizes[piece.key] != piece.size:
            raise ValueError(f"'{piece.key[6:]}' has size {piece.size}, in the checkpoint {sizes[piece.key]}.")
    reads.pieces += [piece for piece in pieces if piece.key in saved]
    present = {name: value for name, value in state.items() if f"model.{name}" in saved or name in own_extra}
    present |= {name: value for name, value in extra.items() if name in own_extra}

    def finish() -> None:
        # Onto itself: for the hooks of modules, which drop caches of what has changed, and for dynamic tables.
        with tables_saved_separately():
            module.load_state_dict(present, strict=False)

    reads.then(finish)


def _tensor_keys(state: Mapping[str, Any]) -> set[str]:
    return {f"model.{name}" for name, value in state.items() if isinstance(value, (Tensor, ShardedTensor))}


def _short(keys: set[str]) -> str:
    names = [key.removeprefix("model.") for key in sorted(keys)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def plan_optimizers(
    reads: Reads, module: nn.Module, optimizers: Sequence[Optimizer], shards: Shards, rates: Mapping[str, float]
) -> None:  # fmt: skip
    """Have the optimizers' states filled and the options of their groups set.

    Raises:
        ValueError: A parameter's state is of another kind of optimizer.
    """
    trained = {name for group in reads.source.groups for name in group["params"]} | set(rates)
    fresh = []
    for name, parameter, optimizer in plain_parameters(module, optimizers):
        _read_plain(reads, name, parameter, optimizer, shards)
        if name not in trained:
            fresh.append(name)
    for table in fused_tables(module):
        _read_fused(reads, table)
        if table.name not in trained:
            fresh.append(table.name)
    if fresh:
        warnings.warn(
            f"The checkpoint's optimizer did not train {', '.join(fresh)}: their optimizer state starts from zero.",
            stacklevel=2,
        )
    reads.then(lambda: _restore_options(module, optimizers, reads.source, rates))


def _saved_quantities(source: Source, name: str) -> dict[str, tuple[int, ...]]:
    prefix = f"optimizer.{name}."
    return {
        key[len(prefix) :]: size for key, size in source.sizes.items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    }  # fmt: skip


def _read_plain(reads: Reads, name: str, parameter: Tensor, optimizer: Optimizer, shards: Shards) -> None:
    source, dim = reads.source, shards.dims.get(name)
    state: dict[str, Tensor] = {}
    for quantity, size in _saved_quantities(source, name).items():
        short = quantity.removesuffix(BY_COLUMNS)
        key = f"optimizer.{name}.{quantity}"
        device = parameter.device if size else step_device(optimizer, parameter)
        local = [n // shards.size if i == dim and shards.size > 1 else n for i, n in enumerate(size)]
        tensor = torch.zeros(local, dtype=source.dtypes[key], device=device)
        reads.pieces.append(shards.piece(key, name, tensor))
        state[short] = tensor if short == quantity else Columns(tensor, source.columns(name))  # type: ignore[assignment]
    fitted = fitting(name, state, parameter.shape, optimizer)
    if not fitted:
        # Not trained yet, or an optimizer without a state.
        _forget(optimizer, parameter)
        return
    reads.then(lambda: optimizer.state.__setitem__(parameter, {k: _value(v) for k, v in fitted.items()}))


@dataclass
class Columns:
    """(rows, column shards) means, to become one mean for each row."""

    parts: Tensor
    widths: list[int]

    @property
    def shape(self) -> torch.Size:
        return self.parts.shape[:1]

    def mean(self) -> Tensor:
        weights = torch.tensor(self.widths, dtype=torch.float64) / sum(self.widths)
        return (self.parts.double() @ weights.to(self.parts.device)).to(self.parts.dtype)


def _value(value: Any) -> Any:
    return value.mean() if isinstance(value, Columns) else value


def _forget(optimizer: Optimizer, parameter: Tensor) -> None:
    # Some make a parameter's state in their constructor and nowhere else.
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor):
            value.zero_()


def _read_fused(reads: Reads, table: FusedTable) -> None:
    source = reads.source
    saved = _saved_quantities(source, table.name)
    if not set(saved) - {"step"}:
        # Not trained yet; or by an optimizer without a state, as this one may be.
        for quantity in table.state:
            for tensor, _, _ in table.parts(quantity):
                tensor.zero_()
        return
    names = {quantity.removesuffix(BY_COLUMNS) for quantity in saved}
    if unknown := (names - {"step"}) ^ set(table.state):
        raise ValueError(
            f"The optimizer state of table '{table.name}' was saved as {sorted(names)}, the table now keeps "
            f"{sorted(table.state)} ({', '.join(sorted(unknown))} can't be mapped). Use the table optimizer that it "
            "was trained with, or load the weights alone."
        )
    for quantity in table.state:
        _read_fused_quantity(reads, table, quantity, saved)
    if "step" in saved and table.step is not None:
        step = torch.zeros(())
        reads.pieces.append(Piece.whole(f"optimizer.{table.name}.step", step))
        reads.then(lambda: setattr(table, "step", int(step)))


def _read_fused_quantity(reads: Reads, table: FusedTable, quantity: str, saved: Mapping[str, tuple[int, ...]]) -> None:
    source = reads.source
    pieces = _fused_pieces(table, quantity)
    if not pieces:
        return
    key, rows = f"optimizer.{table.name}.{quantity}", table.weight.metadata().size[0]
    by_columns = quantity + BY_COLUMNS in saved
    same_columns = by_columns and source.columns(table.name) == table.columns
    if pieces[0].key in source.sizes and source.sizes[pieces[0].key] == pieces[0].size and (
        same_columns or not by_columns
    ):  # fmt: skip
        reads.pieces += pieces
        return
    row_wise = all(tensor.dim() == 1 for tensor, _, _ in table.parts(quantity))
    if not row_wise or not (by_columns or source.sizes.get(key) == (rows,)):
        shape = next(size for name, size in saved.items() if name.removesuffix(BY_COLUMNS) == quantity)
        raise ValueError(
            f"The optimizer state '{quantity}' of table '{table.name}' was saved with shape {shape} and is now "
            f"{pieces[0].size}: another kind of optimizer. Use the one that it was trained with, or load the weights "
            "alone."
        )
    for tensor, (row, _), _ in table.parts(quantity):
        _read_row_means(reads, table, quantity, tensor, row, by_columns)
    if len(table.columns) > 1:
        warnings.warn(
            f"Table '{table.name}' is now cut into {len(table.columns)} column shards, each of which keeps a row-wise "
            f"'{quantity}' of its own; the checkpoint has it for whole rows or other shards. Each shard starts from "
            "the mean of the whole row: training goes on, but not exactly as before.",
            stacklevel=2,
        )


def _read_row_means(
    reads: Reads, table: FusedTable, quantity: str, tensor: Tensor, row: int, by_columns: bool
) -> None:  # fmt: skip
    key, rows = f"optimizer.{table.name}.{quantity}", table.weight.metadata().size[0]
    if not by_columns:
        whole = torch.zeros_like(tensor)
        reads.pieces.append(Piece(key, whole, (row,), (rows,)))
        reads.then(lambda: tensor.copy_(whole))
        return
    widths = reads.source.columns(table.name)
    parts = torch.zeros(tensor.shape[0], len(widths), dtype=tensor.dtype, device=tensor.device)
    reads.pieces.append(Piece(key + BY_COLUMNS, parts, (row, 0), (rows, len(widths))))
    reads.then(lambda: tensor.copy_(Columns(parts, widths).mean()))


def _restore_options(
    module: nn.Module, optimizers: Sequence[Optimizer], source: Source, rates: Mapping[str, float]
) -> None:  # fmt: skip
    names = parameter_names(module)
    for optimizer in optimizers:
        for group, weights in driven(optimizer):
            own = [names[id(weight)] for weight in weights if id(weight) in names]
            saved = options_of(own, source.groups)
            group.update({key: value for key, value in saved.items() if key in group or key == "initial_lr"})
    for optimizer in {id(optimizer): optimizer for _, _, optimizer in fused_parameters(module)}.values():
        for group in optimizer.param_groups:
            found = [rates[names[id(weight)]] for weight in group["params"] if names.get(id(weight)) in rates]
            if found and not getattr(optimizer, "reads_rates_in_backward", False):
                group["lr"] = found[0]
        # Of TorchRec's fused optimizers: hands the rates to the tables, nothing else.
        optimizer.step()
