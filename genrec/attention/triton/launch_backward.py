"""The backward pass: which kernels make which gradients, and their launches.

Every form makes dk in the kernel over blocks of keys, and dv with it but for "split". `Config.passes` of that kernel
says what the rest does:

* "one": it adds dq and the gradients of the bias's tables to memory as well.
* "tables": it adds dq; a kernel over blocks of keys of all heads makes the tables' gradients.
* "rows": a kernel over blocks of rows makes dq, without additions to memory, and the tables' gradients.
* "split": dv, dk, dq and the tables' gradients each come from a kernel of their own; dv and dk from two launches of the
  one over keys. One more product of scores than "rows", but no kernel has two accumulators: at a head dim of 256 there
  are no registers for them.
* "stored": for a relative bias, which a kernel of its own computes once for all heads, in 16 bits. The kernel over keys
  stores the gradients of the scores, in 16 bits; one over rows makes dq of them, one over diagonals the tables'
  gradients. Where there is no room for them (`launch_stored`), another form of the list serves.

Deterministic, dq comes from a kernel over rows in any form, and what adds to a table runs with a copy of it for each
program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.attention.triton import launch_stored, tuning
from genrec.attention.triton.configs import Config, Passes, candidates
from genrec.attention.triton.kernels.backward import backward_kernel
from genrec.attention.triton.kernels.backward_rows import backward_rows_kernel
from genrec.attention.triton.kernels.backward_stored import stored_tables_kernel
from genrec.attention.triton.kernels.backward_tables import backward_tables_kernel
from genrec.attention.triton.launch import INTERPRETED, Call, descriptor, rows_contiguous, start, strides

COPIES = 32
"""Copies of the tables' gradients, so that programs seldom wait for each other."""
OWN_ELEMENTS = 2**23
"""About as many numbers do the deterministic mode's copies hold, one for each program of a launch."""


def run_backward(call: Call, d_out: Tensor, needed: list[bool]) -> list[Tensor]:
    """Gradients of q, k, v and, where needed, of position table, time table and dense bias (else without elements)."""
    d_out = rows_contiguous(d_out)
    if call.empty:
        dense = call.dense
        tables = [x.new_zeros(x.shape) if need and x is not None else call.q.new_empty(0)
                  for x, need in zip((call.position, call.time, dense), needed, strict=True)]  # fmt: skip
        return [x.new_zeros(x.shape) for x in (call.q, call.k, call.v)] + tables
    gradients = Gradients(call, needed)
    # With additions to memory a second run would double them: the sums begin anew with each.
    tuning.run("backward", call, lambda config: launch_all(call, d_out, gradients, config))
    return gradients.results()


class Gradients:
    """The outputs of a backward pass, and sums in fp32 on the way to them."""

    def __init__(self, call: Call, needed: list[bool]) -> None:
        self.call, self.needed = call, needed
        self.dk, self.dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.k, call.v))
        self.dq: Tensor | None = None
        self.dq_sum: Tensor | None = None
        self.d_position: Tensor | None = None
        self.d_time: Tensor | None = None
        self.d_dense: Tensor | None = None
        self.copies = 1
        self.passes: Passes = "one"
        self.split = False
        self.tabled = False
        self.bias: launch_stored.BiasTiles | None = None
        self.scores: launch_stored.Scores | None = None

    @property
    def shared_dense(self) -> bool:
        """Whether heads add to one dense gradient by atomics."""
        dense = self.call.dense
        return dense is not None and dense.shape[1] < self.call.q.shape[1] and not self.call.deterministic

    @property
    def tables(self) -> dict[str, Any]:
        """Arguments of a kernel that makes the tables' gradients."""
        return {"d_position": self.d_position, "d_time": self.d_time, "copies": self.copies}

    def begin(self, passes: Passes) -> None:
        """Room for the results of such a form."""
        call, device = self.call, self.call.q.device
        self.tabled = (self.needed[0] and call.position is not None) or (self.needed[1] and call.time is not None)
        self.split = passes == "split"
        if self.split or (call.deterministic and passes == "rows"):
            passes = "tables"
        self.passes = passes if self.tabled or passes in ("rows", "stored") else "one"
        self.scores = launch_stored.new_scores(call) if passes == "stored" else None
        if self.passes in ("rows", "stored") or self.split or call.deterministic:
            self.dq, self.dq_sum = torch.empty(call.q.shape, dtype=call.q.dtype, device=device), None
        else:
            self.dq, self.dq_sum = None, torch.zeros(call.q.shape, dtype=torch.float32, device=device)
        if self.needed[2] and call.dense is not None:
            shape = list(call.dense.shape)
            # One order of additions, deterministic: each head writes its own, then they are added.
            shape[1] = 1 if self.shared_dense else call.q.shape[1]
            dtype = torch.float32 if shape[1] != call.dense.shape[1] or self.shared_dense else call.dense.dtype
            self.d_dense = torch.zeros(shape, dtype=dtype, device=call.q.device)

    def begin_tables(self, pieces: int) -> None:
        """Copies of the tables' gradients, zero, for so many pieces of work."""
        call, device = self.call, self.call.q.device
        entries = 1 + sum(x.numel() for x in (call.position, call.time) if x is not None)
        own = max(132, OWN_ELEMENTS // entries) if not INTERPRETED else 5
        self.copies = min(own if call.deterministic else COPIES, pieces)
        if self.needed[0] and call.position is not None:
            self.d_position = torch.zeros(self.copies, call.position.numel(), dtype=torch.float32, device=device)
        if self.needed[1] and call.time is not None:
            self.d_time = torch.zeros(self.copies, call.time.numel(), dtype=torch.float32, device=device)

    def results(self) -> list[Tensor]:
        """In the dtypes of the inputs."""
        call = self.call
        dq = self.dq if self.dq is not None else self.dq_sum
        assert dq is not None
        position, time = self._table(self.d_position, call.position), self._table(self.d_time, call.time)
        dense = call.q.new_empty(0)
        if self.d_dense is not None and call.dense is not None:
            dense = self.d_dense
            if dense.shape[1] != call.dense.shape[1]:
                dense = dense.sum(1, keepdim=True)
            dense = dense.to(call.dense.dtype)
        return [dq.to(call.q.dtype), self.dk, self.dv, position, time, dense]

    def _table(self, copies: Tensor | None, like: Tensor | None) -> Tensor:
        if copies is None or like is None:
            return self.call.q.new_empty(0)
        return copies.sum(0).to(like.dtype)


def launch_all(call: Call, d_out: Tensor, gradients: Gradients, config: Config) -> None:
    """All kernels of a form; `config` is that of the kernel over keys that makes dk, the others have their own."""
    if config.passes == "stored" and not (call.room[1] and launch_stored.loads(call, config, of_keys=True)):  # forced
        config = next(c for c in candidates("backward", call.shape) if c.passes != "stored")
    gradients.begin(config.passes)
    if gradients.scores is not None:
        gradients.bias = launch_stored.fill_bias(call, config, of_keys=True)
        launch_keys(call, d_out, gradients, config)
        gradients.bias = None
        tuning.run("stored_rows", call, lambda c: launch_stored_rows(call, gradients, c))
        if gradients.tabled:
            tuning.run("stored_tables", call, lambda c: launch_stored_tables(call, gradients, config, c))
        gradients.scores = None
        return
    if gradients.dq is not None:
        tuning.run("backward_rows", call, lambda c: launch_rows(call, d_out, gradients, c))
    if gradients.passes == "tables":
        tuning.run("backward_tables", call, lambda c: launch_tables(call, d_out, gradients, c))
    if gradients.split:
        tuning.run("backward_values", call, lambda c: launch_values(call, d_out, gradients, c))
    launch_keys(call, d_out, gradients, config)


def launch_keys(call: Call, d_out: Tensor, gradients: Gradients, config: Config) -> None:
    """dk, the dense bias's gradient and, by the form, dv, dq and the tables' gradients."""
    pieces = call.pieces(config, of_keys=True)
    tables = _tables("one", gradients, config, pieces, config.keys, config.rows)
    d_dense = gradients.d_dense
    dense_strides = (0, 0, 0)
    if d_dense is not None:
        dense_strides = d_dense.stride(0), 0 if gradients.shared_dense else d_dense.stride(1), d_dense.stride(2)
    dq_descriptor = None
    if gradients.dq_sum is not None and call.shape.qk_width == call.q.shape[2]:
        dq_descriptor = descriptor(gradients.dq_sum, config.rows, config)
    arguments = _keys_arguments(call, d_out, config, gradients.split) | tables | {
        "dq_sum": gradients.dq_sum, "dq_descriptor": dq_descriptor,
        "dk": gradients.dk, "dv": None if gradients.split else gradients.dv, "d_dense": d_dense,
        **_stored(gradients, config),
        **dict(zip(("d_dense_batch", "d_dense_head", "d_dense_row"), dense_strides, strict=True)),
        "SHARED_DENSE": gradients.shared_dense,
    }  # fmt: skip
    _start_parts(backward_kernel, call, config, pieces, arguments)


def launch_values(call: Call, d_out: Tensor, gradients: Gradients, config: Config) -> None:
    """dv, in the form "split"."""
    pieces = call.pieces(config, of_keys=True)
    nothing = dict.fromkeys(("dk", "dq_sum", "dq_descriptor", "d_position", "d_time", "d_dense"))
    arguments = _keys_arguments(call, d_out, config, True) | nothing | {
        "dv": gradients.dv, "copies": 1, "d_dense_batch": 0, "d_dense_head": 0, "d_dense_row": 0, "SHARED_DENSE": False,
        "first_work": 0, **launch_stored.NO_TILES, **_NO_SCORES,
    }  # fmt: skip
    start(backward_kernel, call, config, pieces, arguments)


def _keys_arguments(call: Call, d_out: Tensor, config: Config, split: bool) -> dict[str, Any]:
    """The inputs of the kernel over keys."""
    # Neither kernel of the form "split" sums anything over keys: what lies beyond a sequence harms none.
    k_descriptor, v_descriptor = (descriptor(x, config.keys, config) if split else None for x in (call.k, call.v))
    return call.common(config, of_keys=True) | strides("d_out", d_out) | {
        "d_out": d_out,
        "q_descriptor": descriptor(call.q, config.rows, config),
        "k_descriptor": k_descriptor, "v_descriptor": v_descriptor,
        "d_out_descriptor": descriptor(d_out, config.rows, config),
        "DETERMINISTIC": call.deterministic,
    }  # fmt: skip


_NO_SCORES = {"scores": None, "scores_descriptor": None, "cells": 0, "cells_per_row": 0, "CELLS_WIDE": False}


def _stored(gradients: Gradients, config: Config) -> dict[str, Any]:
    """Where the kernel over keys loads the bias and stores the gradients of the scores, if it does."""
    bias = launch_stored.NO_TILES if gradients.bias is None else gradients.bias.arguments()
    scores = gradients.scores
    if scores is None:
        return bias | _NO_SCORES
    return bias | scores.arguments() | {"scores_descriptor": scores.descriptor(config.rows, config.keys, config),
                                        "CELLS_WIDE": scores.places.wide}  # fmt: skip


def launch_stored_rows(call: Call, gradients: Gradients, config: Config) -> None:
    """dq, in the form "stored"."""
    assert gradients.scores is not None
    assert gradients.dq is not None
    launch_stored.launch_stored_rows(call, gradients.scores, gradients.dq, config)


def launch_stored_tables(call: Call, gradients: Gradients, writer: Config, config: Config) -> None:
    """The tables' gradients, in the form "stored"; `writer` is the configuration of the kernel over keys."""
    assert gradients.scores is not None
    pieces = call.prepared.bound(True, config.keys) * launch_stored.PARTS
    tables = _tables("stored", gradients, config, pieces, config.keys, config.keys)
    arguments = launch_stored.stored_tables_arguments(call, gradients.scores, writer, config) | tables
    _start_parts(stored_tables_kernel, call, config, pieces, arguments)


def launch_rows(call: Call, d_out: Tensor, gradients: Gradients, config: Config) -> None:
    """dq and, in the form "rows", the tables' gradients."""
    pieces = call.pieces(config, of_keys=False)
    tables = _tables("rows", gradients, config, pieces, config.rows, config.keys)
    # Where tables are summed over rows, those beyond a sequence have to be zero.
    summed = tables["d_position"] is not None or tables["d_time"] is not None
    q_descriptor, d_out_descriptor = (None if summed else descriptor(x, config.rows, config) for x in (call.q, d_out))
    arguments = call.common(config, of_keys=False) | strides("d_out", d_out) | tables | {
        "d_out": d_out, "dq": gradients.dq, "q_descriptor": q_descriptor, "d_out_descriptor": d_out_descriptor,
        "k_descriptor": descriptor(call.k, config.keys, config),
        "v_descriptor": descriptor(call.v, config.keys, config),
    }  # fmt: skip
    start(backward_rows_kernel, call, config, pieces, arguments)


def launch_tables(call: Call, d_out: Tensor, gradients: Gradients, config: Config) -> None:
    """The tables' gradients, in the form "tables"."""
    pieces = call.pieces(config, of_keys=True)
    tables = _tables("tables", gradients, config, pieces, config.keys, config.rows)
    arguments = call.common(config, of_keys=True) | strides("d_out", d_out) | tables | {
        "d_out": d_out,
        "q_descriptor": descriptor(call.q, config.rows, config),
        "k_descriptor": descriptor(call.k, config.keys, config),
        "v_descriptor": descriptor(call.v, config.keys, config),
        "d_out_descriptor": descriptor(d_out, config.rows, config),
        "DETERMINISTIC": call.deterministic,
    }  # fmt: skip
    _start_parts(backward_tables_kernel, call, config, pieces, arguments)


def _start_parts(kernel: Any, call: Call, config: Config, pieces: int, arguments: dict[str, Any]) -> None:
    """Deterministic, each program has copies of the tables to itself: launches of so many follow each other."""
    tabled = arguments["d_position"] is not None or arguments["d_time"] is not None
    programs = arguments["copies"] if call.deterministic and tabled else pieces
    for begin in range(0, pieces, programs):
        start(kernel, call, config, programs, arguments | {"first_work": begin})


def _tables(
    form: str, gradients: Gradients, config: Config, pieces: int, first: int, second: int
) -> dict[str, Any]:  # fmt: skip
    """Where a kernel with blocks of first x second adds to the tables: nowhere but in the form that has it do so."""
    if gradients.passes != form:
        return {"d_position": None, "d_time": None, "copies": 1}
    gradients.begin_tables(pieces)
    if gradients.tables["d_position"] is not None and first < second:
        raise ValueError(f"{config}: the gradient of a position table needs as many of its own rows or keys, or more.")
    return gradients.tables
