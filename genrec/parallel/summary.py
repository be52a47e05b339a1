"""Lightning's model summary with the sizes of the whole model: a rank's own part says little."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary import summarize


class _Frozen:
    """What a summary says now; the stock one counts when it is printed."""

    def __init__(self, module: L.LightningModule, max_depth: int) -> None:
        summary = summarize(module, max_depth=max_depth)
        self._data = summary._get_summary_data()
        for name in ("total_parameters", "trainable_parameters", "model_size", "total_training_modes", "total_flops"):
            setattr(self, name, getattr(summary, name))

    def _get_summary_data(self) -> Any:
        return self._data


class WholeModelSummary(ModelSummary):
    """A summary of the module as it was before it was split."""

    def __init__(self, module: L.LightningModule, max_depth: int, **options: Any) -> None:
        super().__init__(max_depth, **options)
        self._whole = _Frozen(module, max_depth)

    def _summary(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return self._whole


class WholeRichModelSummary(WholeModelSummary, RichModelSummary):
    """The same, printed by rich."""


def whole_summaries(module: L.LightningModule) -> None:
    """Have the trainer's summaries show the module as it is now: call it before anything is split.

    The stock callbacks are replaced in `trainer.callbacks`; those of other classes are left alone.
    """
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    kinds = {ModelSummary: WholeModelSummary, RichModelSummary: WholeRichModelSummary}
    for index, callback in enumerate(callbacks):
        if kind := kinds.get(type(callback)):
            callbacks[index] = kind(module, callback._max_depth, **callback._summarize_kwargs)
