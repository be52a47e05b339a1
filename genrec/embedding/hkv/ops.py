"""torch.library ops of the dynamic tables. A table is named by its number, so that torch.compile and torch.export see
plain ops on tensors; the update of the rows is the backward pass of the lookup."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from genrec.embedding.hkv.table import HkvTable, Lookup

# Filled by the modules: what the optimizer's rate is now, by table. A schedule changes it between steps.
_RATES: weakref.WeakKeyDictionary[HkvTable, Any] = weakref.WeakKeyDictionary()


def set_rate_source(table: HkvTable, source: Any) -> None:
    """Let `source()` give the learning rate of the table's updates from now on."""
    _RATES[table] = source


def learning_rate(table: HkvTable) -> float:
    """The rate of the table's next update."""
    source = _RATES.get(table)
    return float(source()) if source is not None else table.config.optimizer.learning_rate


def _table(number: int) -> HkvTable:
    table = HkvTable.by_id.get(number)
    if table is None:
        raise RuntimeError(f"Dynamic table number {number} no longer exists: keep the module that owns it alive.")
    return table


class _Ticket:
    """Keeps the rows of a batch in their place until its update, or until the graph that would update them is gone."""

    def __init__(self, table: HkvTable, step: int) -> None:
        self._table, self._step = weakref.ref(table), step
        table.pin(step)

    def release(self) -> None:
        table = self._table()
        if table is not None:
            table.unpin(self._step)
        self._table = lambda: None  # type: ignore[assignment]

    __del__ = release


_Sorted = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _pack(lookup: Lookup) -> _Sorted:
    numbers = torch.tensor([lookup.unique, lookup.step, lookup.generation])
    return lookup.rows, lookup.keys, lookup.offsets, lookup.positions, numbers


def _unpack(parts: Any) -> Lookup:
    rows, keys, offsets, positions, numbers = parts
    unique, step, generation = numbers.tolist()
    return Lookup(rows, keys, offsets, positions, unique, None, None, step, generation)


def _fake_sorted(keys: Tensor) -> _Sorted:
    n = keys.numel()
    long, short = keys.new_empty(n, dtype=torch.int64), keys.new_empty(n, dtype=torch.int32)
    offsets, numbers = keys.new_empty(n + 1, dtype=torch.int32), keys.new_empty(3, dtype=torch.int64)
    return long, long.clone(), offsets, short, numbers


@torch.library.custom_op("genrec::hkv_lookup", mutates_args=())
def hkv_lookup(
    keys: Tensor, anchor: Tensor, table: int, dim: int, scores: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A training lookup: (n, dim) fp32 rows, then the batch sorted by unique key (`Lookup`).

    Args:
        keys: (n,) int64.
        anchor: Any tensor that requires a gradient; it ties the update to the backward pass.
        table: Number of the table.
        dim: Width of its rows.
        scores: (n,) int64 for score "custom".
    """
    owner = _table(table)
    keys = owner.check_keys(keys)
    lookup = owner.lookup(keys, scores=scores, want_rows=True)
    assert lookup.rows_at is not None
    return owner.gather(lookup.rows_at, keys), *_pack(lookup)


@hkv_lookup.register_fake
def _(keys: Tensor, anchor: Tensor, table: int, dim: int, scores: Tensor | None) -> Any:
    return anchor.new_empty(keys.numel(), dim, dtype=torch.float32), *_fake_sorted(keys)


@torch.library.custom_op("genrec::hkv_update", mutates_args=())
def hkv_update(
    gradient: Tensor,
    rows: Tensor,
    keys: Tensor,
    offsets: Tensor,
    positions: Tensor,
    numbers: Tensor,
    gradient_row: Tensor | None,
    gradient_weight: Tensor | None,
    table: int,
) -> Tensor:
    """One optimizer step on the rows of a lookup; returns the (empty) gradient of its anchor."""
    owner = _table(table)
    lookup = _unpack((rows, keys, offsets, positions, numbers))
    owner.update(lookup, gradient, learning_rate(owner), gradient_row, gradient_weight)
    return gradient.new_zeros(0, dtype=torch.float32)


@hkv_update.register_fake
def _(gradient: Tensor, *args: Any) -> Tensor:
    return gradient.new_empty(0, dtype=torch.float32)


def _lookup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, ctx.table, _, _ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    owner = HkvTable.by_id.get(ctx.table)
    ctx.ticket = _Ticket(owner, owner.step) if owner is not None else None


def _lookup_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> Any:
    anchor = None
    if gradient is not None:
        anchor = hkv_update(gradient, *ctx.saved_tensors, None, None, ctx.table)
    if ctx.ticket is not None:
        ctx.ticket.release()
    return None, anchor, None, None, None


hkv_lookup.register_autograd(_lookup_backward, setup_context=_lookup_context)


@torch.library.custom_op("genrec::hkv_pooled_lookup", mutates_args=())
def hkv_pooled_lookup(
    keys: Tensor,
    bag_offsets: Tensor,
    bag_of_key: Tensor,
    weights: Tensor | None,
    anchor: Tensor,
    table: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A training lookup with pooling: (bags, dim) fp32 weighted sums, then the batch sorted by unique key.

    Args:
        keys: (n,) int64.
        bag_offsets: (bags + 1,) int64.
        bag_of_key: (n,) int32.
        weights: (n,) fp32 by which each key's row is multiplied; no gradient flows to them.
        anchor: As in `hkv_lookup`.
        table: Number of the table.
        dim: Width of its rows.
    """
    owner = _table(table)
    lookup = owner.lookup(keys, want_rows=True)
    assert lookup.rows_at is not None
    return owner.pool(lookup.rows_at, owner.check_keys(keys), bag_offsets, weights), *_pack(lookup)


@hkv_pooled_lookup.register_fake
def _(
    keys: Tensor, bag_offsets: Tensor, bag_of_key: Tensor, weights: Tensor | None, anchor: Tensor, table: int, dim: int
) -> Any:
    return anchor.new_empty(bag_offsets.numel() - 1, dim, dtype=torch.float32), *_fake_sorted(keys)


def _pooled_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, bag_of_key, weights, _, ctx.table, _ = inputs
    ctx.save_for_backward(*output[1:], bag_of_key, weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    owner = HkvTable.by_id.get(ctx.table)
    ctx.ticket = _Ticket(owner, owner.step) if owner is not None else None


def _pooled_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> Any:
    anchor = None
    if gradient is not None:
        *batch, bag_of_key, weights = ctx.saved_tensors
        anchor = hkv_update(gradient, *batch, bag_of_key, weights, ctx.table)
    if ctx.ticket is not None:
        ctx.ticket.release()
    return None, None, None, None, anchor, None, None


hkv_pooled_lookup.register_autograd(_pooled_backward, setup_context=_pooled_context)


@torch.library.custom_op("genrec::hkv_find", mutates_args=())
def hkv_find(keys: Tensor, table: int, dim: int) -> Tensor:
    """An evaluation lookup: (n, dim) fp32. Changes nothing in the table."""
    return _table(table).embed(keys)


@hkv_find.register_fake
def _(keys: Tensor, table: int, dim: int) -> Tensor:
    return keys.new_empty(keys.numel(), dim, dtype=torch.float32)


@torch.library.custom_op("genrec::hkv_pooled_find", mutates_args=())
def hkv_pooled_find(keys: Tensor, bag_offsets: Tensor, weights: Tensor | None, table: int, dim: int) -> Tensor:
    """An evaluation lookup with pooling: (bags, dim) fp32. Changes nothing in the table."""
    owner = _table(table)
    keys = owner.check_keys(keys)
    return owner.pool(owner.find(keys), keys, bag_offsets, weights)


@hkv_pooled_find.register_fake
def _(keys: Tensor, bag_offsets: Tensor, weights: Tensor | None, table: int, dim: int) -> Tensor:
    return keys.new_empty(bag_offsets.numel() - 1, dim, dtype=torch.float32)
