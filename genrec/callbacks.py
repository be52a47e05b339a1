"""Callbacks of the recipes: the files of a run, a clean stop at Ctrl-C, and random numbers that don't depend on it."""

from __future__ import annotations

import csv
import json
import math
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class StepSeed(L.Callback):
    """Seeds torch anew for each training batch, from the run's seed, the batch's number and the data-parallel rank.

    Dropout and negatives then depend neither on what validation drew nor on whether the run was resumed: a resumed run
    repeats an uninterrupted one exactly where its kernels are deterministic.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.batches = 0

    def seed_of(self, trainer: L.Trainer, batch: int) -> int:
        """The seed of a training batch, counted over the whole run from 0; for what prepares batches ahead of time."""
        # Ranks that share a batch, those of a tensor-parallel group, draw alike.
        rank = getattr(trainer.strategy, "data_parallel_rank", trainer.global_rank)
        mixed = (self.seed * _MIX + batch) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 + rank * _MIX) & _MASK
        return (mixed ^ (mixed >> 27)) >> 1

    def reseed(self, trainer: L.Trainer) -> None:
        """Seed torch for the batch that comes next."""
        torch.manual_seed(self.seed_of(trainer, self.batches))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first batch, also of a resumed run."""
        self.reseed(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Whatever validation drew is forgotten."""
        self.reseed(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for a validation inside an epoch."""
        self.reseed(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch further."""
        self.batches += 1
        self.reseed(trainer)

    def state_dict(self) -> dict[str, Any]:
        """How many batches were trained."""
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.batches = state_dict["batches"]


class LoaderPosition(L.Callback):
    """Restores the training loader's position where a run is resumed in mid-epoch.

    Lightning does that itself unless the loader was asked for before the checkpoint was read, as schedules do that
    need to know the number of steps.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the position."""
        loader = trainer.train_dataloader
        if loader is not None and hasattr(loader, "state_dict"):
            checkpoint["train_loader"] = loader.state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read it."""
        self._state = checkpoint.get("train_loader")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go there, before the first batch is taken."""
        if self._state is not None and trainer.fit_loop.restarted_mid_epoch:
            assert trainer.train_dataloader is not None
            trainer.train_dataloader.load_state_dict(self._state)
        self._state = None


class LearningRates(L.Callback):
    """Logs the rate of each optimizer of `CombinedOptimizer` as `lr/<name>`, whenever the trainer logs."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The rates of the coming step."""
        if trainer.global_step % max(trainer.log_every_n_steps, 1):  # type: ignore[attr-defined]
            return
        rates = {}
        for optimizer in trainer.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                rates[f"lr/{group.get('name', index)}"] = float(group["lr"])
        if rates:
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.global_step)


class TrainingInterrupted(Exception):
    """Ctrl-C was pressed during `fit`, and a checkpoint has been written.

    Args:
        checkpoint: From which the run can be resumed.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"Interrupted; checkpoint: {checkpoint}")
        self.checkpoint = checkpoint


class GracefulInterrupt(L.Callback):
    """At Ctrl-C: finish the batch, write a checkpoint, raise `TrainingInterrupted`. A second Ctrl-C stops at once.

    Args:
        checkpoint: File to write. List this callback before the checkpoint callbacks.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.requested = False
        self._previous: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        rank_zero_info("\nCtrl-C: stopping after this batch with a checkpoint. Once more to stop at once.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if asked to; all ranks together."""
        requested = self.requested
        if trainer.world_size > 1:
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested:
            trainer.save_checkpoint(self.checkpoint)
            raise TrainingInterrupted(self.checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A Ctrl-C that came after the last batch: training is done, but what follows it is not wanted."""
        if self.requested:
            trainer.save_checkpoint(self.checkpoint)
            raise TrainingInterrupted(self.checkpoint)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class RunFolder(L.Callback):
    """The files of a run: config.yaml, environment.json, metrics.json, curves.png.

    Args:
        directory: The run's folder.
        config: Text of config.yaml.
    """

    def __init__(self, directory: Path, config: str) -> None:
        self.directory = directory
        self.config = config

    @rank_zero_only
    def start(self, environment: Mapping[str, Any]) -> None:
        """Write config.yaml and environment.json."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(self.config, encoding="utf-8")
        _write_json(self.directory / "environment.json", environment)

    @rank_zero_only
    def finish(self, metrics: Mapping[str, float], environment: Mapping[str, Any]) -> None:
        """Write metrics.json (null for values that are not numbers) and what is now known of the environment."""
        _write_json(
            self.directory / "metrics.json",
            {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())},
        )
        _write_json(self.directory / "environment.json", environment)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves of the whole training."""
        self.draw(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self.draw(trainer)

    @rank_zero_only
    def draw(self, trainer: L.Trainer) -> None:
        """curves.png from what the CSV loggers of this run and of those that it resumed have written."""
        for logger in trainer.loggers:
            logger.save()
        draw_curves(read_curves(self.directory / "logs"), self.directory / "curves.png")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_curves(logs: Path) -> dict[str, dict[int, float]]:
    """Metric -> value at each step, from all `metrics.csv` below a folder; of two values at a step the newer file's."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(logs.rglob("metrics.csv"), key=lambda p: p.stat().st_mtime):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if text and name not in ("step", "epoch"):
                        curves.setdefault(name, {})[int(row["step"])] = float(text)
    return curves


def draw_curves(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Losses on the left, the other validation metrics on the right. Nothing is drawn where there is nothing."""
    from matplotlib.figure import Figure

    losses = {name: curve for name, curve in curves.items() if "loss" in name and not name.startswith("test/")}
    others = {name: curve for name, curve in curves.items() if name.startswith("val/") and name not in losses}
    if not losses and not others:
        return
    # A Figure of its own, without pyplot: no display is needed and nothing global changes.
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, group, title in zip(figure.subplots(1, 2), (losses, others), ("loss", "validation"), strict=True):
        for name, curve in sorted(group.items()):
            steps = sorted(curve)
            axes.plot(steps, [curve[step] for step in steps], label=name, marker="." if len(steps) < 30 else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if group:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
