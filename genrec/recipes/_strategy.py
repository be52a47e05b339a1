"""From the `strategy` section of a config to a strategy, and to the number of processes."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict
from typing import Any

from genrec.config import ConfigError, RecipeConfig, StrategySection, TrainerConfig
from genrec.recipes._imports import imported


def build_strategy(config: RecipeConfig) -> Any:
    """What `lightning.Trainer(strategy=...)` gets: "auto", a name, or a `HybridParallelStrategy`.

    Raises:
        ConfigError: An unknown name, a planner that can't be imported, or settings of "hybrid_parallel" for another
            strategy.
    """
    settings = asdict(config.strategy)
    name = settings.pop("name")
    default = asdict(StrategySection())
    given = [key for key, value in settings.items() if value != default[key]]
    if name == "auto":
        name = "hybrid_parallel" if given or processes(config.trainer) > 1 else "auto"
    if name == "hybrid_parallel":
        from genrec.parallel import HybridParallelStrategy
        from genrec.parallel.megatron import check_sizes

        # The Trainer's constructor checks it too, but then an earlier run has already made room.
        check_sizes(processes(config.trainer), config.strategy.tensor_parallel_size)
        if config.strategy.planner is not None:
            settings["planner"] = imported("strategy.planner", config.strategy.planner)
        try:
            return HybridParallelStrategy(**settings)
        except ImportError as error:
            raise ConfigError(str(error)) from error
    _check_name(name)
    if given:
        raise ConfigError(f"strategy.{given[0]} is a setting of strategy.name=hybrid_parallel, not of '{name}'.")
    return name


def _check_name(name: str) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    known = ["auto", *StrategyRegistry.available_strategies()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"Unknown strategy.name '{name}'.{hint} Strategies: {', '.join(known)}.")


def processes(trainer: TrainerConfig) -> int:
    """Processes of a run: those that torchrun has started, or that `trainer.devices` and `num_nodes` ask for."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    devices, text = trainer.devices, str(trainer.devices)
    if "," in text:
        devices = len([part for part in text.split(",") if part.strip()])
    elif text in ("auto", "-1"):
        devices = _cuda_devices() if trainer.accelerator in ("auto", "gpu", "cuda") else 1
    try:
        return max(started, int(devices) * trainer.num_nodes)
    except ValueError as error:
        raise ConfigError(f"trainer.devices must be a number or 'auto', got '{devices}'.") from error


def _cuda_devices() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def launched() -> dict[str, int]:
    """The Trainer's `devices` and `num_nodes` under torchrun, which says itself what it has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    return {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "num_nodes": int(os.environ["GROUP_WORLD_SIZE"])}
