"""Ranking: several predictions for each candidate that follows a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genrec.data.batch import SequenceBatch
from genrec.layers.config import HSTUConfig
from genrec.layers.heads import MultiTaskHead
from genrec.layers.hstu import HSTUStack
from genrec.metrics import TaskMetrics
from genrec.models.base import SequenceRecommender
from genrec.models.losses import LossSum, Task, multi_task_loss


class RankingModel(SequenceRecommender):
    """Multi-task ranking with any encoder: heads, losses, metrics. Override `build_encoder`.

    The body answers a dict of logits by task, each with a row for each candidate. Losses are divided by the number of
    labels. Logged at evaluation: `<stage>/loss` and all of `TaskMetrics`, as `<stage>/auc/<task>` and so on.

    Args:
        num_items: V.
        tasks: `Task`s, or dicts of their fields.
        head_hidden_dims: Widths of the head's hidden layers.
        head_activation: As in `MLP`.
        head_dropout: As in `MLP`.
        output_norm: Of the encoder's output: "none", "l2" or "layer".
        per_user_metrics: Log GAUC, for which batches must have `user_ids`.
        options: As in `SequenceRecommender`.
    """

    def __init__(
        self,
        num_items: int,
        tasks: Sequence[Task | Mapping[str, Any]],
        *,
        head_hidden_dims: Sequence[int] = (128,),
        head_activation: str = "relu",
        head_dropout: float = 0.0,
        output_norm: str = "layer",
        per_user_metrics: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_items, **options)
        self.tasks = [task if isinstance(task, Task) else Task(**task) for task in tasks]
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must have at least one task and different names, got {names}.")
        self.head_hidden_dims = list(head_hidden_dims)
        self.head_activation = head_activation
        self.head_dropout = head_dropout
        self.output_norm = output_norm
        self.per_user_metrics = per_user_metrics
        kinds = {task.name: task.kind for task in self.tasks}
        self.metrics = nn.ModuleDict(
            {stage: TaskMetrics(kinds, f"{stage}/", per_user_metrics) for stage in ("val", "test")}
        )

    def build_head(self) -> nn.Module:
        """(candidates, D) states -> logits by task."""
        dims = {task.name: task.num_outputs for task in self.tasks}
        return MultiTaskHead(
            self.head_in_dim, dims, self.head_hidden_dims, self.head_activation, self.head_dropout, self.output_norm
        )

    @property
    def head_in_dim(self) -> int:
        """Width of what the head reads."""
        return self.hidden_dim

    def loss(self, output: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, LossSum]:
        """The loss of each task."""
        if batch.labels is None:
            raise ValueError("A loss needs labels: the batch has none.")
        return multi_task_loss(output, batch.labels, self.tasks, batch.label_weights)

    def forward(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Logits of each task by name: (candidates,), or (candidates, classes) for multi-class tasks."""
        return super().forward(batch)

    def probabilities(self, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions from logits: sigmoid, softmax, or the value itself."""
        function = {"binary": torch.sigmoid, "multiclass": lambda x: x.softmax(dim=-1), "regression": lambda x: x}
        return {task.name: function[task.kind](output[task.name].float()) for task in self.tasks}

    def evaluation_step(self, batch: SequenceBatch, stage: str) -> None:
        """Loss and metrics of a batch's candidates."""
        output = self(batch)
        assert batch.labels is not None
        self.log_loss(self.loss(output, batch), stage, batch.labels.shape[0])
        users = None
        if self.per_user_metrics:
            if batch.user_ids is None:
                raise ValueError("GAUC needs user_ids, which the batch lacks: give them or set per_user_metrics=False.")
            users, _ = self.candidates(batch)
        metrics: TaskMetrics = self.metrics[stage]  # type: ignore[assignment]
        for index, task in enumerate(self.tasks):
            metrics.update(task.name, output[task.name].float(), batch.labels[:, index], users, batch.label_weights)
        self.log_dict(metrics.metrics(), on_step=False, on_epoch=True)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """`evaluation_step` of a validation batch."""
        self.evaluation_step(batch, "val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """`evaluation_step` of a test batch."""
        self.evaluation_step(batch, "test")

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """For each candidate: `user_id` where known, `item`, and the prediction of each task."""
        predictions = self.probabilities(self(batch))
        users, items = self.candidates(batch)
        known = {} if batch.user_ids is None else {"user_id": users}
        return {**known, "item": items, **predictions}

    def candidates(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(candidates,) user of each candidate (its sequence's number where users are unknown), and its item id."""
        if batch.num_targets is None:
            raise ValueError("Ranking needs candidates: the batch has no num_targets.")
        sequence = torch.repeat_interleave(batch.num_targets)
        before = batch.num_targets.cumsum(0) - batch.num_targets
        within = torch.arange(sequence.numel(), device=sequence.device) - before[sequence]
        rows = (batch.seq_offsets[1:] - batch.num_targets)[sequence] + within
        users = sequence if batch.user_ids is None else batch.user_ids[sequence]
        return users, batch.features[self.item_feature].values()[rows]


class HSTURanking(RankingModel):
    """HSTU for ranking: candidates follow the history, each sees the history and itself.

    Args:
        num_items: V.
        tasks: As in `RankingModel`.
        num_layers, num_heads, qk_dim, v_dim, form, dropout, attention_dropout, window: As in `HSTUConfig`.
        attention_backend, layer_backend, layer_recompute, recompute: As in `HSTUConfig`.
        relative_bias: As in `HSTUConfig`; None: "time" in the paper's form, "none" in production's. A position bias
            would make a candidate's score depend on its place among the candidates.
        hstu_options: Any other field of `HSTUConfig`, by name.
        options: As in `RankingModel`.

    Example:
        >>> model = HSTURanking(100, [Task("click")], action_feature="action", num_actions=4)
    """

    def __init__(
        self,
        num_items: int,
        tasks: Sequence[Task | Mapping[str, Any]],
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        form: str = "production",
        relative_bias: str | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        window: int | None = None,
        attention_backend: str = "auto",
        layer_backend: str = "torch",
        layer_recompute: Sequence[str] = (),
        recompute: bool = False,
        hstu_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_items, tasks, **options)
        if relative_bias is None and form == "paper":
            relative_bias = "time"
        config = HSTUConfig(
            self.hidden_dim, num_layers, num_heads, qk_dim, v_dim, self.max_tokens, form,
            relative_bias=relative_bias, dropout=dropout, attention_dropout=attention_dropout, window=window,
            attention_backend=attention_backend, layer_backend=layer_backend,
            layer_recompute=tuple(layer_recompute), recompute=recompute,
        )  # fmt: skip
        self.hstu_config = replace(config, **(hstu_options or {}))
        self.preprocessor_config = replace(self.preprocessor_config, layer_backend=self.hstu_config.layer_backend)
        self.build()

    def build_encoder(self) -> nn.Module:
        """The HSTU stack."""
        return HSTUStack(self.hstu_config)
