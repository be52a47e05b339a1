"""`SequenceRecommender`: what every genrec model shares. An ordinary LightningModule, made to be subclassed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from genrec._optimizer_names import set_parameter_names
from genrec.data.batch import SequenceBatch
from genrec.embedding.config import EmbeddingBackend, EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig
from genrec.embedding.tables import EmbeddingTables
from genrec.layers.preprocess import PreprocessorConfig, SequencePreprocessor
from genrec.models.losses import LossSum
from genrec.models.optim import (
    CombinedOptimizer,
    DenseOptimizerConfig,
    ScheduleConfig,
    ScheduleName,
    build_scheduler,
    dense_optimizer,
    table_optimizer,
)


class SequenceRecommender(L.LightningModule):
    """Tables, then a dense body: `forward(batch) = body(tables(batch.features), batch)`.

    Subclasses override `build_tables`, `build_preprocessor`, `build_encoder`, `build_head`, `extra_lookups` and `loss`;
    each is called with `self.options` (the constructor's arguments) set. A batch must pass through `prepare_batch`
    before it is looked up; Lightning does that, a loop of one's own calls it.

    Args:
        num_items: V; item ids are 0 .. V - 1.
        max_seqlen: Most events of a sequence that the model reads; the newest are kept where it cuts itself.
        hidden_dim: D.
        item_feature: Key of the items in the batch.
        action_feature: Key of the actions, or None for none.
        num_actions: Number of action ids.
        side_features: Item side features of the events, key -> number of ids.
        contextual_features: Features of the user, key -> number of ids.
        action_mode, candidate_actions, side_mode: As in `PreprocessorConfig`.
        embedding_dims: Widths of tables that are not hidden_dim, by feature; they are projected.
        positions: Learned absolute positions: "none", "start" or "end" (where they are counted from).
        time_encoding: "none", "sqrt" or "log": added encoding of an event's age.
        scale_by_sqrt_dim: Multiply embeddings by sqrt(D), as the paper's public code does.
        fp32_residual: As in `PreprocessorConfig`.
        input_dropout: Dropout of the tokens.
        embedding_backend: "fbgemm" or "hkv", of all tables.
        embedding_dtype: "fp32", "fp16" or "bf16", of all tables.
        embedding_std: Standard deviation of the truncated normal from which rows are drawn.
        embedding_options: Options of all dynamic tables (the fields of `genrec.embedding.hkv.HkvOptions`).
        embedding_tables: Fields of `EmbeddingTableConfig` that differ, by table: backend, num_embeddings, capacity,
            dtype, options, and `optimizer` with the fields of `TableOptimizerConfig` that differ.
        learning_rate, betas, eps, weight_decay: Of the dense AdamW.
        table_optimizer: "sgd", "adam", "adamw", "adagrad" or "rowwise_adagrad".
        table_learning_rate: None: learning_rate.
        table_weight_decay: As in `TableOptimizerConfig`.
        schedule, warmup_steps, total_steps, final_factor: As in `ScheduleConfig`; of all learning rates.
    """

    def __init__(
        self,
        num_items: int,
        *,
        max_seqlen: int = 200,
        hidden_dim: int = 64,
        item_feature: str = "item",
        action_feature: str | None = None,
        num_actions: int = 0,
        side_features: Mapping[str, int] | None = None,
        contextual_features: Mapping[str, int] | None = None,
        action_mode: str = "interleaved",
        candidate_actions: bool = False,
        side_mode: str = "sum",
        embedding_dims: Mapping[str, int] | None = None,
        positions: str = "start",
        time_encoding: str = "none",
        scale_by_sqrt_dim: bool = False,
        fp32_residual: bool = True,
        input_dropout: float = 0.2,
        embedding_backend: EmbeddingBackend = "fbgemm",
        embedding_dtype: str = "fp32",
        embedding_std: float = 0.02,
        embedding_options: Mapping[str, Any] | None = None,
        embedding_tables: Mapping[str, Mapping[str, Any]] | None = None,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        table_optimizer: str = "adam",
        table_learning_rate: float | None = None,
        table_weight_decay: float = 0.0,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(_plain(self.__dict__.pop("_arguments")))
        if num_items < 1 or max_seqlen < 1:
            raise ValueError(f"num_items and max_seqlen must be positive, got {num_items} and {max_seqlen}.")
        if action_feature is not None and num_actions < 1:
            raise ValueError(f"action_feature '{action_feature}' needs num_actions, the number of its ids.")
        if positions not in ("none", "start", "end"):
            raise ValueError(f"positions must be 'none', 'start' or 'end', got '{positions}'.")
        self.num_items = num_items
        self.max_seqlen = max_seqlen
        self.hidden_dim = hidden_dim
        self.item_feature = item_feature
        self.num_ids: dict[str, int] = {item_feature: num_items}
        if action_feature is not None:
            self.num_ids[action_feature] = num_actions
        self.num_ids |= {**(side_features or {}), **(contextual_features or {})}
        self.embedding_dims = dict(embedding_dims or {})
        self.embedding_backend = embedding_backend
        self.embedding_dtype = embedding_dtype
        self.embedding_std = embedding_std
        self.embedding_options = dict(embedding_options or {})
        self.embedding_tables = {name: dict(changes) for name, changes in (embedding_tables or {}).items()}
        self.dense_optimizer_config = DenseOptimizerConfig(learning_rate, (betas[0], betas[1]), eps, weight_decay)
        self.table_optimizer_config = TableOptimizerConfig(
            name=table_optimizer,  # type: ignore[arg-type]
            learning_rate=learning_rate if table_learning_rate is None else table_learning_rate,
            betas=(betas[0], betas[1]), eps=eps, weight_decay=table_weight_decay,
        )  # fmt: skip
        self.schedule_config = ScheduleConfig(schedule, warmup_steps, total_steps, final_factor)
        config = PreprocessorConfig(
            hidden_dim=hidden_dim,
            item_feature=item_feature,
            action_feature=action_feature,
            side_features=list(side_features or {}),
            contextual_features=list(contextual_features or {}),
            action_mode=action_mode,
            candidate_actions=candidate_actions,
            side_mode=side_mode,
            embedding_dims=dict(embedding_dims or {}),
            position_from="end" if positions == "end" else "start",
            time_encoding=time_encoding,
            scale_by_sqrt_dim=scale_by_sqrt_dim,
            fp32_residual=fp32_residual,
            dropout=input_dropout,
        )
        self.max_tokens = config.max_tokens(max_seqlen)
        self.preprocessor_config = replace(config, max_positions=0 if positions == "none" else self.max_tokens)

    def __new__(cls, *args: Any, **kwargs: Any) -> SequenceRecommender:
        """Notes the arguments of the outermost constructor: `load_from_checkpoint` calls it with these again."""
        model = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(model, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        spread = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        extra = arguments.pop(spread, {}) if spread else {}
        model.__dict__["_arguments"] = {**arguments, **extra}
        return model

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Lightning's, for folders of sharded runs too: whole tensors, on this process."""
        if isinstance(checkpoint_path, str | os.PathLike) and os.path.isdir(checkpoint_path):
            from genrec.parallel.checkpoint import as_file

            checkpoint_path = as_file(checkpoint_path, kwargs.get("weights_only"))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def build(self) -> None:
        """Make the tables and the body. A model's own constructor ends with this call, so that what it set before
        is at hand in the `build_*` methods. A subclass's constructor that adds things runs after it."""
        self.tables = self.build_tables()
        self.body = self.build_body()

    # What subclasses override.

    def table_configs(self) -> list[EmbeddingTableConfig]:
        """A table for each feature. Override to change sizes, backends, starts or optimizers of single tables.

        Raises:
            ValueError: `embedding_tables` names a table or a field that there is not.
        """
        if unknown := sorted(set(self.embedding_tables) - set(self.num_ids)):
            raise ValueError(f"embedding_tables names the tables {unknown}; the model has {sorted(self.num_ids)}.")
        return [self._table_config(name, rows) for name, rows in self.num_ids.items()]

    def _table_config(self, name: str, rows: int) -> EmbeddingTableConfig:
        changes = self.embedding_tables.get(name, {})
        backend = changes.get("backend", self.embedding_backend)
        options = {**(self.embedding_options if backend == "hkv" else {}), **changes.get("options", {})}
        try:
            optimizer = replace(self.table_optimizer_config, **changes.get("optimizer", {}))
            defaults = {
                "name": name,
                "dim": self.embedding_dims.get(name, self.hidden_dim),
                "feature_names": [name, *self.extra_features().get(name, [])],
                "backend": backend,
                "num_embeddings": rows,
                "initializer": InitializerConfig("truncated_normal", std=self.embedding_std),
                "dtype": self.embedding_dtype,
            }
            return EmbeddingTableConfig(**{**defaults, **changes, "optimizer": optimizer, "options": options})
        except TypeError as error:
            raise ValueError(f"embedding_tables['{name}']: {error}.") from error

    def build_tables(self) -> EmbeddingTables:
        """All embedding tables of the model."""
        return EmbeddingTables(self.table_configs())

    def build_preprocessor(self) -> nn.Module:
        """(embeddings by feature, batch) -> `TokenSequence`, with `outputs` as in `SequencePreprocessor`."""
        return SequencePreprocessor(self.preprocessor_config)

    def build_encoder(self) -> nn.Module:
        """A module `encoder(x, tokens)`: (T', D) token embeddings and their `TokenSequence` -> (T', D) states."""
        raise NotImplementedError(f"{type(self).__name__} must override build_encoder.")

    def build_head(self) -> nn.Module:
        """What stands on the states from which the model answers, (rows, D)."""
        raise NotImplementedError(f"{type(self).__name__} must override build_head.")

    def build_body(self) -> nn.Module:
        """Everything dense, as one module `body(embeddings, batch)`."""
        return SequenceBody(self.build_preprocessor(), self.build_encoder(), self.build_head())

    def extra_features(self) -> dict[str, list[str]]:
        """Keys that `extra_lookups` adds to a batch, by the table in which they look up."""
        return {}

    def extra_lookups(self, batch: SequenceBatch) -> dict[str, Tensor | JaggedTensor]:
        """Ids to look up beside the batch's own, by the keys of `extra_features`: negatives, a catalogue."""
        return {}

    def loss(self, output: Any, batch: SequenceBatch) -> dict[str, LossSum]:
        """The losses of a batch by name, each as a sum and a count. Their weighted means are added up."""
        raise NotImplementedError(f"{type(self).__name__} must override loss.")

    # What Lightning calls.

    def prepare_batch(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with every key that the tables look up, in their order. Runs where the batch was made (CPU)."""
        return replace(batch, features=self.tables.arrange(batch.features, self.extra_lookups(batch)))

    def on_before_batch_transfer(self, batch: SequenceBatch, dataloader_idx: int) -> SequenceBatch:
        """Lightning's hook: `prepare_batch`."""
        return self.prepare_batch(batch)

    def forward(self, batch: SequenceBatch) -> Any:
        """What the body makes of a prepared batch."""
        return self.body(self.tables(batch.features), batch)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        total, parts = self.total_loss(self.loss(self(batch), batch))
        size = batch.batch_size
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size)
        if len(parts) > 1 and self._is_written(batch_idx):
            self.log_dict({f"train/loss/{name}": value for name, value in parts.items()}, batch_size=size)
        return total

    def _is_written(self, batch_idx: int) -> bool:
        """Whether loggers write this step: a call of `self.log` costs about a millisecond; nobody sees the others."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return batch_idx == 0 or (every > 0 and (self.trainer.global_step + 1) % every == 0)

    def on_train_epoch_start(self) -> None:
        """Dynamic tables that score by epochs (`epoch_lfu`) learn of a new one."""
        self.tables.reach_epoch(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        """Log what dynamic tables count (size, hit rate, evictions, bytes): shares as means over the ranks, the rest
        as sums."""
        for name, value in self.tables.metrics().items():
            share = name.endswith(("/load_factor", "/hit_rate"))
            self.log(f"tables/{name}", float(value), sync_dist=True, reduce_fx="mean" if share else "sum")

    def log_loss(self, losses: Mapping[str, LossSum], stage: str, cases: int) -> None:
        """Log `<stage>/loss`, the mean over the cases of all batches and ranks."""
        total, _ = self.total_loss(losses, over_ranks=False)
        self.log(f"{stage}/loss", total, on_epoch=True, on_step=False, batch_size=max(cases, 1), sync_dist=True)

    def total_loss(self, losses: Mapping[str, LossSum], over_ranks: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the mean losses, and each mean.

        Args:
            losses: By name.
            over_ranks: In a run of several ranks, divide by the mean of the ranks' counts: averaged gradients are then
                those of one large batch, however the labels are spread. All ranks must call it together.
        """
        names = list(losses)
        counts = torch.stack([losses[name].count.float() for name in names])
        if over_ranks and self._trainer is not None and self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="mean")  # type: ignore[assignment]
        means = {name: replace(losses[name], count=count).mean() for name, count in zip(names, counts, strict=True)}
        total = sum((means[name] * losses[name].weight for name in names), torch.zeros((), device=counts.device))
        return total, {name: mean.detach() for name, mean in means.items()}

    def configure_optimizers(self) -> Any:
        """AdamW for the dense part and each table's own optimizer, as one, with the schedule.

        Tables that a strategy has sharded update themselves in the backward pass; only their rates are set here.
        """
        optimizers = {"dense": dense_optimizer(self.dense_parameters(), self.dense_optimizer_config)}
        for name, weight in self.tables.named_table_parameters():
            optimizers[f"tables.{name}"] = table_optimizer(weight, self.tables.configs[name].optimizer)
        optimizer = CombinedOptimizer(optimizers, self.tables.fused_optimizers())
        set_parameter_names(optimizer, self)
        if self.schedule_config.name == "constant" and self.schedule_config.warmup_steps == 0:
            return optimizer
        scheduler = build_scheduler(optimizer, self.schedule_config, self._estimated_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def dense_parameters(self) -> list[nn.Parameter]:
        """Trained parameters outside the tables."""
        return [p for n, p in self.named_parameters() if not n.startswith("tables.") and p.requires_grad]

    def _estimated_steps(self) -> int | None:
        if self.schedule_config.total_steps is not None or self._trainer is None:
            return self.schedule_config.total_steps
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None


class SequenceBody(nn.Module):
    """The dense part: tokens, encoder, head. A leaf for TorchRec's pipelines."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.encoder = encoder
        self.head = head

    def states(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> Tensor:
        """(rows, D): the states from which the model answers."""
        tokens = self.preprocessor(embeddings, batch)
        return self.preprocessor.outputs(self.encoder(tokens.x, tokens), tokens)  # type: ignore[operator]

    def forward(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> Any:
        """The head's answer."""
        return self.head(self.states(embeddings, batch))


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a checkpoint keeps them: dataclasses as dicts, no tensors (they are saved as buffers)."""
    return {name: _plain_value(value) for name, value in arguments.items() if not isinstance(value, Tensor)}


def _plain_value(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_value(item) for item in value]
    return value
