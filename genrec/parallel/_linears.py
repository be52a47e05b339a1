"""Megatron's column- and row-parallel linears, as the layers of genrec call them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.parallel._groups import quiet_import, tensor_parallel_group, tensor_parallel_size
from genrec.parallel.tensor import TokenSplit, gather_tokens, sum_gradient, sum_tokens


def shard(parameter: Tensor, dim: int) -> nn.Parameter:
    """This rank's block of a parameter, of which the group's first rank has the values; with Megatron's attributes.

    Args:
        parameter: Whole, of the same shape on all ranks of the tensor-parallel group.
        dim: Along which it is split evenly.
    """
    group = tensor_parallel_group()
    whole = parameter.detach().contiguous()
    if dist.get_backend(group) == "nccl":
        # NCCL moves nothing between CPUs, where a module may still be.
        whole = whole.cuda()
    dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
    block = whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].to(parameter.device)
    own = nn.Parameter(block.clone(memory_format=torch.contiguous_format), parameter.requires_grad)
    return _mark(own, dim)


def _mark(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    attributes = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1, "allreduce": True}
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def column_parallel(linear: nn.Linear, split: TokenSplit | None = None) -> nn.Module:
    """Megatron's ColumnParallelLinear with this rank's block of the rows of a linear's weight, and of its bias.

    (T, in) -> (T, out of this rank); the gradient of the input is summed over the group.

    Args:
        linear: Whole, of the same shape on all ranks.
        split: With sequence parallelism, how the tokens lie: the input is then (rows, in).
    """
    column, _ = _linear_classes()
    return column(linear, split)  # type: ignore[no-any-return]


def row_parallel(linear: nn.Linear, split: TokenSplit | None = None) -> nn.Module:
    """Megatron's RowParallelLinear with this rank's block of the columns of a linear's weight, and its whole bias.

    (T, in of this rank) -> (T, out), summed over the group, and the bias once.

    Args:
        linear: Whole, of the same shape on all ranks.
        split: With sequence parallelism, how the tokens lie: the output is then (rows, out).
    """
    _, row = _linear_classes()
    return row(linear, split)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _linear_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Megatron's linears as an HSTU layer calls them: a tensor in, a tensor out, no extra state in a checkpoint."""
    with quiet_import():
        from megatron.core import ModelParallelConfig, tensor_parallel

    def settings(linear: nn.Linear, sequence_parallel: bool) -> dict[str, Any]:
        config = ModelParallelConfig(
            tensor_model_parallel_size=tensor_parallel_size(),
            sequence_parallel=sequence_parallel,
            # The weights come from the linear, wherever it is; what Megatron would allocate on a GPU is not needed.
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=linear.weight.dtype,
        )
        return {"config": config, "init_method": _no_init, "skip_bias_add": True, "tp_group": tensor_parallel_group()}

    class ColumnParallel(tensor_parallel.ColumnParallelLinear):
        get_extra_state = nn.Module.get_extra_state

        def __init__(self, linear: nn.Linear, split: TokenSplit | None) -> None:
            super().__init__(
                linear.in_features, linear.out_features,
                bias=linear.bias is not None, **settings(linear, split is not None),
            )  # fmt: skip
            self.weight = shard(linear.weight, 0)
            self.bias = None if linear.bias is None else shard(linear.bias, 0)
            self.split = split

        def forward(self, x: Tensor) -> Tensor:
            if self.split is not None and not x.is_cuda:
                # Megatron gathers the tokens on CUDA alone (and again in the backward pass, to save memory).
                return F.linear(gather_tokens(x, self.split), self.weight, self.bias)
            if _cpu_autocast(x):
                # Megatron's own function knows CUDA's autocast alone.
                x = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
                return F.linear(x, self.weight, self.bias)
            y, bias = super().forward(x)
            y = y if bias is None else y + bias.to(y.dtype)
            return y if self.split is None else y[: self.split.total]

    class RowParallel(tensor_parallel.RowParallelLinear):
        get_extra_state = nn.Module.get_extra_state

        def __init__(self, linear: nn.Linear, split: TokenSplit | None) -> None:
            super().__init__(
                linear.in_features, linear.out_features,
                bias=linear.bias is not None, input_is_parallel=True, **settings(linear, False),
            )  # fmt: skip
            self.weight = shard(linear.weight, 1)
            self.bias = linear.bias
            self.split = split

        def forward(self, x: Tensor) -> Tensor:
            if self.split is not None:
                y, bias = sum_tokens(F.linear(x, self.weight), self.split), self.bias
                bias = None if bias is None else sum_gradient(bias, self.tp_group)
            elif _cpu_autocast(x):
                y = tensor_parallel.reduce_from_tensor_model_parallel_region(
                    F.linear(x, self.weight), group=self.tp_group
                )
                bias = self.bias
            else:
                y, bias = super().forward(x)
            return y if bias is None else y + bias.to(y.dtype)

    return ColumnParallel, RowParallel


def _no_init(weight: Tensor) -> None:
    """Megatron asks for an initialiser that it is told not to call."""


def _cpu_autocast(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
