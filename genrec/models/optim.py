"""Optimizers and schedules: one optimizer for Lightning, made of one for the dense part and one for each table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genrec.embedding.config import TableOptimizerConfig

ScheduleName = Literal["constant", "linear", "cosine", "inverse_sqrt"]


@dataclass(frozen=True)
class DenseOptimizerConfig:
    """AdamW for everything that is not a table.

    Args:
        learning_rate: Base rate; the schedule multiplies it.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled; applied to matrices only, never to biases, norms or other vectors.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rates (of the dense part and of all tables) move.

    Args:
        name: "constant", "linear" (down to `final_factor`), "cosine" (the same along a half cosine) or "inverse_sqrt"
            (1 / sqrt(step / warmup_steps)).
        warmup_steps: Steps over which the rates first rise linearly from near zero.
        total_steps: Steps at whose end "linear" and "cosine" reach `final_factor`; None: the trainer's estimate.
        final_factor: Lowest factor of "linear" and "cosine".
    """

    name: ScheduleName = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("constant", "linear", "cosine", "inverse_sqrt"):
            raise ValueError(f"schedule must be constant, linear, cosine or inverse_sqrt, got '{self.name}'.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}.")


class CombinedOptimizer(Optimizer):
    """Several optimizers that act as one: one step, one state, all parameter groups in one list.

    Schedulers, gradient clipping and checkpoints see an ordinary optimizer.

    Args:
        optimizers: By name, over disjoint parameters.
        fused: Optimizers that run inside the backward pass of their tables. They get their learning rates from here, as
            groups without parameters; their state stays with their tables.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], fused: Sequence[Optimizer] = ()) -> None:
        self.optimizers = dict(optimizers)
        self.fused = list(fused)
        self._fused_weights = [_weights_by_group(optimizer) for optimizer in fused]
        groups: list[dict[str, Any]] = []
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["name"] = name
                groups.append(group)
        for index, optimizer in enumerate(self.fused):
            for part, group in enumerate(optimizer.param_groups):
                groups.append({"params": [], "lr": group["lr"], "name": _fused_name(index, part)})
        super().__init__(groups, {})
        for optimizer in self.optimizers.values():
            self.state.update(optimizer.state)
        self._link()

    def _link(self) -> None:
        """Make the parts read this optimizer's groups and state: they hold the same objects."""
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups = [group for group in self.param_groups if group["name"] == name]
            optimizer.state = self.state
        groups = {group["name"]: group for group in self.param_groups}
        for index, optimizer in enumerate(self.fused):
            # Dynamic tables read the rate when their rows are updated: with shared groups they see a schedule at once.
            if getattr(optimizer, "reads_rates_in_backward", False):
                optimizer.param_groups = [
                    groups[_fused_name(index, part)] for part in range(len(optimizer.param_groups))
                ]

    def driven_parameters(self) -> list[list[Tensor]]:
        """Parameters of each group; of the groups of fused optimizers the tables' weights, which they don't hold."""
        weights = {
            _fused_name(index, part): tensors
            for index, parts in enumerate(self._fused_weights)
            for part, tensors in enumerate(parts)
        }
        return [weights.get(group["name"], group["params"]) for group in self.param_groups]

    def replace(self, name: str, optimizer: Optimizer) -> None:
        """Have another optimizer do the part `name`, over the same group dicts."""
        self.optimizers[name] = optimizer
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each; `closure` is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.set_fused_rates()
        return loss

    def set_fused_rates(self) -> None:
        """Give fused optimizers their rates. `step` does it; before a backward pass, a schedule's change is in time."""
        rates = {group["name"]: group["lr"] for group in self.param_groups}
        for index, optimizer in enumerate(self.fused):
            for part, group in enumerate(optimizer.param_groups):
                group["lr"] = rates[_fused_name(index, part)]
            # A fused optimizer's step hands its rates on and does nothing else.
            optimizer.step()


def _weights_by_group(optimizer: Optimizer) -> list[list[Tensor]]:
    groups = [list(group["params"]) for group in optimizer.param_groups]
    weights = list(getattr(optimizer, "params", {}).values())
    # Dynamic tables have a group each, which an earlier CombinedOptimizer may have replaced by its own, empty ones.
    return [[weight] for weight in weights] if not any(groups) and len(weights) == len(groups) else groups


def _fused_name(index: int, part: int) -> str:
    return f"fused.{index}.{part}"


class RowWiseAdagrad(Optimizer):
    """Adagrad with one accumulator a row, the mean of the squared gradient over it (FBGEMM's EXACT_ROWWISE_ADAGRAD).

    Args:
        params: Matrices.
        lr: Learning rate.
        eps: Added to the denominator.
        weight_decay: Added to the gradient times the weight.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                grad = weight.grad.float()
                if group["weight_decay"]:
                    grad = grad.add(weight.float(), alpha=group["weight_decay"])
                state = self.state[weight]
                if not state:
                    state["sum"] = torch.zeros(weight.shape[0], device=weight.device)
                state["sum"] += grad.square().mean(dim=1)
                rate = group["lr"] / (state["sum"].sqrt() + group["eps"])
                weight.sub_((grad * rate.unsqueeze(1)).to(weight.dtype))
        return loss


def dense_optimizer(parameters: Sequence[nn.Parameter], config: DenseOptimizerConfig) -> Optimizer:
    """AdamW, weight decay on matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.weight_decay == 0.0:
        groups = [{"params": list(parameters), "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=_can_fuse(parameters),
    )  # fmt: skip


def table_optimizer(weight: nn.Parameter, config: TableOptimizerConfig) -> Optimizer:
    """The optimizer of one unsharded table. A row without a gradient still sees Adam's moments decay, as in torch."""
    if config.max_gradient is not None:
        limit = config.max_gradient
        weight.register_hook(lambda grad: grad.clamp(-limit, limit))
    rate, decay, fuse = config.learning_rate, config.weight_decay, _can_fuse([weight])
    if config.name == "sgd":
        return torch.optim.SGD([weight], lr=rate, weight_decay=decay)
    if config.name == "adam":
        return torch.optim.Adam([weight], lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay, fused=fuse)
    if config.name == "adamw":
        return torch.optim.AdamW([weight], lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay, fused=fuse)
    if config.name == "adagrad":
        return torch.optim.Adagrad([weight], lr=rate, eps=config.eps, weight_decay=decay)
    if config.name == "rowwise_adagrad":
        return RowWiseAdagrad([weight], lr=rate, eps=config.eps, weight_decay=decay)
    raise ValueError(f"Unknown table optimizer '{config.name}'. Known: sgd, adam, adamw, adagrad, rowwise_adagrad.")


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether torch has its one-kernel Adam for these."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def schedule_factor(step: int, config: ScheduleConfig, total_steps: int | None = None) -> float:
    """Factor of the base learning rates in step `step`, counted from 0.

    Raises:
        ValueError: "linear" or "cosine" without a number of steps.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / max(step, warmup, 1))
    total = config.total_steps or total_steps
    if not total:
        raise ValueError(f"Schedule '{config.name}' needs total_steps, since the trainer has no bound of steps.")
    progress = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
    shape = 1 - progress if config.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_factor + (1 - config.final_factor) * shape


def build_scheduler(optimizer: Optimizer, config: ScheduleConfig, total_steps: int | None = None) -> LambdaLR:
    """A scheduler that is to be stepped after each step of the optimizer."""
    schedule_factor(config.warmup_steps, config, total_steps)
    return Schedule(optimizer, lambda step: schedule_factor(step, config, total_steps))


class Schedule(LambdaLR):
    """LambdaLR whose saved state fits an optimizer with other parameter groups: the base rates are the groups' own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step. The optimizer's state must be loaded before."""
        rates = ("base_lrs", "_last_lr", "lr_lambdas")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in rates} | {"lr_lambdas": [None]})
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
