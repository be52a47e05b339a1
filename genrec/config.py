"""Schemas of the recipes' configs. Every field is documented in its class; `--help` and the docs print these words.

`load_config(RankingConfig, "ranking_ml100k", ["trainer.max_epochs=3"])` makes one; Python users of the models and data
modules need none of this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from genrec._config_data import DataConfig, RankingDataConfig, RetrievalDataConfig
from genrec._config_loading import ConfigError, find_config, help_text, load_config, shipped_configs, to_yaml

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EarlyStoppingConfig",
    "EmbeddingConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RankingConfig",
    "RankingDataConfig",
    "RankingModelConfig",
    "RecipeConfig",
    "RetrievalConfig",
    "RetrievalDataConfig",
    "RetrievalLossConfig",
    "RetrievalModelConfig",
    "RunConfig",
    "ScheduleSection",
    "StrategySection",
    "TableOptimizerSection",
    "TrainerConfig",
    "find_config",
    "help_text",
    "load_config",
    "shipped_configs",
    "to_yaml",
]


@dataclass
class RunConfig:
    """Where a run leaves its files.

    Args:
        dir: Folder of the run: config.yaml, metrics.json, curves.png, environment.json, checkpoints, logs. A new run
            moves what an earlier one left there to `<dir>.1`, `<dir>.2` and so on.
        test: Test with the best checkpoint after training.
        predict: Write the predictions for the test set to predictions-<rank>.parquet after the test.
    """

    dir: str = "runs/run"
    test: bool = True
    predict: bool = False


@dataclass
class ModelConfig:
    """Sizes and form of the model.

    Args:
        class_path: Dotted path of a class of your own, for example `my_models.MyRanking`; it is built like the class
            that `name` stands for, of which it should be a subclass. null: that class itself.
        options: Further arguments of the model's constructor, by name.
        hidden_dim: D, width of the tokens.
        num_layers: Layers of the encoder.
        num_heads: Attention heads; they divide hidden_dim unless qk_dim and v_dim are given.
        qk_dim: Width of a head's queries and keys; null for hidden_dim / num_heads.
        v_dim: Width of a head's values; null for hidden_dim / num_heads.
        form: Published form of the HSTU layer: "paper" (arXiv 2402.17152) or "production" (Meta's later layer).
        dropout: Of the layers' outputs.
        input_dropout: Of the tokens.
        positions: Learned absolute positions, counted from the "start" or the "end" of the sequence, or "none".
        time_encoding: Added encoding of an event's age: "none", "sqrt" or "log".
        scale_by_sqrt_dim: Multiply embeddings by sqrt(hidden_dim), as the paper's public code does.
        fp32_residual: Under mixed precision, keep the tokens' state between layers in fp32; false: in the 16 bits of
            the layers, which saves memory and time.
        layer_backend: What runs the layers outside attention: "auto", "triton" or "torch".
        layer_recompute: Which of a layer's tensors the backward pass makes again instead of keeping: any of "norm"
            (input of the first projection), "silu" (its output, in the paper's form) and "gate" (input of the second).
        recompute: Keep only each layer's input for the backward pass and compute the rest again: less
            memory, more time.
    """

    class_path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    hidden_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    qk_dim: int | None = None
    v_dim: int | None = None
    form: Literal["paper", "production"] = "paper"
    dropout: float = 0.2
    input_dropout: float = 0.2
    positions: Literal["none", "start", "end"] = "start"
    time_encoding: Literal["none", "sqrt", "log"] = "none"
    scale_by_sqrt_dim: bool = False
    fp32_residual: bool = True
    layer_backend: str = "torch"
    layer_recompute: list[str] = field(default_factory=list)
    recompute: bool = False


@dataclass
class RankingModelConfig(ModelConfig):
    """The ranking model.

    Args:
        name: "hstu", or the baseline "mlp", which sees the candidate and the user but no sequence.
        action_mode: How actions become tokens: "interleaved" with the items, or "summed" onto the item that they
            follow.
        side_mode: Item side features are summed onto the item's embedding ("sum"), or concatenated and projected
            ("concat").
        head_hidden_dims: Widths of the head's hidden layers.
        head_activation: "relu", "gelu", "silu" or "swish_layer_norm".
        head_dropout: Of the head's hidden layers.
        output_norm: Normalisation of the encoder's output: "none", "l2" or "layer".
        per_user_metrics: Log GAUC too.
    """

    name: Literal["hstu", "mlp"] = "hstu"
    form: Literal["paper", "production"] = "production"
    dropout: float = 0.1
    action_mode: Literal["interleaved", "summed"] = "interleaved"
    side_mode: Literal["sum", "concat"] = "sum"
    head_hidden_dims: list[int] = field(default_factory=lambda: [128])
    head_activation: Literal["relu", "gelu", "silu", "swish_layer_norm"] = "relu"
    head_dropout: float = 0.0
    output_norm: Literal["none", "l2", "layer"] = "layer"
    per_user_metrics: bool = True


@dataclass
class RetrievalModelConfig(ModelConfig):
    """The retrieval model.

    Args:
        name: "hstu", or one of the baselines "sasrec" and "popularity".
        similarity: "dot" product, or "cosine" of query and item.
        output_norm: Normalisation of the encoder's output; null: "l2" with cosine similarity, else "layer".
        temperature: Scores are divided by it.
        item_bias: A learned bias for each item.
    """

    name: Literal["hstu", "sasrec", "popularity"] = "hstu"
    similarity: Literal["dot", "cosine"] = "dot"
    output_norm: Literal["none", "l2", "layer"] | None = None
    temperature: float = 1.0
    item_bias: bool = False


@dataclass
class AttentionConfig:
    """The attention op.

    Args:
        backend: "auto" (the fastest that can serve), "torch", "triton", "cutlass" or a registered one. A backend that
            is named and can't serve is an error. `python -m genrec.backends` lists what this machine can run.
        relative_bias: Relative position and time bias: "both", "position", "time" or "none"; null for what the form of
            the layer says (paper: both; production: none).
        window: History sees only as many tokens back; null for all.
        dropout: Of the attention weights.
    """

    backend: str = "auto"
    relative_bias: Literal["both", "position", "time", "none"] | None = None
    window: int | None = None
    dropout: float = 0.0


@dataclass
class TableOptimizerSection:
    """The optimizer of the embedding tables.

    Args:
        name: "sgd", "adam", "adamw", "adagrad" or "rowwise_adagrad". Tables sharded over CPU processes know no Adam.
        learning_rate: null for optimizer.learning_rate.
        weight_decay: Of the rows.
    """

    name: Literal["sgd", "adam", "adamw", "adagrad", "rowwise_adagrad"] = "adam"
    learning_rate: float | None = None
    weight_decay: float = 0.0


@dataclass
class EmbeddingConfig:
    """The embedding tables.

    Args:
        backend: "fbgemm": static rows, ids below the number of rows. "hkv": dynamic rows, any int64 id, eviction.
        dims: Width of a feature's rows where it is not model.hidden_dim, by feature; they are projected.
        dtype: Of the rows: "fp32", "fp16" or "bf16".
        std: Standard deviation of the truncated normal from which rows are drawn.
        options: Options of dynamic tables, for example `{score: lfu, admission_threshold: 2}`; all are in
            docs/dynamic-embeddings.md.
        tables: What differs in single tables, by table: backend, num_embeddings, capacity, dtype, options, optimizer.
            For example `tables: {item: {backend: hkv, capacity: 1000000}}`.
    """

    backend: Literal["fbgemm", "hkv"] = "fbgemm"
    dims: dict[str, int] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    std: float = 0.02
    options: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    optimizer: TableOptimizerSection = field(default_factory=TableOptimizerSection)


@dataclass
class OptimizerConfig:
    """AdamW for everything outside the tables.

    Args:
        learning_rate: Base rate; the schedule multiplies it.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled; of matrices only.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class ScheduleSection:
    """How all learning rates move, step by step.

    Args:
        name: "constant", "linear" or "cosine" (down to final_factor), "inverse_sqrt".
        warmup_steps: Steps over which the rates first rise from near zero.
        total_steps: Where "linear" and "cosine" end; null for the length of the training.
        final_factor: Lowest factor of "linear" and "cosine".
    """

    name: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_factor: float = 0.0


@dataclass
class RetrievalLossConfig:
    """The softmax over items.

    Args:
        name: "full_softmax" over all items (in chunks), or "sampled_softmax".
        num_negatives: Negatives of the sampled softmax.
        negative_sampling: "uniform", "popularity" or "in_batch".
        shared_negatives: One draw for all rows of a batch, or one for each row.
        logq_correction: Correct for how often each negative is drawn.
    """

    name: Literal["full_softmax", "sampled_softmax"] = "full_softmax"
    num_negatives: int = 128
    negative_sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    shared_negatives: bool = True
    logq_correction: bool = False


@dataclass
class EvaluationConfig:
    """Evaluation of retrieval, always over the whole catalogue.

    Args:
        top_ks: K of HR@K and NDCG@K.
        filter_seen: Items of the user's history don't compete.
        predict_k: Items of a prediction.
    """

    top_ks: list[int] = field(default_factory=lambda: [10, 50, 200])
    filter_seen: bool = True
    predict_k: int = 10


@dataclass
class CheckpointConfig:
    """The checkpoints `best` and `last` in `<run.dir>/checkpoints`.

    Args:
        monitor: Metric that says which is best, for example "val/loss" or "val/ndcg@10".
        mode: Whether the best value is the "min" or the "max".
        every_n_steps: Write `last` every so many steps too; null for after each validation only.
    """

    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    every_n_steps: int | None = None


@dataclass
class EarlyStoppingConfig:
    """Stop when checkpoint.monitor no longer improves.

    Args:
        patience: Validations without improvement after which training stops; null for never.
        min_delta: What counts as an improvement.
    """

    patience: int | None = None
    min_delta: float = 0.0


@dataclass
class TrainerConfig:
    """Arguments of lightning.Trainer.

    Args:
        max_epochs: Epochs, or -1 for no bound.
        max_steps: Optimizer steps, or -1 for no bound.
        accelerator: "auto", "cpu", "cuda" and so on.
        devices: Number of devices, or "auto".
        num_nodes: Machines.
        precision: "32-true", "bf16-mixed" and so on.
        gradient_clip_val: Largest norm of the gradient; null for no clipping.
        accumulate_grad_batches: Batches of an optimizer step.
        val_check_interval: Validate every so many batches (int) or such a part of an epoch (float); null: each epoch.
        check_val_every_n_epoch: Epochs between validations.
        limit_train_batches: At most so many batches (int) or such a part (float) of an epoch; null for all.
        limit_val_batches: The same for validation.
        limit_test_batches: The same for the test.
        log_every_n_steps: Steps between lines of the logs.
        enable_progress_bar: Show progress.
        deterministic: Only deterministic operations; those that have none raise.
        options: Any other argument of lightning.Trainer, by name.
    """

    max_epochs: int = 10
    max_steps: int = -1
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int = 1
    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int = 1
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True
    deterministic: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StrategySection:
    """How a run is spread over processes. All but the name are settings of "hybrid_parallel" (docs/parallelism.md).

    Args:
        name: "auto": "hybrid_parallel" with several processes or where a setting below is given, else Lightning's own
            choice for one process. Or the name of a strategy of Lightning's.
        tensor_parallel_size: Processes that share one copy of the HSTU layers.
        sequence_parallel: Split the tokens between the layers over them too.
        dense: What averages the gradients of dense parameters: "torch", "megatron" (CUDA only) or "auto".
        pipeline: TorchRec's train pipeline: "none", "base" (copies a batch ahead) or "sparse_dist" (exchanges the
            next batch's ids meanwhile, too).
        sharding: Of the tables: "row_wise", "table_wise", "column_wise", "data_parallel" (a copy on each rank) or
            "auto" (TorchRec's planner chooses; a copy where a table's optimizer can't be fused on the device).
        tables: What differs in single tables, for example `{item: row_wise, user: table_wise}`.
        memory: GiB that each rank may use for tables; null for what its device has.
        planner: What plans instead of these three: the import path of a function or a planner, `my_module.my_planner`.
        async_save: Write checkpoints in the background.
        find_unused_parameters: Some dense parameters have no gradient in some steps.
        timeout: Seconds after which a rank gives up waiting for the others.
    """

    name: str = "auto"
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    dense: Literal["auto", "torch", "megatron"] = "auto"
    pipeline: Literal["none", "base", "sparse_dist"] = "none"
    sharding: Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"] = "auto"
    tables: dict[str, str] = field(default_factory=dict)
    memory: float | None = None
    planner: str | None = None
    async_save: bool = False
    find_unused_parameters: bool = False
    timeout: float = 1800.0


@dataclass
class RecipeConfig:
    """What both recipes share.

    Args:
        seed: Of everything random: weights, batches, dropout, negatives. The same seed gives the same metrics.
        ckpt_path: Resume: "last", "best" (of run.dir) or a checkpoint's path; null trains from the start.
    """

    seed: int = 1
    ckpt_path: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategySection = field(default_factory=StrategySection)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class RankingConfig(RecipeConfig):
    """Train and test a ranking model: several predictions for each candidate that follows a history."""

    data: RankingDataConfig = field(default_factory=RankingDataConfig)
    model: RankingModelConfig = field(default_factory=RankingModelConfig)


@dataclass
class RetrievalConfig(RecipeConfig):
    """Train and test a retrieval model: the next item out of the whole catalogue."""

    data: RetrievalDataConfig = field(default_factory=RetrievalDataConfig)
    model: RetrievalModelConfig = field(default_factory=RetrievalModelConfig)
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(monitor="val/ndcg@10", mode="max"))
