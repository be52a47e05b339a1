"""Process groups, and the errors that come before any process waits for another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util

import torch.distributed as dist
from torch.distributed import ProcessGroup

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
def quiet_import() -> Iterator[None]:
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
    with quiet_import():
        from megatron.core import parallel_state

    # Gloo groups beside NCCL's are for the states of Megatron's distributed optimizer, which travel through the CPU.
    parallel_state.initialize_model_parallel(tensor_parallel_size, create_gloo_process_groups=dense == "megatron")
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
