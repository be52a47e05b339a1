"""All that genrec uses of Megatron-Core: process groups, tensor-parallel linears, data parallel on CUDA.

No other module imports it, and this one only where something needs it, from its public names alone. With a
tensor-parallel size of 1 and torch's data parallel it need not be installed: the groups are then the world and each
rank by itself.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from genrec.parallel.tensor import TokenSplit, gather_tokens, sum_gradient, sum_tokens

DENSE = ("torch", "megatron")


@dataclass(frozen=True)
class _Groups:
    tensor: ProcessGroup
    data: ProcessGroup
    megatron: bool


_groups: _Groups | None = None


# Errors that come before any process waits for another ----------------------------------------------------------------


def check_sizes(world_size: int, tensor_parallel_size: int, num_heads: Iterable[int] = ()) -> None:
    """Raise unless the ranks can be split into tensor-parallel groups, and the heads over a group.

    It needs no other process, so that every rank raises and none waits.

    Args:
        world_size: Ranks in all.
        tensor_parallel_size: Ranks that share one copy of the dense layers.
        num_heads: Heads of each layer that is to be split.

    Raises:
        ValueError: They can't; the message says what to change.
    """
    size = tensor_parallel_size
    if size < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {size}: set it to 1 to split no layer.")
    if world_size % size:
        raise ValueError(
            f"tensor_parallel_size {size} doesn't divide the {world_size} processes: start a multiple of {size} "
            f"processes, or set tensor_parallel_size to a divisor of {world_size}."
        )
    for heads in num_heads:
        if heads % size:
            raise ValueError(
                f"tensor_parallel_size {size} doesn't divide num_heads {heads}: choose num_heads as a multiple of "
                f"{size}, or set tensor_parallel_size to a divisor of {heads}."
            )


def require_megatron(reason: str) -> None:
    """Raise unless Megatron-Core is installed, and prepare the environment for it.

    Called before CUDA is first used, it also has the GPU take up kernels in the order of their launch, on which
    Megatron's overlap of communication and computation rests.

    Args:
        reason: What needs it, as the start of a sentence: "tensor_parallel_size 2".

    Raises:
        ImportError: It is not installed; the message says how to get it.
    """
    if util.find_spec("megatron") is None or util.find_spec("megatron.core") is None:
        raise ImportError(
            f"{reason} needs Megatron-Core, which is not installed: run `python -m pip install --no-deps "
            "megatron-core==0.16.1`, or set tensor_parallel_size=1 and dense='torch'."
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@contextmanager
def _quiet() -> Iterator[None]:
    """Importing Megatron-Core warns of each optional package that is not there; none of them is used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Groups ---------------------------------------------------------------------------------------------------------------


def initialize(tensor_parallel_size: int = 1, *, dense: str = "torch") -> None:
    """Make the groups; all ranks together, after `torch.distributed.init_process_group`.

    Tensor-parallel ranks are neighbours: with a size of 2 the groups are (0, 1), (2, 3), ... and the data-parallel
    ones (0, 2, ...) and (1, 3, ...).

    Args:
        tensor_parallel_size: Ranks that share one copy of the dense layers.
        dense: "torch" or "megatron": what reduces dense gradients; the latter needs Megatron's groups at any size.

    Raises:
        RuntimeError: torch.distributed is not up, or the groups are made already.
        ValueError, ImportError: As `check_sizes` and `require_megatron`.
    """
    global _groups
    if not dist.is_initialized():
        raise RuntimeError("Call torch.distributed.init_process_group before the parallel groups are made.")
    if _groups is not None:
        raise RuntimeError("The parallel groups are made already: call destroy() first.")
    if dense not in DENSE:
        raise ValueError(f"dense must be 'torch' or 'megatron', got '{dense}'.")
    check_sizes(dist.get_world_size(), tensor_parallel_size)
    if tensor_parallel_size == 1 and dense == "torch":
        alone, world = dist.new_group([dist.get_rank()], use_local_synchronization=True), dist.group.WORLD
        assert world is not None
        _groups = _Groups(alone, world, megatron=False)
        return
    require_megatron(f"tensor_parallel_size {tensor_parallel_size}" if tensor_parallel_size > 1 else "dense='megatron'")
    with _quiet():
        from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_parallel_size, create_gloo_process_groups=False)
    _groups = _Groups(
        parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group(), megatron=True
    )


def destroy() -> None:
    """Forget the groups. Nothing happens where there are none."""
    global _groups
    if _groups is not None and _groups.megatron:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    _groups = None


def is_initialized() -> bool:
    """Whether the groups are made."""
    return _groups is not None


def _made() -> _Groups:
    if _groups is None:
        raise RuntimeError("The parallel groups are not made yet: call genrec.parallel.megatron.initialize first.")
    return _groups


def tensor_parallel_group() -> ProcessGroup:
    """The ranks that hold the other heads of this rank's layers, this one included."""
    return _made().tensor


def data_parallel_group() -> ProcessGroup:
    """The ranks that hold the same heads as this one and read other batches, this one included."""
    return _made().data


def tensor_parallel_rank() -> int:
    """This rank's place in its tensor-parallel group."""
    return dist.get_rank(tensor_parallel_group())


def tensor_parallel_size() -> int:
    """Ranks of a tensor-parallel group."""
    return dist.get_world_size(tensor_parallel_group())


def data_parallel_rank() -> int:
    """This rank's place in its data-parallel group: which share of a global batch it reads."""
    return dist.get_rank(data_parallel_group())


def data_parallel_size() -> int:
    """Ranks of a data-parallel group: into how many shares a global batch is split."""
    return dist.get_world_size(data_parallel_group())


# Linears --------------------------------------------------------------------------------------------------------------


def shard(parameter: Tensor, dim: int) -> nn.Parameter:
    """This rank's block of a parameter, of which the group's first rank has the values; with Megatron's attributes.

    Args:
        parameter: Whole, of the same shape on all ranks of the tensor-parallel group.
        dim: Along which it is split evenly.
    """
    group = tensor_parallel_group()
    whole = parameter.detach().contiguous()
    dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
    block = whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
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
    with _quiet():
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
            # Megatron gathers the tokens on CUDA only, and again in the backward pass to save memory.
            self_gathering = split is not None and linear.weight.is_cuda
            super().__init__(
                linear.in_features, linear.out_features,
                bias=linear.bias is not None, **settings(linear, self_gathering),
            )  # fmt: skip
            self.weight = shard(linear.weight, 0)
            self.bias = None if linear.bias is None else shard(linear.bias, 0)
            self.split = split

        def forward(self, x: Tensor) -> Tensor:
            if self.split is not None and not self.sequence_parallel:
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


# Data parallel --------------------------------------------------------------------------------------------------------


def wrap_data_parallel(module: nn.Module, ignored: set[str], dense: str = "torch", **options: Any) -> nn.Module:
    """The module with the gradients of its dense parameters averaged over the data-parallel group.

    All parameters and buffers but the ignored are first made equal: replicated ones over the tensor-parallel group,
    all over the data-parallel group. Call the wrapper for the forward pass; the module itself stays as it was.

    Args:
        module: With its tensor-parallel parts in place, on its device.
        ignored: Names of parameters and buffers that are none of its business: those of sharded tables.
        dense: "torch": DistributedDataParallel, any device. "megatron": Megatron's, on CUDA alone.
        options: Of torch's DistributedDataParallel ("torch"), or of Megatron's DistributedDataParallelConfig.

    Returns:
        The wrapper, with `module` as its attribute; the module itself where no dense parameter is trained.

    Raises:
        ValueError: Megatron's on another device than CUDA, or an unknown `dense`.
    """
    if dense not in DENSE:
        raise ValueError(f"dense must be 'torch' or 'megatron', got '{dense}'.")
    trained = [p for name, p in module.named_parameters() if name not in ignored and p.requires_grad]
    _equalize(module, ignored)
    if not trained:
        return module
    if dense == "megatron":
        raise ValueError("dense='megatron' is not there yet: set dense='torch'.")
    # The one way to leave parameters out; TorchRec's own wrapper goes it too.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))
    cuda = trained[0].device if trained[0].is_cuda else None
    settings: dict[str, Any] = {"broadcast_buffers": False, "device_ids": [cuda] if cuda else None, **options}
    return DistributedDataParallel(module, process_group=data_parallel_group(), **settings)


def _equalize(module: nn.Module, ignored: set[str]) -> None:
    """The first rank's values of what every rank of a tensor-parallel group has whole, then of a data-parallel one."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    whole = [t for name, t in named.items() if name not in ignored and not getattr(t, "tensor_model_parallel", False)]
    split = [t for name, t in named.items() if name not in ignored and getattr(t, "tensor_model_parallel", False)]
    for group, tensors in ((tensor_parallel_group(), whole), (data_parallel_group(), whole + split)):
        if dist.get_world_size(group) > 1:
            source = dist.get_global_rank(group, 0)
            for tensor in tensors:
                dist.broadcast(tensor.detach(), source, group=group)
