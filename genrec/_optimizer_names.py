"""Optimizer states by the names of parameters: what lets them move between layouts of parameter groups.

torch numbers parameters by their place in the groups. A run with sharded tables has other groups than one without, so a
state travels as {"state": {name: {quantity: value}}, "groups": [{"params": [names], option: value}]}.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

log = logging.getLogger("genrec.optimizers")

# How a step is computed, not what it is; these stay as the running program has them.
IMPLEMENTATION = frozenset({"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"})


def parameter_names(module: nn.Module) -> dict[int, str]:
    """id of each parameter -> its name (of a shared one the first); of the weights of fused optimizers too."""
    names = {id(weight): name for name, weight, _ in fused_parameters(module)}
    return names | {id(parameter): name for name, parameter in module.named_parameters()}


def set_parameter_names(optimizer: Optimizer, module: nn.Module) -> None:
    """Write `param_names`, torch's own key, into every group, and let the optimizer load states that have them.

    Such a state fits whatever its groups were: see `arrange`.
    """
    names = parameter_names(module)
    for group, parameters in driven(optimizer):
        group["param_names"] = [names.get(id(parameter), "") for parameter in parameters]
    optimizer.register_load_state_dict_pre_hook(lambda this, state: arrange(state, this))


def fused_parameters(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name, weight and optimizer of each table that updates itself in the backward pass (TorchRec's fused optimizers).

    On a rank without a part of a table, that table is absent.
    """
    inside: list[str] = []
    for path, child in module.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside) or not hasattr(child, "fused_optimizer"):
            continue
        inside.append(path)
        for key, weight in child.fused_optimizer.params.items():
            yield f"{path}.{key}" if path else key, weight, child.fused_optimizer


def driven(optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Each group, and the parameters that it drives: its own, or those of tables that take their rate from it."""
    by_group = getattr(optimizer, "driven_parameters", None)
    groups = list(optimizer.param_groups)
    lists = by_group() if by_group is not None else [list(group["params"]) for group in groups]
    return list(zip(groups, lists, strict=True))


def named_state(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """A torch optimizer's state_dict by name; None where it has no `param_names`."""
    groups = state_dict["param_groups"]
    if not all("param_names" in group for group in groups):
        return None
    state: dict[str, Any] = {}
    for group in groups:
        # Groups of tables that update themselves have names, and no parameters.
        for number, name in zip(group["params"], group["param_names"], strict=False):
            if number in state_dict["state"]:
                state[name] = dict(state_dict["state"][number])
    return {"state": state, "groups": [_named_group(group) for group in groups]}


def _named_group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "params": list(group["param_names"]), **{k: v for k, v in group.items() if k not in ("params", "param_names")}
    }  # fmt: skip


def options_of(names: Sequence[str], groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that saved groups have for some parameters; of groups that disagree the first, with a warning."""
    wanted, merged = set(names), None
    for group in groups:
        if not wanted.intersection(group["params"]):
            continue
        options = {key: value for key, value in group.items() if key not in IMPLEMENTATION}
        if merged is None:
            merged = options
            continue
        for key in sorted(options.keys() & merged.keys()):
            if options[key] != merged[key]:
                log.warning(
                    "The parameters %s were in groups with different '%s' (%s and %s) and are now in one: taking %s.",
                    ", ".join(sorted(wanted)), key, merged[key], options[key], merged[key],
                )  # fmt: skip
    return merged or {}


def arrange(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[str, Any] | None:
    """A state_dict with `param_names`, as one of `optimizer`'s own layout; None where it has none or fits already.

    Quantities that no parameter of the optimizer has a place for (tables that update themselves) are left out.

    Raises:
        ValueError: A parameter's state is of another kind of optimizer.
    """
    named = named_state(state_dict)
    layout = driven(optimizer)
    if named is None or all("param_names" not in group for group, _ in layout):
        return None
    state: dict[int, Any] = {}
    groups, number = [], 0
    for group, _ in layout:
        names = group["param_names"]
        own = {key: value for key, value in group.items() if key != "params"}
        saved = {key: value for key, value in options_of(names, named["groups"]).items() if key in own or _late(key)}
        numbers = list(range(number, number + len(group["params"])))
        groups.append({**own, **saved, "params": numbers})
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=False)):
            if name in named["state"]:
                state[number + index] = fitting(name, named["state"][name], parameter.shape, optimizer)
        number += len(numbers)
    return {**state_dict, "state": state, "param_groups": groups}


def _late(key: str) -> bool:
    """Options that schedulers add to a group after it was made."""
    return key in ("initial_lr", "swa_lr")


def fitting(name: str, saved: Mapping[str, Any], shape: Sequence[int], optimizer: Optimizer) -> dict[str, Any]:
    """A parameter's saved quantities, as its present optimizer keeps them.

    Args:
        name: Of the parameter.
        saved: Tensors by name, or anything else with a `shape`.
        shape: Of the whole parameter.
        optimizer: A plain one, or one made of several.

    Raises:
        ValueError: It keeps others.
    """
    kind, state = _kind(optimizer, name), dict(saved)
    if kind not in _KEEPS or not state:
        return state
    keeps = _KEEPS[kind]
    if kind == "Adagrad" and "step" not in state:
        # A table's Adagrad counts no steps; torch's does, for a decay of the rate that tables don't have.
        state["step"] = torch.zeros(())
    if "step" not in keeps:
        state.pop("step", None)
    form = tuple(shape[:1]) if kind == "RowWiseAdagrad" else tuple(shape)
    wrong = [key for key, value in state.items() if key != "step" and tuple(getattr(value, "shape", form)) != form]
    if wrong or set(state) - set(keeps) or any(needed and key not in state for key, needed in keeps.items()):
        raise ValueError(
            f"The optimizer state of '{name}' was saved as {describe(saved)}, but it is now trained by {kind}, which "
            f"keeps {', '.join(keeps) or 'nothing'} of shape {form}. Use the optimizer that it was trained with, or "
            "load the weights alone."
        )
    return state


def describe(state: Mapping[str, Any]) -> str:
    """Quantities and their shapes, for messages."""
    return ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in sorted(state.items())) or "nothing"


_KEEPS: dict[str, dict[str, bool]] = {
    "Adam": {"step": True, "exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": False},
    "AdamW": {"step": True, "exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": False},
    "DistributedAdamW": {"step": True, "exp_avg": True, "exp_avg_sq": True},
    "Adagrad": {"step": True, "sum": True},
    "RowWiseAdagrad": {"sum": True},
    "SGD": {"momentum_buffer": False},
}
"""What an optimizer keeps of a parameter, and whether it always does."""


def _kind(optimizer: Optimizer, name: str) -> str:
    """Class of the optimizer that trains the parameter."""
    parts = getattr(optimizer, "optimizers", None)
    for part in parts.values() if isinstance(parts, Mapping) else ():
        if any(name in group.get("param_names", ()) for group in part.param_groups):
            return type(part).__name__
    return type(optimizer).__name__


def step_device(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Where the optimizer keeps how many steps `parameter` has taken: on the host, unless it steps in one kernel."""
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    on_device = bool(group.get("fused") or group.get("capturable"))
    return parameter.device if on_device else torch.device("cpu")
