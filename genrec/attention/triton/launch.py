"""From tensors to launched kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from genrec.attention.spec import time_bucket_edges
from genrec.attention.triton import launch_stored, tuning
from genrec.attention.triton.configs import Config, Shape
from genrec.attention.triton.kernels.forward import forward_kernel
from genrec.attention.triton.prepared import Prepared, prepared_for

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter."""


@dataclass(eq=False)
class Call:
    """A call of the op; fields as in `ops.attention_forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    kv_offsets: Tensor
    num_contexts: Tensor | None
    num_targets: Tensor | None
    scales: Tensor | None
    position: Tensor | None
    time: Tensor | None
    timestamps: Tensor | None
    query_timestamps: Tensor | None
    dense: Tensor | None
    max_q_len: int
    max_kv_len: int
    group: int
    window: int
    causal: bool
    alpha: float
    scale: float
    dropout: float
    seed: int
    deterministic: bool
    reuse: bool
    prepared: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.q, self.k, self.v = (rows_contiguous(x) for x in (self.q, self.k, self.v))
        if self.dense is not None:
            self.dense = rows_contiguous(self.dense)
        self.num_contexts = _contiguous(self.num_contexts)
        self.num_targets = _contiguous(self.num_targets)
        self.scales = _contiguous(self.scales)
        self.prepared = prepared_for(
            (self.q_offsets.contiguous(), self.kv_offsets.contiguous()),
            (_contiguous(self.timestamps), _contiguous(self.query_timestamps)),
            (self.q.shape[0], self.k.shape[0]),
            self.reuse,
        )

    @cached_property
    def empty(self) -> bool:
        """Nothing to compute: no rows, no sequences."""
        return 0 in (self.q.shape[0], self.k.shape[0], self.q.shape[1], self.prepared.batch)

    @cached_property
    def shape(self) -> Shape:
        """What the choice of a configuration depends on."""
        return Shape(
            bits=self.q.element_size() * 8,
            qk_width=_width(self.q.shape[2]),
            v_width=_width(self.v.shape[2]),
            bias=self.position is not None or self.time is not None,
            hopper=self.generation >= 9,
            interpreted=INTERPRETED,
            room_for_bias=self.room[0],
            room_for_scores=self.room[1],
        )

    @cached_property
    def generation(self) -> int:
        """Of the GPU, 9 for Hopper; 0 for none."""
        return torch.cuda.get_device_capability(self.q.device)[0] if self.q.is_cuda else 0

    @cached_property
    def fragments(self) -> bool:
        """Whether tiles of the bias are stored in the order of the registers of Hopper's matrix products."""
        return self.q.element_size() == 2 and not INTERPRETED

    @cached_property
    def room(self) -> tuple[bool, bool]:
        """Whether the bias, and the gradients of the scores, may be stored."""
        return launch_stored.room(self)

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The bias's pointers, tables in fp32."""
        edges = None if self.time is None else _edges(self.time.numel(), self.q.device)
        return {
            "position": None if self.position is None else self.position.float().contiguous(),
            "time_table": None if self.time is None else self.time.float().contiguous(),
            "edges": None if edges is None else edges[0],
            "near_edges": None if edges is None else edges[1],
            "dense": self.dense,
        }

    def common(self, config: Config, of_keys: bool) -> dict[str, Any]:
        """Arguments that all kernels share."""
        items, count = self.prepared.items(of_keys, config.keys if of_keys else config.rows)
        kv_times, q_times = self.prepared.times
        spans: tuple[Tensor | None, ...] = (None,) * 4
        if self.time is not None:
            spans = (
                *self.prepared.extrema(False, config.rows, self.max_q_len),
                *self.prepared.extrema(True, config.keys, self.max_kv_len),
            )
        dense_strides = (0, 0, 0)
        if self.dense is not None:
            batch, head, row, _ = self.dense.stride()
            dense_strides = batch, head if self.dense.shape[1] > 1 else 0, row
        return self.tables | {
            "q": self.q, "k": self.k, "v": self.v,
            "q_offsets": self.prepared.offsets[0], "kv_offsets": self.prepared.offsets[1],
            "items": items, "count": count,
            "num_contexts": self.num_contexts, "num_targets": self.num_targets, "scales": self.scales,
            "kv_times": kv_times, "q_times": q_times,
            **dict(zip(("row_low", "row_high", "key_low", "key_high"), spans, strict=True)),
            **dict(zip(("dense_batch", "dense_head", "dense_row"), dense_strides, strict=True)),
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v),
            "heads": self.q.shape[1],
            "max_positions": 0 if self.position is None else (self.position.numel() + 1) // 2,
            "alpha": self.alpha, "scale": self.scale, "dropout": self.dropout, "seed": self.seed,
            "QK_DIM": self.q.shape[2], "V_DIM": self.v.shape[2],
            "QK_WIDTH": self.shape.qk_width, "V_WIDTH": self.shape.v_width,
            "GROUP": self.group, "WINDOW": self.window, "CAUSAL": self.causal,
            "HAS_DROPOUT": self.dropout > 0.0, "BUCKETS": 0 if self.time is None else self.time.numel(),
            "FAST": self.shape.bits == 16 and not INTERPRETED,
            # Three products of tf32 make one of fp32, on the tensor cores and with room for the accumulators.
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            "ROWS": config.rows, "KEYS": config.keys, "STAGES": config.stages,
            "num_warps": config.warps, "num_stages": config.stages,
        }  # fmt: skip

    def pieces(self, config: Config, of_keys: bool) -> int:
        """Pieces of work, or some more: blocks of all sequences and heads."""
        return self.prepared.bound(of_keys, config.keys if of_keys else config.rows) * self.q.shape[1]


def run_forward(call: Call) -> Tensor:
    """(T_q, H, Dv)."""
    out = torch.empty(*call.q.shape[:2], call.v.shape[2], dtype=call.v.dtype, device=call.v.device)
    if call.empty:
        return out.zero_()
    tuning.run("forward", call, lambda config: launch_forward(call, out, config))
    return out


def launch_forward(call: Call, out: Tensor, config: Config, tiles: launch_stored.BiasTiles | None = None) -> None:
    """Fills out (T_q, H, Dv); `tiles` are the bias's for these blocks, where they are there already."""
    if tiles is None and config.stored and call.room[0] and launch_stored.loads(call, config, of_keys=False):
        tiles = launch_stored.fill_bias(call, config, of_keys=False)
    bias = launch_stored.NO_TILES if tiles is None else tiles.arguments()
    arguments = call.common(config, of_keys=False) | strides("out", out) | bias | {
        "out": out,
        "k_descriptor": descriptor(call.k, config.keys, config),
        "v_descriptor": descriptor(call.v, config.keys, config),
        "V_WIDTH": _width_beside(call.v, call.shape),
        "BIAS_AHEAD": launch_stored.BIAS_AHEAD,
    }  # fmt: skip
    start(forward_kernel, call, config, call.pieces(config, of_keys=False), arguments)


def start(kernel: Any, call: Call, config: Config, programs: int, arguments: dict[str, Any]) -> None:
    """Launches so many programs."""
    if call.q.is_cuda:
        # The guard costs more than the question.
        if call.q.device.index == torch.cuda.current_device():
            kernel[(programs,)](**arguments)
        else:
            with torch.cuda.device(call.q.device):
                kernel[(programs,)](**arguments)
    elif not INTERPRETED:
        kernel[(programs,)](**arguments)
    else:
        arguments = {name: x for name, x in arguments.items() if name not in ("num_warps", "num_stages", "maxnreg")}
        kernel[(programs,)](**arguments)


def descriptor(x: Tensor, rows: int, config: Config) -> Any:
    """A TMA descriptor of (rows, D) blocks of x (T, H, D) seen as rows of all heads; None where TMA can't read it."""
    row, head, _ = x.stride()
    dim = x.shape[2]
    if not config.tma or not _aligned(x) or dim != _width(dim) or x.shape[0] == 0:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [x.shape[0], (x.shape[1] - 1) * head + dim], [row, 1], [rows, dim])


def _width_beside(v: Tensor, shape: Shape) -> int:
    """Columns of the forward kernel's tile of v.

    Triton 3.6 computes wrong outputs, or reads what isn't there, from 16-bit tiles of v that have fewer than 64
    columns, and fewer than q's, where it can't tell that 16 bytes may be read at a time (Dqk = 50 with Dv = 25, say).
    With 64 columns or as many as q's they are right.
    """
    row, head, _ = v.stride()
    wide = v.shape[2] == shape.v_width and v.data_ptr() % 16 == 0 and row % 16 == 0 and head % 16 == 0
    return shape.v_width if wide or shape.bits != 16 else max(shape.v_width, min(shape.qk_width, 64))


def _aligned(x: Tensor) -> bool:
    """Whether each head's row begins at a multiple of 16 bytes."""
    row, head, _ = x.stride()
    return x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0 and head * x.element_size() % 16 == 0


def _width(dim: int) -> int:
    """The least power of two that a product of matrices takes."""
    return max(16, 1 << (dim - 1).bit_length())


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Arguments of the kernels."""
    return {f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}


@lru_cache(maxsize=16)
def _edges(buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(buckets + 3,) first distance of each bucket, then the largest number; in int64, and clamped to int32."""
    largest = torch.iinfo(torch.int64).max
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), time_bucket_edges(buckets),
                       torch.full((3,), largest, dtype=torch.int64)])  # fmt: skip
    return edges.to(device), edges.clamp(max=torch.iinfo(torch.int32).max).int().to(device)
