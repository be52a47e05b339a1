"""`TritonBackend`: what it serves, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias
from genrec.attention.triton import ops
from genrec.attention.triton.launch import INTERPRETED

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_DIM = 256
_CAPABILITY = (8, 0)


class TritonBackend:
    """Triton kernels for NVIDIA GPUs from Ampere on; on CPU tensors only in Triton's interpreter, for tests."""

    name = "triton"

    not_in_auto = "Triton's interpreter is for tests" if INTERPRETED else None

    def available(self) -> str | None:
        """Why nothing can run here, or None."""
        if INTERPRETED:
            return None
        if not torch.cuda.is_available():
            return "no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
        if torch.version.hip is not None:
            return "it is not tested on AMD GPUs"
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        """None for all that the kernels do: everything but dense masks, fp64 and dims above 256."""
        if spec.device == "cpu" and not INTERPRETED:
            return "CPU tensors need TRITON_INTERPRET=1, the slow interpreter for tests"
        if spec.device not in ("cpu", "cuda"):
            return f"device {spec.device} is not cuda"
        if spec.dtype not in _DTYPES:
            return f"dtype {spec.dtype} is none of bfloat16, float16, float32"
        if spec.capability is not None and spec.capability < _CAPABILITY:
            return f"compute capability {spec.capability[0]}.{spec.capability[1]} is below 8.0"
        if max(spec.qk_dim, spec.v_dim) > _LARGEST_DIM:
            return f"qk_dim {spec.qk_dim} or v_dim {spec.v_dim} is above {_LARGEST_DIM}"
        return "it takes no dense mask" if spec.dense_mask else None

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
        """As `AttentionBackend.__call__`. Keys may not be fewer than queries; that is not checked, it would wait."""
        assert isinstance(mask, AttentionMask)
        relative = bias if isinstance(bias, RelativeBias) else None
        timed = relative is not None and relative.time_weight is not None
        return ops.attention(
            q, k, v, q_offsets, kv_offsets,
            mask.num_contexts, mask.num_targets,
            scale if isinstance(scale, Tensor) else None,
            None if relative is None else relative.position_weight,
            None if relative is None else relative.time_weight,
            relative.timestamps if timed and relative is not None else None,
            relative.query_timestamps if timed and relative is not None else None,
            bias if isinstance(bias, Tensor) else None,
            max_q_len, max_kv_len, mask.target_group_size,
            -1 if mask.window is None else mask.window,
            mask.causal, float(alpha),
            1.0 if isinstance(scale, Tensor) else float(scale),
            dropout, seed or 0, deterministic,
            not torch.compiler.is_compiling(),
        )  # fmt: skip
