"""The `cutlass` backend: CUTLASS kernels for Hopper (csrc/attention), fp16 and bf16, forward and backward.

Not in this build: any bias, dropout, dense masks, dims that aren't multiples of 8; `supports` says so. "auto" takes the
backend for what has been run on a GPU: bf16, dims above 32. The rest serves calls that name it.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genrec._native import NativeLibraryError
from genrec.attention import _cutlass_binding as binding
from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias

_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
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
        if spec.bias != "none":
            return f"has no kernels with a {spec.bias} bias yet"
        if spec.dense_mask:
            return "takes an AttentionMask, not a dense mask"
        if spec.dropout > 0.0:
            return "has no attention dropout"
        problem = binding.Problem(dtype=_DTYPES[spec.dtype], heads=spec.num_heads, qk_dim=spec.qk_dim,
                                  v_dim=spec.v_dim, target_group=1, window=-1, causal=1)  # fmt: skip
        if not _is_plain_causal(spec):
            problem.causal = 0
        return binding.why_not(problem, spec.needs_grad)

    def not_in_auto(self, spec: AttentionSpec) -> str | None:
        """Kernels that no GPU has run yet."""
        if spec.dtype != torch.bfloat16:
            return f"its kernels for {spec.dtype} have not been run on a GPU yet; name it to use them"
        if max(spec.qk_dim, spec.v_dim) <= 32:
            return "its kernels for dims up to 32 have not been run on a GPU yet; name it to use them"
        return None

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
        """As `AttentionBackend.__call__`."""
        assert isinstance(mask, AttentionMask)
        batch = self._batch(q, k, v, q_offsets, kv_offsets, mask)
        scales = scale.float() if isinstance(scale, Tensor) else None
        factor = 1.0 if isinstance(scale, Tensor) else float(scale)
        return cutlass_attention(q, k, v, batch.plan, *batch.tensors, scales, *batch.words, float(alpha), factor,
                                 deterministic)  # fmt: skip

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
            facts = (*versions, q.shape, k.shape[0], v.shape[2], q.dtype, q.device, stream, words)
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
    alpha: float = 1.0,
    scale: float = 1.0,
) -> binding.Problem:
    return binding.Problem(
        dtype=_DTYPES[q.dtype], heads=q.shape[1], qk_dim=q.shape[2], v_dim=v.shape[2],
        sequences=q_offsets.numel() - 1, target_group=group, window=window, causal=causal,
        query_rows=q.shape[0], key_rows=k.shape[0],
        query_offsets=q_offsets.data_ptr(), key_offsets=kv_offsets.data_ptr(),
        contexts=_pointer(contexts), targets=_pointer(targets), scales=_pointer(scales), alpha=alpha, scale=scale,
    )  # fmt: skip


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
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    deterministic: bool,
) -> Tensor:
    """(T, H, Dv): the forward pass; offsets and counts int32, scales (B,) fp32 in the place of `scale`."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if out.numel() == 0 or k.shape[0] == 0:
        return out.zero_()
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    problem = _problem(q, k, v, q_offsets, kv_offsets, contexts, targets, group, window, causal,
                       scales=scales, alpha=alpha, scale=scale)  # fmt: skip
    workspace = _bytes(binding.call("workspace_bytes", byref(problem), 0, 0), q)
    with torch.cuda.device(q.device):
        binding.call("forward", byref(problem), plan.data_ptr(), workspace.data_ptr(), byref(_matrix(q)),
                     byref(_matrix(k)), byref(_matrix(v)), byref(_matrix(out)), _stream(q))  # fmt: skip
    return out


@cutlass_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


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
    group: int,
    window: int,
    causal: bool,
    alpha: float,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.shape[0] == 0 or k.shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, d_out = _aligned(q), _aligned(k), _aligned(v), _aligned(d_out)
    problem = _problem(q, k, v, q_offsets, kv_offsets, contexts, targets, group, window, causal,
                       scales=scales, alpha=alpha, scale=scale)  # fmt: skip
    ordered = int(deterministic)
    workspace = _bytes(binding.call("workspace_bytes", byref(problem), 1, ordered), q)
    with torch.cuda.device(q.device):
        binding.call("backward", byref(problem), plan.data_ptr(), workspace.data_ptr(), ordered,
                     *[byref(_matrix(x)) for x in (q, k, v, d_out, dq, dk, dv)], _stream(q))  # fmt: skip
    return dq, dk, dv


@cutlass_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.words = inputs[9:]


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients = cutlass_attention_backward(d_out, *ctx.saved_tensors, *ctx.words)
    return (*gradients, *[None] * 12)


cutlass_attention.register_autograd(_differentiate, setup_context=_keep)
