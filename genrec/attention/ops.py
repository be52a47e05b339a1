"""`hstu_attention`: the one attention op of genrec, whatever backend runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from genrec.attention.registry import registry
from genrec.attention.spec import AttentionMask, AttentionSpec, BiasKind, RelativeBias


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seqlen: int,
    *,
    mask: AttentionMask | Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    alpha: float = 1.0,
    scale: float | Tensor = 1.0,
    kv_offsets: Tensor | None = None,
    max_kv_len: int | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pointwise attention of HSTU (arXiv 2402.17152, eq. 3), jagged: no padding and no softmax.

    out_i = sum_j dropout(silu(alpha * <q_i, k_j> + bias_ij) * scale * [mask_ij]) * v_j

    Shapes: T rows of B sequences, H heads, N = max_seqlen.

    Args:
        q: (T, H, Dqk) queries.
        k: (T_kv, H, Dqk) keys; T_kv = T without `kv_offsets`.
        v: (T_kv, H, Dv) values.
        seq_offsets: (B + 1,) int32 or int64; rows [seq_offsets[b], seq_offsets[b + 1]) are sequence b.
        max_seqlen: An upper bound of the sequences' lengths. It affects memory and speed, never the result.
        mask: What each row sees; None for causal. The torch backend also takes a boolean (B, 1 or H, N, N_kv).
        bias: None, a dense (B, 1 or H, N, N_kv) tensor, or a `RelativeBias` computed inside the kernel.
        alpha: Factor of the scores: 1 in the paper, 1 / sqrt(Dqk) in the production form.
        scale: Factor of the weights: usually 1 / N for a constant N of the model's config, or (B,) of q's device.
            Never the padded length of a batch: results must not depend on what else is in it.
        kv_offsets: (B + 1,) where keys outnumber queries (new tokens against a cache); query row i of a sequence then
            stands at key row i + (kv length - q length).
        max_kv_len: Upper bound of the key lengths; needed with `kv_offsets`.
        dropout: Probability with which a weight is dropped; the others are scaled by 1 / (1 - dropout).
        seed: Seed of the dropout; None draws one from torch's default generator.
        deterministic: Same bits in every run, forward and backward. None follows
            torch.are_deterministic_algorithms_enabled().
        backend: "auto", "torch", "triton", "cutlass" or a registered name. A named backend that can't serve the call
            raises; only "auto" chooses.

    Returns:
        (T, H, Dv) of v's dtype.

    Raises:
        UnsupportedAttentionError: The backend can't serve the call; the message says why and which can.
        ValueError, TypeError: Shapes, dtypes or devices that don't fit together.
    """
    if mask is None:
        mask = AttentionMask()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if kv_offsets is not None and max_kv_len is None:
        raise ValueError("kv_offsets needs max_kv_len, an upper bound of the key lengths.")
    _check(q, k, v, seq_offsets, kv_offsets, mask, bias, scale, max_kv_len or max_seqlen, dropout)
    spec = attention_spec(q, v, mask=mask, bias=bias, scale=scale, cached_keys=kv_offsets is not None,
                          dropout=dropout, deterministic=deterministic)  # fmt: skip
    if dropout > 0.0 and seed is None:
        seed = int(torch.randint(2**31 - 1, ()).item())
    return registry.resolve(backend, spec)(
        q, k, v,
        seq_offsets,
        seq_offsets if kv_offsets is None else kv_offsets,
        max_seqlen,
        max_seqlen if max_kv_len is None else max_kv_len,
        mask, bias, alpha, scale, dropout, seed, deterministic,
    )  # fmt: skip


def attention_spec(
    q: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask | Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | Tensor = 1.0,
    cached_keys: bool = False,
    dropout: float = 0.0,
    deterministic: bool = False,
) -> AttentionSpec:
    """The `AttentionSpec` of such a call: what the backends are asked about."""
    structured = mask if isinstance(mask, AttentionMask) else AttentionMask()
    tables = [bias.position_weight, bias.time_weight] if isinstance(bias, RelativeBias) else [bias]
    trained = [q, v, *(table for table in tables if table is not None)]
    kind: BiasKind = "none" if bias is None else "relative" if isinstance(bias, RelativeBias) else "dense"
    return AttentionSpec(
        device=q.device.type,
        dtype=q.dtype,
        num_heads=q.shape[1],
        qk_dim=q.shape[2],
        v_dim=v.shape[2],
        bias=kind,
        contexts=structured.num_contexts is not None,
        targets=structured.num_targets is not None,
        target_group_size=structured.target_group_size,
        window=structured.window,
        causal=structured.causal,
        dense_mask=isinstance(mask, Tensor),
        cached_keys=cached_keys,
        tensor_scale=isinstance(scale, Tensor),
        dropout=dropout,
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained),
        deterministic=deterministic,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor | None,
    mask: AttentionMask | Tensor,
    bias: Tensor | RelativeBias | None,
    scale: float | Tensor,
    max_kv_len: int,
    dropout: float,
) -> None:
    """Shapes, dtypes and devices only: nothing here reads a tensor's values, so nothing waits for a GPU."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q, k, v must be (rows, heads, dim), got {_shapes(q, k, v)}.")
    if q.shape[1:] != k.shape[1:] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"q and k must agree in heads and dim, k and v in rows and heads; got {_shapes(q, k, v)}.")
    if kv_offsets is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows and k {k.shape[0]}: pass kv_offsets for keys of their own.")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    counts = {} if isinstance(mask, Tensor) else {"num_contexts": mask.num_contexts, "num_targets": mask.num_targets}
    per_sequence = {**counts, "scale": scale if isinstance(scale, Tensor) else None}
    batch = q_offsets.numel() - 1
    for name, offsets in {"seq_offsets": q_offsets, "kv_offsets": kv_offsets}.items():
        if offsets is not None and (offsets.dim() != 1 or offsets.numel() != batch + 1):
            raise ValueError(f"{name} must have shape ({batch + 1},), got {tuple(offsets.shape)}.")
        if offsets is not None and offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {offsets.dtype}.")
    for name, tensor in per_sequence.items():
        if tensor is not None and tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} must have shape ({batch},), got {tuple(tensor.shape)}.")
    tensors = {"k": k, "v": v, "seq_offsets": q_offsets, "kv_offsets": kv_offsets, **per_sequence}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move it there.")
    if isinstance(mask, Tensor) and (mask.dtype != torch.bool or mask.dim() != 4):
        raise ValueError("A dense mask must be boolean and (B, 1 or H, N, N_kv).")
    if isinstance(bias, Tensor) and (bias.dim() != 4 or bias.shape[1] not in (1, q.shape[1])):
        raise ValueError(f"A dense bias must be (B, 1 or {q.shape[1]}, N, N_kv), got {tuple(bias.shape)}.")
    if isinstance(bias, RelativeBias):
        if bias.max_positions is not None and bias.max_positions < max_kv_len:
            raise ValueError(
                f"position_weight covers {bias.max_positions} rows, the batch may have {max_kv_len}: build it with "
                "at least that many."
            )
        if bias.timestamps is not None and bias.timestamps.shape != k.shape[:1]:
            raise ValueError(f"timestamps must have shape ({k.shape[0]},), got {tuple(bias.timestamps.shape)}.")
        if bias.query_timestamps is not None and bias.query_timestamps.shape != q.shape[:1]:
            raise ValueError(f"query_timestamps must have shape ({q.shape[0]},).")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
