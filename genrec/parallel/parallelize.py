"""`parallelize`: splits the HSTU layers of a model over the tensor-parallel group, in place.

A model file knows nothing of it. Names of modules and parameters stay as they were, so that a checkpoint's keys do too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genrec.layers.hstu import HeadNorm, HSTULayer, HSTUStack
from genrec.parallel.megatron import (
    check_sizes,
    column_parallel,
    row_parallel,
    shard,
    tensor_parallel_group,
    tensor_parallel_rank,
    tensor_parallel_size,
)
from genrec.parallel.tensor import (
    HeadRandomness,
    SharedBiasTables,
    SharedLayerNorm,
    SplitLayerNorm,
    TokenSplit,
    join_tokens,
    split_tokens,
)


def check_model(module: nn.Module, world_size: int, tensor_parallel_size: int) -> None:
    """Raise unless the model can be split: it needs HSTU layers, and each one's heads must fit the ranks.

    It needs no other process, so that every rank raises and none waits.

    Raises:
        ValueError: It can't; the message says what to change.
    """
    layers = [part for part in module.modules() if isinstance(part, HSTULayer)]
    check_sizes(world_size, tensor_parallel_size, [layer.config.num_heads for layer in layers])
    if tensor_parallel_size > 1 and not layers:
        raise ValueError(
            f"tensor_parallel_size {tensor_parallel_size} splits HSTU layers, and {type(module).__name__} has none, so "
            "that all ranks would compute the same: set tensor_parallel_size=1."
        )


def parallelize(module: nn.Module, *, sequence_parallel: bool = False) -> None:
    """Split every HSTU layer over the tensor-parallel group, in place. A layer that is split already stays so.

    All ranks of the group call it together, with whole weights: those of its first rank count, so that the start is
    that of one process. It replaces parameters, so optimizers are made after it.

    * `uvqk` becomes Megatron's ColumnParallelLinear, `output` its RowParallelLinear, each with this rank's heads.
    * The output norm keeps its entries of these heads, and reduces its statistics over the group unless each head is
      normalised on its own. The input norm and the tables of the relative bias stay whole.
    * Dropout inside a layer, all of it of heads, differs by rank.

    Args:
        module: A model, a stack or a layer, on its device.
        sequence_parallel: Split the tokens between the layers of a stack over the group too.

    Raises:
        ValueError: As `check_model`; or sequence parallelism for a layer that is in no `HSTUStack`.
    """
    size = tensor_parallel_size()
    if size == 1:
        return
    check_model(module, dist.get_world_size(), size)
    splits = _token_splits(module) if sequence_parallel else {}
    for layer in [part for part in module.modules() if isinstance(part, HSTULayer)]:
        if isinstance(layer.uvqk, nn.Linear):
            _split_layer(layer, splits.get(layer))


def _token_splits(module: nn.Module) -> dict[HSTULayer, TokenSplit]:
    """Have each stack that is not split yet split its tokens; how they lie, for each of its layers."""
    found: dict[HSTULayer, TokenSplit] = {}
    for stack in [part for part in module.modules() if isinstance(part, HSTUStack)]:
        layers = [layer for layer in stack.layers if isinstance(layer, HSTULayer) and isinstance(layer.uvqk, nn.Linear)]
        if layers:
            split = TokenSplit(tensor_parallel_group())
            _split_tokens_of(stack, split)
            found |= dict.fromkeys(layers, split)
    for part in module.modules():
        if isinstance(part, HSTULayer) and isinstance(part.uvqk, nn.Linear) and part not in found:
            raise ValueError("sequence_parallel needs every HSTU layer in an HSTUStack: use one, or switch it off.")
    return found


def _split_layer(layer: HSTULayer, split: TokenSplit | None) -> None:
    group = tensor_parallel_group()
    layer.num_heads //= tensor_parallel_size()
    layer.uvqk = column_parallel(layer.uvqk, split)  # type: ignore[assignment]
    layer.output = row_parallel(layer.output, split)  # type: ignore[assignment]
    norm = layer.output_norm
    if isinstance(norm, HeadNorm):
        norm.weight = None if norm.weight is None else shard(norm.weight, 0)
        norm.bias = None if norm.bias is None else shard(norm.bias, 0)
    elif isinstance(norm, nn.LayerNorm):
        weight = None if norm.weight is None else shard(norm.weight, 0)
        bias = None if norm.bias is None else shard(norm.bias, 0)
        layer.output_norm = SplitLayerNorm(weight, bias, norm.eps, group)
    else:
        raise ValueError(
            f"Tensor parallelism knows the output norms LayerNorm and HeadNorm, not {type(norm).__name__}: set "
            "tensor_parallel_size=1."
        )
    if layer.relative_bias is not None:
        layer.relative_bias = SharedBiasTables(layer.relative_bias, group)
    if split is not None:
        layer.input_norm = SharedLayerNorm(layer.input_norm, group)
    random = HeadRandomness(group, layer.config.dropout > 0.0 or layer.config.attention_dropout > 0.0)
    layer.register_forward_pre_hook(random.enter)
    layer.register_forward_hook(random.leave, always_call=True)


def _split_tokens_of(stack: HSTUStack, split: TokenSplit) -> None:
    """Between the layers of a stack each rank holds its tokens; before and behind it all of them."""

    def enter(stack: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
        x, *others = inputs
        split.total = x.shape[0]
        return (split_tokens(x, split), *others)

    def enter_layer(layer: nn.Module, inputs: Sequence[Any]) -> None:
        # Also where a layer's forward pass is run again in the backward pass.
        split.total = inputs[1].x.shape[0]

    def leave(stack: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
        return join_tokens(output, split)

    stack.register_forward_pre_hook(enter)
    stack.register_forward_hook(leave)
    for layer in stack.layers:
        layer.register_forward_pre_hook(enter_layer)


def shard_dims(module: nn.Module) -> dict[str, int]:
    """Names of the parameters that are split over the tensor-parallel group -> the dimension along which they are."""
    return {
        name: parameter.partition_dim  # type: ignore[attr-defined]
        for name, parameter in module.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, for the whole model: split parameters count over the group, others once.

    All ranks of a tensor-parallel group call it together; gradients are already averaged over the data-parallel group.
    The norm is the same on all ranks of the group, bit for bit, so that what they hold whole stays equal.

    Args:
        parameters: Those without a gradient don't count.
        max_norm: Above it, gradients are scaled down to it, in place.
        norm_type: Of the p-norm; may be infinity.

    Returns:
        The norm before clipping, a scalar.
    """
    owned = [p for p in parameters if p.grad is not None]
    if tensor_parallel_size() == 1 or not owned:
        return torch.nn.utils.clip_grad_norm_(owned, max_norm, norm_type)
    counted = [p for p in owned if tensor_parallel_rank() == 0 or getattr(p, "tensor_model_parallel", False)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in counted if p.grad is not None], norm_type)
    norm = norm.to(owned[0].device, torch.promote_types(owned[0].dtype, torch.float32))
    if math.isinf(norm_type):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=tensor_parallel_group())
    else:
        norm = norm.pow(norm_type)
        dist.all_reduce(norm, group=tensor_parallel_group())
        norm = norm.pow(1.0 / norm_type)
    torch.nn.utils.clip_grads_with_norm_(owned, max_norm, norm)
    return norm
