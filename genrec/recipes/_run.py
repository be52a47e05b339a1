"""What both recipes share: the command line, the trainer, the run's folder, the table of results."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from genrec.config import ConfigError, RecipeConfig, help_text, load_config, to_yaml
from genrec.environment import check_environment, describe
from genrec.recipes._imports import imported
from genrec.recipes._strategy import build_strategy, launched

Config = TypeVar("Config", bound=RecipeConfig)
BuildData = Callable[[Any], Any]
BuildModel = Callable[[Any, Any], Any]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

log = logging.getLogger("genrec.recipes")


def main(
    recipe: str, schema: type[Config], build_data: BuildData, build_model: BuildModel, argv: Sequence[str] | None = None
) -> int:
    """A recipe's command line: `[--config NAME|PATH] [--help] [--print-config] [key=value ...]`.

    Args:
        recipe: "ranking" or "retrieval"; also the name of its default config.
        schema: The recipe's config class.
        build_data: config -> datamodule.
        build_model: (config, datamodule) -> LightningModule.
        argv: Words of the command line; None for the process's.

    Returns:
        The exit code: 0; 2 for a config that is wrong; 1 for what the user can cure otherwise; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        name, flags, overrides = _read_words(words, recipe)
        config = load_config(schema, name, overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--help" in flags:
        usage = f"python -m genrec.recipes.{recipe} [--config NAME|PATH] [--help] [--print-config] [key=value ...]"
        print(help_text(config, usage, (schema.__doc__ or "").partition("\n")[0]))
        return 0
    if "--print-config" in flags:
        print(to_yaml(config), end="")
        return 0
    return _guarded(config, build_data, build_model, resume_with=_command(recipe, words))


def _read_words(words: Sequence[str], recipe: str) -> tuple[str, set[str], list[str]]:
    """Name of the config, flags, overrides."""
    name, flags, overrides = recipe, set(), []
    rest = iter(words)
    for word in rest:
        if word in ("--help", "-h"):
            flags.add("--help")
        elif word == "--print-config":
            flags.add(word)
        elif word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] or next(rest, "")
            if not name:
                raise ConfigError("--config needs the name of a config or the path of a YAML file.")
        else:
            overrides.append(word)
    return name, flags, overrides


def _command(recipe: str, words: Sequence[str]) -> str:
    kept = [word for word in words if not word.startswith("ckpt_path=")]
    return " ".join(["python", "-m", f"genrec.recipes.{recipe}", *kept, "ckpt_path=last"])


def _guarded(config: RecipeConfig, build_data: BuildData, build_model: BuildModel, resume_with: str) -> int:
    """Run, and turn what a user can cure into one line and an exit code."""
    check_environment()
    quieten()
    # Read when torch loads: threads that wait by spinning make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from genrec.callbacks import TrainingInterrupted

    try:
        run(config, build_data, build_model)
    except TrainingInterrupted as stop:
        print(f"\nStopped. Checkpoint: {stop.checkpoint}\nResume with: {resume_with}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\nStopped before there was a checkpoint.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        # Lightning's answer to a Ctrl-C that no callback has caught.
        if isinstance(stop.__context__, KeyboardInterrupt):
            print(f"\nStopped at once. If there is a checkpoint, resume with: {resume_with}", file=sys.stderr)
            return INTERRUPTED
        raise
    except MisconfigurationException as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ConfigError, FileNotFoundError, ValueError) as error:
        # Raised deep in a library it is a bug, and the traceback is what helps; our own messages stand alone.
        if not _raised_by_genrec(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _raised_by_genrec(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("genrec.")


def run(config: RecipeConfig, build_data: BuildData, build_model: BuildModel) -> dict[str, float]:
    """Train and test as the config says, and leave the files of the run in `config.run.dir`.

    Returns:
        The metrics that are in metrics.json.
    """
    import lightning as L

    from genrec.callbacks import RunFolder

    # First, so that what is wrong with it is said before anything takes its time.
    strategy = build_strategy(config)
    directory = Path(config.run.dir)
    resume_from = checkpoint_to_resume(config)
    if resume_from is None:
        make_room(directory)
    L.seed_everything(config.seed, workers=True, verbose=False)
    _forget_backends_used()
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    model = build_model(config, data)
    folder = RunFolder(directory, to_yaml(config))
    folder.start(environment(config, data))
    trainer = build_trainer(config, data, folder, strategy)
    trainer.fit(model, datamodule=data, ckpt_path=resume_from)
    metrics = test(config, trainer, model, data) if config.run.test else {}
    best = trainer.checkpoint_callback
    if best is not None and getattr(best, "best_model_score", None) is not None:
        metrics[config.checkpoint.monitor] = float(best.best_model_score)  # type: ignore[attr-defined]
    reachable = dict(getattr(data, "best_reachable", None) or {})
    metrics |= {f"best_reachable/{name}": value for name, value in reachable.items()}
    folder.finish(metrics, environment(config, data))
    if trainer.is_global_zero:
        print(results_table(metrics))
        used = ", ".join(_attention_used()) or "none"
        print(f"Attention: {config.attention.backend} (served by: {used}). The run's files are in {directory}")
    return metrics


def test(config: RecipeConfig, trainer: Any, model: Any, data: Any) -> dict[str, float]:
    """Metrics of the test set with the best checkpoint; predictions too where the config asks for them."""
    from genrec.models import PredictionWriter

    best = trainer.checkpoint_callback.best_model_path or None
    (results,) = trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)
    if config.run.predict:
        trainer.callbacks.append(PredictionWriter(config.run.dir))
        trainer.predict(model, datamodule=data, ckpt_path=best, return_predictions=False)
    return {name: float(value) for name, value in results.items()}


def build_trainer(config: RecipeConfig, data: Any, folder: Any, strategy: Any = "auto") -> Any:
    """The lightning.Trainer of a config, with its loggers and callbacks.

    Args:
        config: The config.
        data: The datamodule.
        folder: The `RunFolder`.
        strategy: As `build_strategy` makes it.
    """
    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from genrec.callbacks import GracefulInterrupt, LearningRates, LoaderPosition, StepSeed
    from genrec.parallel.checkpoint_io import FolderCheckpointIO

    directory = Path(config.run.dir)
    options = {name: value for name, value in vars(config.trainer).items() if name != "options" and value is not None}
    checkpoints = directory / "checkpoints"
    callbacks: list[Any] = [
        StepSeed(config.seed),
        GracefulInterrupt(checkpoints / "last.ckpt"),
        LoaderPosition(),
        LearningRates(),
        folder,
        *checkpoint_callbacks(config, checkpoints),
    ]
    if config.early_stopping.patience is not None:
        monitor, mode = config.checkpoint.monitor, config.checkpoint.mode
        callbacks.append(
            EarlyStopping(monitor, config.early_stopping.min_delta, config.early_stopping.patience, mode=mode)
        )
    # inference_mode=False: FBGEMM's tables on CPU refuse tensors made under it.
    settings = {
        "logger": [
            CSVLogger(directory / "logs", name="csv"),
            TensorBoardLogger(directory / "logs", name="tensorboard"),
        ],
        "callbacks": callbacks,
        "inference_mode": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "strategy": strategy,
        # One process goes on with what several have saved too.
        "plugins": [FolderCheckpointIO()] if strategy == "auto" else [],
    }
    if config.trainer.devices == "auto":
        options |= launched()
    return L.Trainer(**{**settings, **options, **config.trainer.options})


def checkpoint_callbacks(config: RecipeConfig, directory: Path) -> list[Any]:
    """`best.ckpt` by the monitored metric and `last.ckpt` after each epoch. The first is the trainer's own one."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    common: dict[str, Any] = {"dirpath": directory, "enable_version_counter": False, "save_top_k": 1}
    monitor, mode = config.checkpoint.monitor, config.checkpoint.mode
    callbacks = [
        ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **common),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
    ]
    if config.checkpoint.every_n_steps is not None:
        callbacks.append(
            ModelCheckpoint(filename="last", every_n_train_steps=config.checkpoint.every_n_steps, **common)
        )
    return callbacks


def checkpoint_to_resume(config: RecipeConfig) -> str | None:
    """The file that `ckpt_path` names, or None.

    Raises:
        ConfigError: There is no such checkpoint.
    """
    if config.ckpt_path is None:
        return None
    named = Path(config.ckpt_path)
    if config.ckpt_path in ("last", "best"):
        named = Path(config.run.dir) / "checkpoints" / f"{config.ckpt_path}.ckpt"
    if not named.exists():
        raise ConfigError(
            f"ckpt_path={config.ckpt_path}: there is no checkpoint {named}. Without ckpt_path training starts anew."
        )
    return str(named)


def make_room(directory: Path) -> None:
    """Move what an earlier run left in `directory` to the first free `<directory>.<n>`. Nothing is deleted."""
    first_process = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    if not first_process or not (directory / "config.yaml").is_file():
        return
    number = 1
    while directory.with_name(f"{directory.name}.{number}").exists():
        number += 1
    aside = directory.with_name(f"{directory.name}.{number}")
    directory.rename(aside)
    print(f"The earlier run in {directory} is now in {aside}")


def environment(config: Any, data: Any) -> dict[str, Any]:
    """What environment.json says: versions, hardware, command, seed, backends, hash of the test targets."""
    return {
        **describe(),
        "command": " ".join(sys.argv),
        "seed": config.seed,
        "attention_backend": config.attention.backend,
        "attention_backends_used": _attention_used(),
        "layer_backend": config.model.layer_backend,
        "layer_backends_used": _layers_used(),
        "test_targets_hash": getattr(data, "test_targets_hash", None),
    }


def _forget_backends_used() -> None:
    from genrec.attention.registry import registry
    from genrec.layers.ops import forget_layer_use

    registry.forget_use()
    forget_layer_use()


def _attention_used() -> list[str]:
    from genrec.attention.registry import registry

    return sorted(registry.used)


def _layers_used() -> dict[str, list[str]]:
    from genrec.layers.ops import layer_backends_used

    return layer_backends_used()


def import_class(path: str) -> type:
    """The class of a dotted path such as `my_models.MyRanking`; the working folder is searched too.

    Raises:
        ConfigError: There is none.
    """
    found = imported("model.class_path", path)
    if not isinstance(found, type):
        raise ConfigError(f"model.class_path={path}: expected the dotted path of a class, such as my_models.MyRanking.")
    return found


def construct(class_path: str | None, default: type, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The model: of the class named by `class_path`, else of `default`.

    Raises:
        ConfigError: The constructor doesn't take what `model.options` gives it.
    """
    cls = import_class(class_path) if class_path else default
    try:
        return cls(**{**arguments, **options})
    except TypeError as error:
        if options and "unexpected keyword argument" in str(error):
            raise ConfigError(f"model.options don't fit {cls.__name__}: {error}.") from error
        raise


def common_arguments(config: Any, encoder: bool = True) -> dict[str, Any]:
    """Constructor arguments that all models share, from their sections; with `encoder` also those of its layers."""
    model, embedding, optimizer, schedule = config.model, config.embedding, config.optimizer, config.schedule
    arguments = {
        "hidden_dim": model.hidden_dim,
        "embedding_dims": embedding.dims,
        "positions": model.positions,
        "time_encoding": model.time_encoding,
        "scale_by_sqrt_dim": model.scale_by_sqrt_dim,
        "fp32_residual": model.fp32_residual,
        "input_dropout": model.input_dropout,
        "embedding_backend": embedding.backend,
        "embedding_dtype": embedding.dtype,
        "embedding_std": embedding.std,
        "embedding_options": embedding.options,
        "embedding_tables": embedding.tables,
        "learning_rate": optimizer.learning_rate,
        "betas": tuple(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "table_optimizer": embedding.optimizer.name,
        "table_learning_rate": embedding.optimizer.learning_rate,
        "table_weight_decay": embedding.optimizer.weight_decay,
        "schedule": schedule.name,
        "warmup_steps": schedule.warmup_steps,
        "total_steps": schedule.total_steps,
        "final_factor": schedule.final_factor,
    }
    if encoder:
        names = ("num_layers", "num_heads", "dropout")
        arguments |= {name: getattr(model, name) for name in names}
        arguments["attention_dropout"] = config.attention.dropout
    return arguments


def hstu_arguments(config: Any) -> dict[str, Any]:
    """Constructor arguments that only HSTU models have."""
    return {
        "qk_dim": config.model.qk_dim,
        "v_dim": config.model.v_dim,
        "form": config.model.form,
        "relative_bias": config.attention.relative_bias,
        "window": config.attention.window,
        "attention_backend": config.attention.backend,
        "layer_backend": config.model.layer_backend,
        "layer_recompute": tuple(config.model.layer_recompute),
        "recompute": config.model.recompute,
    }


def results_table(metrics: Mapping[str, float]) -> str:
    """The test metrics, with the best that can be reached beside them where that is known."""
    reachable = {name.removeprefix("best_reachable/"): v for name, v in metrics.items() if name.startswith("best_r")}
    rows = [("metric", "test", "best reachable" if reachable else "")]
    for name, value in sorted(metrics.items()):
        if name.startswith("test/"):
            short = name.removeprefix("test/")
            rows.append((short, _number(value), _number(reachable[short]) if short in reachable else ""))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {value:>9}  {best:>14}".rstrip() for name, value, best in rows)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def quieten() -> None:
    """Silence what dependencies say on every start and nobody can act on. Warnings about the run itself stay."""
    for name in ("torch.distributed.elastic", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_without_tips)
    for category, message in (
        (FutureWarning, ""),
        (DeprecationWarning, ""),
        (UserWarning, r".*does not have many workers.*"),
        (UserWarning, r".*Couldn't infer the batch indices.*"),
        (UserWarning, r".*You have overridden `on_before_batch_transfer` in `LightningModule`.*"),
        (UserWarning, r".*is smaller than the logging interval.*"),
        (UserWarning, r".*Checkpoint directory .* exists and is not empty.*"),
        (UserWarning, r".*The ``compute`` method of metric .* was called before.*"),
        (UserWarning, r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*"),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)


def _without_tips(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(
        text in message
        for text in ("Tip:", "💡", "TPU available", "`weights_only` was not set", "Loading `train_dataloader`")
    )
