"""How rows start: one function from `InitializerConfig`, used by every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from genrec.embedding.config import InitializerConfig


def build_initializer(config: InitializerConfig, rows: int, dim: int) -> Callable[[Tensor], Tensor]:
    """A function that fills a weight in place and returns it.

    Args:
        config: What the rows are drawn from.
        rows: Rows of the whole table, not of a shard: "xavier_uniform" takes its bounds from it.
        dim: Width of a row.

    Returns:
        `initialize(weight)`, to be called on the whole weight or on any shard of it.
    """
    return partial(_initialize, config=config, rows=rows, dim=dim)


@torch.no_grad()
def _initialize(weight: Tensor, config: InitializerConfig, rows: int, dim: int) -> Tensor:
    if weight.device.type == "meta":
        return weight
    if config.name == "constant":
        return weight.fill_(config.value)
    # Low precision weights are drawn in fp32 and rounded, so that all dtypes start from the same numbers.
    target = weight if weight.dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
    if config.name == "normal":
        target.normal_(config.mean, config.std)
    elif config.name == "truncated_normal":
        reach = 2 * config.std
        torch.nn.init.trunc_normal_(target, config.mean, config.std, config.mean - reach, config.mean + reach)
    elif config.name == "uniform":
        target.uniform_(config.low, config.high)
    else:
        bound = math.sqrt(6.0 / (rows + dim))
        target.uniform_(-bound, bound)
    return weight if target is weight else weight.copy_(target)
