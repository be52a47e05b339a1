"""The kernels as ops of PyTorch, with fake and autograd implementations for torch.compile and torch.export.

Optional tensors and plain numbers only: `TritonBackend` takes mask and bias apart. `window` is -1 for none. `reuse`
allows the work plan of a former call with the very same offset tensors; a compiled graph may rewrite them unseen.

PyTorch's way through such an op takes longer than everything else that a launch needs from Python
(`benchmarks/launch_cost.py`). Where nobody traces, `attention` does the same by an autograd function of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec._ops import untraced
from genrec.attention.triton.launch import Call, run_forward
from genrec.attention.triton.launch_backward import run_backward


@torch.library.custom_op("genrec::attention_triton", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    scales: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    dense: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    dropout: float,
    seed: int,
    deterministic: bool,
    reuse: bool,
) -> Tensor:
    """(T_q, H, Dv); arguments as in `hstu_attention`."""
    return run_forward(
        Call(q, k, v, q_offsets, kv_offsets, num_contexts, num_targets, scales, position, time, timestamps,
             query_timestamps, dense, max_q_len, max_kv_len, group, window, causal, alpha, scale, dropout, seed,
             deterministic, reuse)
    )  # fmt: skip


@torch.library.custom_op("genrec::attention_triton_backward", mutates_args=())
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    scales: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    dense: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    dropout: float,
    seed: int,
    deterministic: bool,
    reuse: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, position, time, dense; `needed` are the last three's, without elements where not."""
    return run_backward(
        Call(q, k, v, q_offsets, kv_offsets, num_contexts, num_targets, scales, position, time, timestamps,
             query_timestamps, dense, max_q_len, max_kv_len, group, window, causal, alpha, scale, dropout, seed,
             deterministic, reuse),
        d_out,
        needed,
    )  # fmt: skip


def attention(*inputs: Any) -> Tensor:
    """`attention_forward`, by the shortest way."""
    if not untraced(inputs):
        return attention_forward(*inputs)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (inputs[n] for n in _TRAINED)):
        return _Attention.apply(*(inputs[n] for n in _TRAINED), inputs)  # type: ignore[no-any-return]
    return run_forward(Call(*inputs))


class _Attention(torch.autograd.Function):
    """What `attention_forward` registers, without the registry."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The six tensors that may be trained, then all inputs."""
        inputs = arguments[-1]
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.numbers = inputs[_TENSORS:]
        return run_forward(Call(*inputs))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the six tensors that may be trained, and None."""
        needs = ctx.needs_input_grad
        needed = list(needs[3:6])
        if torch.is_grad_enabled():  # a graph of this pass is wanted: the op knows to refuse a second derivative
            found = attention_backward(d_out, *ctx.saved_tensors, *ctx.numbers, needed)
        else:
            found = run_backward(Call(*ctx.saved_tensors, *ctx.numbers), d_out, needed)
        return (*(x if need else None for x, need in zip(found, needs[:6], strict=True)), None)


@attention_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


@attention_backward.register_fake
def _backward_fake(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    position, time, dense, needed = rest[5], rest[6], rest[9], rest[-1]
    tables = [
        x.new_empty(x.shape) if need and x is not None else q.new_empty(0)
        for x, need in zip((position, time, dense), needed, strict=True)
    ]
    return [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *tables]


_TENSORS = 13
_POSITION, _TIME, _DENSE = 8, 9, 12
_TRAINED = (0, 1, 2, _POSITION, _TIME, _DENSE)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[n] for n in (_POSITION, _TIME, _DENSE)]
    found = attention_backward(d_out, *ctx.saved_tensors, *ctx.numbers, needed)
    gradients: list[Tensor | None] = [None] * (_TENSORS + len(ctx.numbers))
    gradients[:3] = [g if need else None for g, need in zip(found[:3], ctx.needs_input_grad[:3], strict=True)]
    for place, gradient, need in zip((_POSITION, _TIME, _DENSE), found[3:], needed, strict=True):
        gradients[place] = gradient if need else None
    return tuple(gradients)


attention_forward.register_autograd(_backward, setup_context=_setup)
