"""`HybridParallelStrategy`: sharded tables, tensor- and data-parallel layers under the stock Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule, ShardingEnv
from typing_extensions import override

from genrec.parallel import checkpoint as checkpoints
from genrec.parallel import megatron
from genrec.parallel.loaders import EvaluationLoader, TrainingLoader
from genrec.parallel.parallelize import check_model, parallelize, shard_dims
from genrec.parallel.pipeline import PreparedBatch, StepPipeline
from genrec.parallel.planner import TablesPlan, check_planner, plan_tables, sharders
from genrec.parallel.precision import hybrid_precision
from genrec.parallel.summary import whole_summaries

Pipeline = Literal["none", "base", "sparse_dist"]
_OPTIONS = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin")


class HybridParallelStrategy(DDPStrategy):
    """Trains a LightningModule with its tables sharded over all ranks and its dense layers tensor- and data-parallel.

    The module stays an ordinary one, which runs unchanged under `strategy="auto"`. Its tables are TorchRec collections
    (genrec's `EmbeddingTables` are) and are sharded over the whole world; HSTU layers are split over tensor-parallel
    groups, whose ranks see the same batches; gradients of all else are averaged over the data-parallel groups.

    Args:
        tensor_parallel_size: Ranks that share one copy of the HSTU layers; they are neighbours.
        sequence_parallel: Split the rest of the layers over them too, by rows (CUDA only).
        dense: What averages dense gradients: "torch" (DistributedDataParallel), "megatron" (CUDA only), or "auto".
        pipeline: TorchRec's train pipeline: "none"; "base" (copies a batch ahead); "sparse_dist" (exchanges the next
            batch's ids during this batch's forward and backward pass).
        sharding: Of the tables: "row_wise", "table_wise", "column_wise", "data_parallel", or "auto" (see
            `genrec.parallel.planner.plan_tables`).
        tables: Table -> sharding, where it differs.
        memory: GiB that each rank may use for tables; None: what its device has.
        planner: What plans instead of these three: an object like TorchRec's EmbeddingShardingPlanner, a function
            (module, topology, sharders) -> ShardingPlan, or a ready ShardingPlan.
        async_save: Write checkpoints in the background.
        timeout: Of collectives: after so long a rank gives up waiting for the others.
        find_unused_parameters: As in DistributedDataParallel: some dense parameters have no gradient in some steps.
        process_group_backend: "gloo" or "nccl"; None: the device's.
        options: What Lightning's connectors pass to every strategy.

    Raises:
        ValueError: An unknown name, or a planner beside the settings that it replaces.
        ImportError: Megatron-Core is needed and not installed.
    """

    strategy_name = "hybrid_parallel"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        dense: Literal["auto", "torch", "megatron"] = "auto",
        pipeline: Pipeline = "none",
        sharding: str = "auto",
        tables: Mapping[str, str] | None = None,
        memory: float | None = None,
        planner: Any = None,
        async_save: bool = False,
        timeout: timedelta | float = timedelta(minutes=30),
        find_unused_parameters: bool = False,
        process_group_backend: str | None = None,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("dense", dense, ("auto", "torch", "megatron")),
            ("pipeline", pipeline, ("none", "base", "sparse_dist")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
        check_planner(planner)
        if planner is not None and (sharding != "auto" or tables or memory is not None):
            raise ValueError("A planner decides alone: give no sharding, tables or memory beside it.")
        if unknown := sorted(set(options) - set(_OPTIONS)):
            # DDPStrategy would take any, and keep them for a wrapper that is not used here.
            raise TypeError(f"HybridParallelStrategy has no {', '.join(unknown)}.")
        timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **options)
        self.tensor_parallel_size, self.sequence_parallel = tensor_parallel_size, sequence_parallel
        self.dense, self.pipeline = dense, pipeline
        self.sharding, self.tables, self.memory = sharding, dict(tables or {}), memory
        self.planner = planner
        self.async_save, self.find_unused_parameters = async_save, find_unused_parameters
        self.plan: TablesPlan | None = None
        self.step_pipeline: StepPipeline | None = None
        self._prepared: L.LightningModule | None = None
        self._hook_owner: Any = None
        self._loaded: dict[str, Any] | None = None
        if tensor_parallel_size > 1 or dense == "megatron":
            megatron.require_megatron("dense='megatron'" if dense == "megatron" else "tensor_parallel_size > 1")

    # Processes ------------------------------------------------------------------------------------------------------

    @property
    def data_parallel_rank(self) -> int:
        """Which share of a global batch this rank reads."""
        return megatron.data_parallel_rank() if megatron.is_initialized() else 0

    @property
    def data_parallel_size(self) -> int:
        """Into how many shares a global batch is split."""
        return megatron.data_parallel_size() if megatron.is_initialized() else 1

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank's place among those that read the same batches."""
        return megatron.tensor_parallel_rank() if megatron.is_initialized() else 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @override
    def _configure_launcher(self) -> None:
        # In the constructor of the Trainer, before there is another process.
        megatron.check_sizes(self.num_nodes * self.num_processes, self.tensor_parallel_size)
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if megatron.is_initialized() and megatron.tensor_parallel_size() != self.tensor_parallel_size:
            megatron.destroy()
        if not megatron.is_initialized():
            megatron.initialize(self.tensor_parallel_size, dense=self._dense)

    @property
    def _dense(self) -> str:
        return "torch" if self.dense == "auto" else self.dense

    # The module -----------------------------------------------------------------------------------------------------

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        # Not on the device: tables are made whole before they are sharded.
        with self.precision_plugin.tensor_init_context():
            yield

    @override
    def setup(self, trainer: L.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if self._prepared is not module:
            self._prepare(module)
            self._prepared = module
        self.model = module
        if trainer.state.fn == TrainerFn.FITTING:
            options = {"find_unused_parameters": self.find_unused_parameters} if self._dense == "torch" else {}
            self.model = megatron.wrap_data_parallel(module, _sharded_names(module), self._dense, **options)
            self._seed()
            self._setup_pipeline(trainer)
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _prepare(self, module: L.LightningModule) -> None:
        """Split the layers and shard the tables of a whole module, in place."""
        check_model(module, self.world_size, self.tensor_parallel_size)
        if any(isinstance(child, ShardedModule) for child in module.modules()):
            raise ValueError(
                "The module's tables are sharded already, by another strategy: make a new module and load a checkpoint."
            )
        if self.world_size > 1:
            # Ranks that drew their weights from different seeds start alike all the same.
            for tensor in [*module.parameters(), *module.buffers()]:
                if not tensor.is_meta and tensor.numel():
                    on_device = tensor.detach().to(self.root_device)
                    dist.broadcast(on_device, src=0)
                    tensor.detach().copy_(on_device)
        whole_summaries(module)
        parallelize(module, sequence_parallel=self.sequence_parallel)
        self.plan = plan_tables(
            module, self.root_device, sharding=self.sharding, tables=self.tables, memory=self.memory,
            planner=self.planner,
        )  # fmt: skip
        rank_zero_info(f"Tables over {self.world_size} ranks:\n{self.plan}")
        # It swaps the modules of the tables in place, so the LightningModule stays what Lightning knows.
        DistributedModelParallel(
            module,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=self.root_device,
            plan=self.plan.sharding,
            sharders=sharders(),
            init_data_parallel=False,
        )
        module.to(self.root_device)
        for child in module.modules():
            if isinstance(child, Metric) and child.process_group is None:
                child.process_group = megatron.data_parallel_group()

    def _seed(self) -> None:
        """Draw alike in a tensor-parallel group, differently over data-parallel ranks."""
        if self.world_size > 1:
            seed = torch.tensor([torch.initial_seed() % 2**62], device=self.root_device)
            dist.broadcast(seed, src=0)
            torch.manual_seed(int(seed) + self.data_parallel_rank)

    def _setup_pipeline(self, trainer: Any) -> None:
        if self.pipeline == "none":
            return
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            raise ValueError(f"pipeline='{self.pipeline}' needs automatic optimization: set pipeline='none'.")
        kind: str = self.pipeline
        if kind == "sparse_dist" and not any(isinstance(child, ShardedModule) for child in module.modules()):
            rank_zero_info("No table is sharded: pipeline 'sparse_dist' has no ids to exchange and only copies ahead.")
            kind = "base"
        self.step_pipeline = StepPipeline(self, kind, super().training_step)
        # The pipeline runs it, with the gradients zeroed before.
        trainer.fit_loop._skip_backward = True
        # Batches come to the loop with the hooks behind them: the one that it calls by itself must not run again.
        owner = trainer._data_connector._datahook_selector.get_instance("on_before_batch_transfer")
        hook = owner.on_before_batch_transfer

        def unless_prepared(batch: Any, dataloader_idx: int) -> Any:
            return batch if isinstance(batch, PreparedBatch) else hook(batch, dataloader_idx)

        owner.on_before_batch_transfer = unless_prepared  # type: ignore[method-assign]
        self._hook_owner = owner

    def _end_pipeline(self) -> None:
        if self.step_pipeline is not None:
            self.step_pipeline.pause()
            self.step_pipeline = None
        if self._hook_owner is not None:
            del self._hook_owner.on_before_batch_transfer
            self._hook_owner = None

    @override
    def model_to_device(self) -> None:
        """Nothing: `setup` has moved it."""

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            raise ValueError(
                f"configure_optimizers returned {len(self.optimizers)} optimizers, and HybridParallelStrategy trains "
                "with one: combine them in genrec.models.optim.CombinedOptimizer."
            )
        if isinstance(self.model, megatron.MegatronDataParallel):
            self.optimizers = [megatron.distribute_optimizer(one, self.model) for one in self.optimizers]

    @property
    @override
    def precision_plugin(self) -> Precision:
        if self._precision_plugin is None:
            return hybrid_precision(None)
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # None stays None: what a strategy brings along, Lightning takes for the user's choice.
        self._precision_plugin = None if precision_plugin is None else hybrid_precision(precision_plugin)

    # Steps ----------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.training:
            return TrainingLoader(dataloader, self)
        return EvaluationLoader(dataloader, self)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self.optimizers:
            # Tables take a schedule's rate when they are updated, in the backward pass.
            getattr(optimizer, "set_fused_rates", bool)()
        if self.step_pipeline is None:
            return super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        batch_idx = self.lightning_module.trainer.fit_loop.batch_idx
        return self.step_pipeline.step(batch_idx, args[1:])

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, PreparedBatch):
            return batch.batch
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Nothing: DDPStrategy's advice on unused parameters names strategies of its own."""

    @override
    def on_train_start(self) -> None:
        if self._loaded is not None:
            # What the run draws goes on where it was saved.
            checkpoints.restore_rng(self._loaded)
            self._loaded = None

    @override
    def on_validation_start(self) -> None:
        if self.step_pipeline is not None:
            self.step_pipeline.pause()

    @override
    def on_validation_end(self) -> None:
        if self.step_pipeline is not None:
            self.step_pipeline.resume()

    @override
    def on_train_end(self) -> None:
        self._end_pipeline()

    # Validation and so on run the module itself: its data-parallel wrapper is there for gradients.

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.test_step_context():
            return self.lightning_module.test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.predict_step_context():
            return self.lightning_module.predict_step(*args, **kwargs)

    @override
    @contextmanager
    def block_backward_sync(self) -> Any:
        wrapped = isinstance(self.model, (DistributedDataParallel, megatron.MegatronDataParallel))
        with self.model.no_sync() if wrapped else nullcontext():  # type: ignore[union-attr, operator]
            yield

    # Collectives ----------------------------------------------------------------------------------------------------

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Over the data-parallel group: the ranks of a tensor-parallel group hold the same values."""
        if not isinstance(tensor, Tensor):
            return tensor
        group = group or megatron.data_parallel_group()
        mean = reduce_op in ("mean", "avg", ReduceOp.AVG)
        if mean and not tensor.is_floating_point():
            # Lightning averages its counts of cases too: they keep their halves.
            tensor = tensor.to(torch.float64)
        operation = getattr(ReduceOp, reduce_op.upper()) if isinstance(reduce_op, str) and not mean else reduce_op
        dist.all_reduce(tensor, ReduceOp.SUM if mean else operation, group)
        return tensor.div_(dist.get_world_size(group)) if mean else tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Over the data-parallel group."""
        return super().all_gather(tensor, group or megatron.data_parallel_group(), sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        count = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(count)
        return bool(count == self.world_size) if all else bool(count)

    def data_parallel_counts(self, count: int) -> list[int]:
        """A number of every data-parallel rank."""
        counts = torch.zeros(self.data_parallel_size, dtype=torch.int64, device=self.root_device)
        counts[self.data_parallel_rank] = count
        dist.all_reduce(counts, group=megatron.data_parallel_group())
        return counts.tolist()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: `save_checkpoint` takes the weights from the module."""
        return {}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: `save_checkpoint` takes the state from the optimizer."""
        return {}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it."""

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: `load_checkpoint` has done it."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """A folder, as `genrec.parallel.checkpoint.save` writes it; all ranks together."""
        if storage_options is not None:
            raise TypeError("HybridParallelStrategy writes folders of its own and takes no storage_options.")
        assert self.lightning_module is not None
        # ModelCheckpoint(save_weights_only=True) leaves the optimizers out.
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        checkpoints.save(
            self.broadcast(str(filepath)), checkpoint, self.lightning_module, optimizers,
            shard_dims=self._shard_dims(), async_save=self.async_save,
        )  # fmt: skip

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        self._loaded = checkpoints.load(
            self.broadcast(str(checkpoint_path)), module, self.optimizers if fitting else [],
            shard_dims=self._shard_dims(), weights_only=weights_only, fallback=fitting, strict=module.strict_loading,
        )  # fmt: skip
        return self._loaded

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        checkpoints.remove(filepath)

    def _shard_dims(self) -> dict[str, int]:
        assert self.lightning_module is not None
        return shard_dims(self.lightning_module)

    @override
    def teardown(self) -> None:
        # The module stays where it is: the tables of a sharded one have no other place.
        self._end_pipeline()
        checkpoints.wait()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def _sharded_names(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers of sharded tables."""
    names = set()
    for path, child in module.named_modules():
        if isinstance(child, ShardedModule):
            prefix = f"{path}." if path else ""
            names |= {prefix + name for name, _ in [*child.named_parameters(), *child.named_buffers()]}
    return names
