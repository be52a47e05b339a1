"""HSTU attention as plainly as it can be written: one sequence at a time, the mask entry by entry from its words.

Nothing here calls genrec: this is what the backends are measured against, in fp64, with gradients by autograd. Run on
low-precision tensors it rounds after every step, which gives the yardstick of the parity bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskWords:
    """The mask of one sequence of `kv_len` keys: contexts | history | targets."""

    kv_len: int
    num_contexts: int = 0
    num_targets: int = 0
    group_size: int = 1
    window: int | None = None
    causal: bool = True

    def region(self, p: int) -> str:
        if p < self.num_contexts:
            return "context"
        return "target" if p >= self.kv_len - self.num_targets else "history"

    def sees(self, i: int, j: int) -> bool:
        """Whether the row that stands at key row i sees key row j."""
        row, column = self.region(i), self.region(j)
        if row == "context":
            return column in ("context", "history")
        if row == "history":
            if column == "history":
                near = self.window is None or abs(i - j) <= self.window
                return near and (j <= i or not self.causal)
            return column == "context"
        if column == "target":
            first = self.kv_len - self.num_targets
            return j <= i and (i - first) // self.group_size == (j - first) // self.group_size
        return True


@cache
def bucket(distance: int, num_buckets: int) -> int:
    """trunc(ln(max(|d|, 1)) / 0.301), clamped to the table; near an edge with 60 digits."""
    magnitude = max(abs(distance), 1)
    quotient = math.log(magnitude) / 0.301
    if abs(quotient - round(quotient)) < 1e-6:
        with localcontext() as context:
            context.prec = 60
            quotient = Decimal(magnitude).ln() / Decimal("0.301")
    return min(int(quotient), num_buckets - 1)


def next_row_times(times: list[int]) -> list[int]:
    """t' of each key row where nothing else is said: the next row's time, the last row's own."""
    return [times[min(i + 1, len(times) - 1)] for i in range(len(times))]


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: list[int],
    kv_lengths: list[int],
    *,
    num_contexts: list[int] | None = None,
    num_targets: list[int] | None = None,
    target_group_size: int = 1,
    window: int | None = None,
    causal: bool = True,
    dense_mask: Tensor | None = None,
    dense_bias: Tensor | None = None,
    position_weight: Tensor | None = None,
    time_weight: Tensor | None = None,
    timestamps: Tensor | None = None,
    query_timestamps: Tensor | None = None,
    alpha: float = 1.0,
    scale: list[float] | float = 1.0,
) -> Tensor:
    """out_i = sum_j silu(alpha <q_i, k_j> + bias_ij) * scale * [mask_ij] * v_j, sequence by sequence, in q's dtype."""
    outputs = []
    q_start = kv_start = 0
    for b, (n_q, n_kv) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        words = MaskWords(n_kv, num_contexts[b] if num_contexts else 0, num_targets[b] if num_targets else 0,
                          target_group_size, window, causal)  # fmt: skip
        shift = n_kv - n_q
        qs, ks, vs = q[q_start : q_start + n_q], k[kv_start : kv_start + n_kv], v[kv_start : kv_start + n_kv]
        scores = alpha * torch.einsum("ihd,jhd->hij", qs, ks)
        if dense_bias is not None:
            scores = scores + dense_bias[b, :, :n_q, :n_kv].to(q.dtype)
        if position_weight is not None:
            middle = (position_weight.numel() - 1) // 2
            index = [[j - (i + shift) + middle for j in range(n_kv)] for i in range(n_q)]
            scores = scores + position_weight[_matrix(index, n_q, n_kv)].to(q.dtype)
        if time_weight is not None:
            assert timestamps is not None
            key_times = timestamps[kv_start : kv_start + n_kv].tolist()
            if query_timestamps is None:
                row_times = next_row_times(key_times)[shift:]
            else:
                row_times = query_timestamps[q_start : q_start + n_q].tolist()
            index = [[bucket(row - key, time_weight.numel()) for key in key_times] for row in row_times]
            scores = scores + time_weight[_matrix(index, n_q, n_kv)].to(q.dtype)
        if dense_mask is not None:
            visible = dense_mask[b, :, :n_q, :n_kv]
        else:
            rows = [[words.sees(i + shift, j) for j in range(n_kv)] for i in range(n_q)]
            visible = torch.tensor(rows, dtype=torch.bool).reshape(n_q, n_kv)
        factor = scale[b] if isinstance(scale, list) else scale
        weights = scores * torch.sigmoid(scores) * factor * visible.to(q.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, vs))
        q_start, kv_start = q_start + n_q, kv_start + n_kv
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])


def _matrix(index: list[list[int]], rows: int, columns: int) -> Tensor:
    return torch.tensor(index, dtype=torch.int64).reshape(rows, columns)
