"""The bias that the cutlass backend's forward pass keeps for the backward pass: who holds it, when it is freed, what
compiling makes of it. The ops run on the CPU, over a stand-in for the library that marks what it is given to keep."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from genrec.attention import AttentionMask, RelativeBias, cutlass_backend
from genrec.attention import _cutlass_binding as binding
from genrec.attention.cutlass_backend import CutlassBackend

KEPT_BYTES = 4096


class Library:
    """As much of the C interface as the ops call. Out is zeros, gradients are ones."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []
        """Forward and backward passes, with the mark that the pass wrote or found."""
        self.kept_bytes = KEPT_BYTES

    def call(self, name: str, *arguments: Any) -> int:
        problem: binding.Problem = arguments[0]._obj
        if name in ("forward", "backward"):
            self._run(name, problem, arguments[3], [x._obj for x in arguments if isinstance(x, type(arguments[0]))][1:])
            return 0
        if name == "kept_bytes":
            return self.kept_bytes if problem.bias.kind == 1 else 0
        if name == "workspace_bytes":
            return 64 if arguments[3] else 64 + self.kept_bytes
        return {"plan_bytes": 64, "make_plan": 0}[name]

    def _run(self, name: str, problem: binding.Problem, kept: int | None, tensors: list[binding.Matrix]) -> None:
        mark = None
        if kept is not None and name == "forward":
            mark = len(self.calls) + 1
            ctypes.memset(kept, mark, self.kept_bytes)
        elif kept is not None:
            found = set(ctypes.string_at(kept, self.kept_bytes))
            assert len(found) == 1
            mark = found.pop()
        self.calls.append((name, mark))
        row = 2 * problem.heads * problem.qk_dim
        for tensor in tensors[3:] if name == "forward" else tensors[4:]:
            values = torch.full((row * problem.query_rows // 2,), float(name == "backward"), dtype=torch.bfloat16)
            ctypes.memmove(tensor.data, values.data_ptr(), row * problem.query_rows)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    stand_in = Library()
    monkeypatch.setattr(binding, "call", stand_in.call)
    monkeypatch.setattr(cutlass_backend, "_stream", lambda x: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    kernels = torch.library.Library("genrec", "IMPL")
    for op in ("cutlass_plan", "cutlass_attention", "cutlass_attention_backward"):
        kernels.impl(op, getattr(cutlass_backend, op)._init_fn, "CPU")
    yield stand_in
    kernels._destroy()
    torch._dynamo.reset()


def _inputs(**changes: Any) -> dict[str, Any]:
    x = {name: torch.randn(12, 2, 64).bfloat16().requires_grad_() for name in ("q", "k", "v")}
    times = torch.arange(12) * 100
    bias = (torch.randn(15).requires_grad_(), torch.randn(8).requires_grad_(), times)
    return {**x, "offsets": torch.tensor([0, 5, 12]), "bias": bias, **changes}


def _attend(backend: CutlassBackend, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Any) -> Tensor:
    given = None if bias is None else RelativeBias(*bias)
    return backend(q, k, v, offsets, offsets, 7, 7, AttentionMask(), given, 1.0, 1.0, 0.0, None, False)


def test_backward_gets_what_forward_kept(library: Library) -> None:
    inputs = _inputs()
    first, second = (_attend(CutlassBackend(), **inputs) for _ in range(2))
    (first.sum() + second.sum()).backward()
    assert sorted(library.calls) == [("backward", 1), ("backward", 2), ("forward", 1), ("forward", 2)]
    assert inputs["q"].grad.eq(2).all()


def test_backward_twice_reads_it_twice(library: Library) -> None:
    out = _attend(CutlassBackend(), **_inputs())
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert library.calls == [("forward", 1), ("backward", 1), ("backward", 1)]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_memory_is_freed_with_the_graph(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    allocate = cutlass_backend._bytes

    def watched(count: int, like: Tensor) -> Tensor:
        memory = allocate(count, like)
        if count == KEPT_BYTES:
            made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(cutlass_backend, "_bytes", watched)
    with torch.no_grad():
        _attend(CutlassBackend(), **_inputs())
    out = _attend(CutlassBackend(), **_inputs())
    assert [memory() is None for memory in made] == [True, False]
    out.sum().backward()
    assert [memory() is None for memory in made] == [True, True]


def test_its_gradient_is_never_made(library: Library) -> None:
    """Autograd would make up zeros of its size, which is that of all pairs."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = op(*args, **(kwargs or {}))
            assert not any(torch.is_tensor(x) and x.numel() == KEPT_BYTES for x in tree_leaves(made)), op
            return made

    out = _attend(CutlassBackend(), **_inputs())
    with Sizes():
        out.sum().backward()
    assert library.calls == [("forward", 1), ("backward", 1)]


@pytest.mark.parametrize("kept", [True, False])
def test_nothing_to_keep(library: Library, kept: bool) -> None:
    """No bias, or no room for it: the backward pass gets none."""
    library.kept_bytes = KEPT_BYTES if kept else 0
    _attend(CutlassBackend(), **_inputs(bias=None) if kept else _inputs()).sum().backward()
    assert library.calls == [("forward", None), ("backward", None)]


def test_an_empty_batch_keeps_nothing(library: Library) -> None:
    x = {name: torch.zeros(0, 2, 64, dtype=torch.bfloat16, requires_grad=True) for name in ("q", "k", "v")}
    table = torch.zeros(15, requires_grad=True)
    _attend(CutlassBackend(), **x, offsets=torch.zeros(3, dtype=torch.int64), bias=(table, None, None)).sum().backward()
    assert library.calls == []
    assert table.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_second_forward_passes(library: Library, reentrant: bool) -> None:
    inputs = _inputs()
    backend = CutlassBackend()
    out = checkpoint(lambda q: _attend(backend, **{**inputs, "q": q}), inputs["q"], use_reentrant=reentrant)
    out.sum().backward()
    assert library.calls == [("forward", 1), ("forward", 2), ("backward", 2)]
    assert inputs["bias"][0].grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(library: Library, dynamic: bool) -> None:
    backend = CutlassBackend()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def two_layers(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Any) -> Tensor:
        return _attend(backend, _attend(backend, q, k, v, offsets, bias), k, v, offsets, bias)

    inputs = _inputs()
    two_layers(**inputs).sum().backward()
    assert library.calls == [("forward", 1), ("forward", 2), ("backward", 2), ("backward", 1)]
    library.calls.clear()
    with torch.no_grad():
        two_layers(**inputs)
    assert library.calls == [("forward", 1), ("forward", 2)]
    library.calls.clear()
    library.kept_bytes = 0  # the compiled code doesn't know how many
    two_layers(**inputs).sum().backward()
    assert library.calls == [("forward", None)] * 2 + [("backward", None)] * 2


def test_exported(library: Library) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Any) -> Tensor:
            return _attend(CutlassBackend(), q, k, v, offsets, bias)

    inputs = {name: tree_map(lambda x: x.detach(), x) for name, x in _inputs().items()}
    program = torch.export.export(Layer(), (), inputs)
    assert program.module()(**inputs).eq(0).all()
    assert library.calls == [("forward", 1)]
