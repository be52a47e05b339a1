"""The `cutlass` backend: CUTLASS kernels for Hopper (csrc/attention), fp16 and bf16, forward and backward.

Not in this build: dropout, dense masks, dims that aren't multiples of 8; `supports` says so. "auto" takes the backend
for bf16 without a bias. The rest serves calls that name it.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from genrec._native import NativeLibraryError
from genrec.attention import _cutlass_binding as binding
from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias, time_bucket_edges

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_BIASES = {"none": 0, "relative": 1, "dense": 2}
_CAPABILITY = (9, 0)


class CutlassBackend:
    """Warp-specialised wgmma kernels; a batch is cut into tiles that persistent blocks take, the longest first."""

    name = "cutlass"

    def __init__(self) -> None:
        self._last: _Batch | None = None

    def available(self) -> str | None:
        """Why it can't run here: no Hopper GPU, or no compiled kernels."""
        try:
            binding.library()
        except NativeLibraryError as error:
            said = str(error).splitlines()[0].replace("was found in none of", "isn't built")
            return f"{said}; `make cuda` builds it (needs nvcc and the nvidia-cutlass wheel)"
        if not torch.cuda.is_available():
            return "needs a Hopper GPU (compute capability 9.0); PyTorch sees no GPU"
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        """Exactly what is built."""
        if spec.device != "cuda" or spec.capability != _CAPABILITY:
            got = spec.device if spec.capability is None else f"{spec.device} of capability {spec.capability}"
            return f"runs on Hopper GPUs (compute capability 9.0) only, not on {got}"
        if spec.dtype not in _DTYPES:
            return f"dtype must be bfloat16 or float16, not {spec.dtype}"
        if spec.dense_mask:
            return "takes an AttentionMask, not a dense mask"
        if spec.dropout > 0.0:
            return "has no attention dropout"
        problem = binding.Problem(dtype=_DTYPES[spec.dtype], heads=spec.num_heads, qk_dim=spec.qk_dim,
                                  v_dim=spec.v_dim, target_group=1, window=-1, causal=1)  # fmt: skip
        if not _is_plain_causal(spec):
            problem.causal = 0
        problem.bias.kind = _BIASES[spec.bias]
        return binding.why_not(problem, spec.needs_grad)

    def not_in_auto(self, spec: AttentionSpec) -> str | None:
        """Where Triton's kernels are faster (docs/performance.md)."""
        return "Triton's kernels are faster with a dense bias; name it to use its own" if spec.bias == "dense" else None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        mask: AttentionMask | Tensor,
        bias: Tensor | RelativeBias | None,
        alpha: float,
        scale: float | Tensor,
        dropout: float,
        seed: int | None,
        deterministic: bool,
    ) -> Tensor:
        """As `AttentionBackend.__call__`.

        Raises:
            ValueError: A dense bias is smaller than the batch may be: the kernels would read beyond it.
        """
        assert isinstance(mask, AttentionMask)
        if isinstance(bias, Tensor):
            needed = (q_offsets.numel() - 1, max_q_len, max_kv_len)
            if any(size < least for size, least in zip((bias.shape[0], *bias.shape[2:]), needed, strict=True)):
                raise ValueError(f"bias {tuple(bias.shape)} is smaller than (sequences, queries, keys) = {needed}.")
        batch = self._batch(q, k, v, q_offsets, kv_offsets, mask)
        scales = scale.float() if isinstance(scale, Tensor) else None
        factor = 1.0 if isinstance(scale, Tensor) else float(scale)
        out, _ = cutlass_attention(q, k, v, batch.plan, *batch.tensors, scales, *_bias_tensors(bias), *batch.words,
                                   float(alpha), factor, deterministic)  # fmt: skip
        return out

    def _batch(
        self, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor, mask: AttentionMask
    ) -> _Batch:
        """The batch's plan: the last one where offsets and counts are the very same tensors, unchanged."""
        given = (q_offsets, kv_offsets, mask.num_contexts, mask.num_targets)
        window = -1 if mask.window is None else min(mask.window, 2**31 - 1)
        words = (mask.target_group_size, window, mask.causal)
        tracing = torch.compiler.is_compiling()
        facts: tuple[Any, ...] = ()
        if not tracing:
            versions = [None if t is None or t.is_inference() else t._version for t in given]
            stream = torch.cuda.current_stream(q.device)
            shapes = (q.shape, k.shape[0], v.shape[2], q.dtype, q.device)
            facts = (*versions, *shapes, stream, words)
            last = self._last
            if last is not None and last.facts == facts and all(a is b for a, b in zip(last.given, given, strict=True)):
                return last
        tensors = tuple(None if t is None else t.int() for t in given)
        batch = _Batch(given, facts, tensors, words, cutlass_plan(q, k, v, *tensors, *words))
        if not tracing:
            self._last = batch
        return batch


@dataclass(frozen=True, eq=False)
class _Batch:
    """What the layers of a model share."""

    given: tuple[Tensor | None, ...]
    facts: tuple[Any, ...]
    tensors: tuple[Tensor | None, ...]
    """Query offsets, key offsets, contexts, targets, as int32."""
    words: tuple[int, int, bool]
    plan: Tensor


def _bias_tensors(bias: Tensor | RelativeBias | None) -> tuple[Tensor | None, ...]:
    """Position table, time table, timestamps, query timestamps, dense bias; what is added in fp32."""
    if not isinstance(bias, RelativeBias):
        return (None, None, None, None, None if bias is None else bias.float())
    position, time = (None if table is None else table.float() for table in (bias.position_weight, bias.time_weight))
    return (position, time, bias.timestamps, bias.query_timestamps, None)


def _is_plain_causal(spec: AttentionSpec) -> bool:
    return spec.causal and not spec.contexts and not spec.targets and spec.window is None


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    contexts: Tensor | None,
    targets: Tensor | None,
    group: int,
    window: int,
    causal: bool,
    *,
    scales: Tensor | None = None,
    bias: binding.Bias | None = None,
    alpha: float = 1.0,
    scale: float = 1.0,
) -> binding.Problem:
    return binding.Problem(
        dtype=_DTYPES[q.dtype], heads=q.shape[1], qk_dim=q.shape[2], v_dim=v.shape[2],
        sequences=q_offsets.numel() - 1, target_group=group, window=window, causal=causal,
        query_rows=q.shape[0], key_rows=k.shape[0],
        query_offsets=q_offsets.data_ptr(), key_offsets=kv_offsets.data_ptr(),
        contexts=_pointer(contexts), targets=_pointer(targets), scales=_pointer(scales), alpha=alpha, scale=scale,
        bias=bias or binding.Bias(),
    )  # fmt: skip


class _Bias:
    """A bias as the kernels read it: contiguous tensors, kept while they are queued, and pointers to them."""

    def __init__(
        self,
        position: Tensor | None,
        time: Tensor | None,
        timestamps: Tensor | None,
        query_timestamps: Tensor | None,
        dense: Tensor | None,
    ) -> None:
        tables = (position, time, timestamps, query_timestamps)
        self.position, self.time, self.times, self.asked = (None if t is None else t.contiguous() for t in tables)
        self.edges = None if time is None else _edges(time.numel(), time.device)
        self.dense = dense if dense is None or dense.stride(3) == 1 else dense.contiguous()
        kind = "dense" if dense is not None else "none" if position is None and time is None else "relative"
        self.words = binding.Bias(
            kind=_BIASES[kind], max_positions=0 if position is None else (position.numel() + 1) // 2,
            buckets=0 if time is None else time.numel(), position=_pointer(self.position), time=_pointer(self.time),
            edges=_pointer(self.edges), key_times=_pointer(self.times), query_times=_pointer(self.asked),
            dense=_pointer(self.dense),
        )  # fmt: skip
        if self.dense is not None:
            self.words.dense_batch_stride, head, self.words.dense_row_stride, _ = self.dense.stride()
            self.words.dense_head_stride = head if self.dense.shape[1] > 1 else 0

    def give_gradients(self, position: Tensor, time: Tensor, dense: Tensor) -> None:
        """Where the backward pass writes; a tensor without elements: not wanted."""
        words = self.words
        words.d_position, words.d_time, words.d_dense = (x.data_ptr() or None for x in (position, time, dense))
        if dense.numel() > 0:
            words.d_dense_batch_stride, head, words.d_dense_row_stride, _ = dense.stride()
            words.d_dense_head_stride = head if dense.shape[1] > 1 else 0


@lru_cache(maxsize=16)
def _edges(buckets: int, device: torch.device) -> Tensor:
    return time_bucket_edges(buckets, device)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where the copy engine couldn't read it: dim not contiguous, or rows not on 16 bytes."""
    good = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    return x if good and x.stride(0) > 0 and x.stride(1) > 0 else x.clone(memory_format=torch.contiguous_format)


def _matrix(x: Tensor) -> binding.Matrix:
    return binding.Matrix(x.data_ptr(), x.stride(0), x.stride(1))


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def _pointer_to_bytes(memory: Tensor) -> int | None:
    return memory.data_ptr() if memory.numel() > 0 else None


@torch.library.custom_op("genrec::cutlass_plan", mutates_args=(), device_types="cuda")
def cutlass_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    contexts: Tensor | None,
    targets: Tensor | None,
    group: int,
    window: int,
    causal: bool,
) -> Tensor:
    """The lists of tiles of a batch, as bytes; of q, k, v only shapes and dtype count. Offsets and counts are int32."""
    problem = _problem(q, k, v, q_offsets, kv_offsets, contexts, targets, group, window, causal)
    plan = _bytes(binding.call("plan_bytes", byref(problem)), q)
    with torch.cuda.device(q.device):
        binding.call("make_plan", byref(problem), plan.data_ptr(), _stream(q))
    return plan


@cutlass_plan.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.custom_op("genrec::cutlass_attention", mutates_args=(), device_types="cuda")
def cutlass_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    contexts: Tensor | None,
    targets: Tensor | None,
    scales: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    dense: Tensor | None,
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass; offsets and counts int32, scales (B,) fp32 in the place of `scale`, biases fp32.

    Returns:
        (T, H, Dv), and the relative bias of all pairs as the kernels had it in memory, bytes for the backward pass:
        without elements where they had none there, or more than GENREC_ATTENTION_KEPT_GIB.
    """
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if out.numel() == 0 or k.shape[0] == 0:
        return out.zero_(), _bytes(0, q)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    bias = _Bias(position, time, timestamps, query_timestamps, dense)
    problem = _problem(q, k, v, q_offsets, kv_offsets, contexts, targets, group, window, causal,
                       scales=scales, bias=bias.words, alpha=alpha, scale=scale)  # fmt: skip
    kept = _bytes(binding.call("kept_bytes", byref(problem)), q)
    workspace = _bytes(binding.call("workspace_bytes", byref(problem), 0, 0, int(kept.numel() > 0)), q)
    with torch.cuda.device(q.device):
        binding.call("forward", byref(problem), plan.data_ptr(), workspace.data_ptr(), _pointer_to_bytes(kept),
                     *[byref(_matrix(x)) for x in (q, k, v, out)], _stream(q))  # fmt: skip
    return out, kept


@cutlass_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    position, time = rest[6], rest[7]
    count = 0 if position is None and time is None else torch.library.get_ctx().new_dynamic_size()
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(count, dtype=torch.uint8)


@torch.library.custom_op("genrec::cutlass_attention_backward", mutates_args=(), device_types="cuda")
def cutlass_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    contexts: Tensor | None,
    targets: Tensor | None,
    scales: Tensor | None,
    position: Tensor | None,
    time: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    dense: Tensor | None,
    kept: Tensor,
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    deterministic: bool,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of q, k and v, contiguous; then of position table, time table and dense bias, fp32, where `needed`
    (three booleans), else without elements. `kept`: what the forward pass of the same arguments returned."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    empty = q.shape[0] == 0 or k.shape[0] == 0
    gradients = [
        torch.zeros(x.shape if want and x is not None else 0, dtype=torch.float32, device=q.device)
        for x, want in zip((position, time, dense), needed, strict=True)
    ]
    if empty:
        return [dq.zero_(), dk.zero_(), dv.zero_(), *gradients]
    shared = dense is not None and needed[2] and dense.shape[1] < q.shape[1]
    if shared and deterministic and dense is not None:  # each head its own, added up in their order
        gradients[2] = gradients[2].new_zeros(dense.shape[0], q.shape[1], *dense.shape[2:])
    q, k, v, d_out = _aligned(q), _aligned(k), _aligned(v), _aligned(d_out)
    bias = _Bias(position, time, timestamps, query_timestamps, dense)
    bias.give_gradients(*gradients)
    problem = _problem(q, k, v, q_offsets, kv_offsets, contexts, targets, group, window, causal,
                       scales=scales, bias=bias.words, alpha=alpha, scale=scale)  # fmt: skip
    ordered = int(deterministic)
    workspace = _bytes(binding.call("workspace_bytes", byref(problem), 1, ordered, int(kept.numel() > 0)), q)
    with torch.cuda.device(q.device):
        binding.call("backward", byref(problem), plan.data_ptr(), workspace.data_ptr(), _pointer_to_bytes(kept),
                     ordered, *[byref(_matrix(x)) for x in (q, k, v, d_out, dq, dk, dv)], _stream(q))  # fmt: skip
    if shared and deterministic:
        gradients[2] = gradients[2].sum(1, keepdim=True)
    return [dq, dk, dv, *gradients]


@cutlass_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    position, time, dense, needed = rest[6], rest[7], rest[10], rest[-1]
    tables = [
        torch.empty(x.shape if want and x is not None else 0, dtype=torch.float32, device=q.device)
        for x, want in zip((position, time, dense), needed, strict=True)
    ]
    return [*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), *tables]


_TENSORS = 14
"""Of the op's arguments: q, k, v, plan, offsets, counts, scales, the bias's five."""


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.words = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)  # zeros in the place of a gradient of the kept bytes would be as large as they


def _differentiate(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * (_TENSORS + len(ctx.words))
    wanted = ctx.needs_input_grad
    needed = [wanted[9], wanted[10], wanted[13]]
    dq, dk, dv, *tables = cutlass_attention_backward(d_out, *ctx.saved_tensors, *ctx.words, needed)
    position, time, dense = (x if want else None for x, want in zip(tables, needed, strict=True))
    return (dq, dk, dv, *[None] * 6, position, time, None, None, dense, *[None] * 6)


cutlass_attention.register_autograd(_differentiate, setup_context=_keep)
