"""What the strategy puts around loaders, so that ranks with unequal numbers of batches never wait for each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.data import sized_len
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler
from torchmetrics import Metric

from genrec.parallel import megatron

if TYPE_CHECKING:
    from genrec.parallel.strategy import HybridParallelStrategy


class _Loader:
    """A loader with all attributes of another."""

    def __init__(self, loader: Any, strategy: HybridParallelStrategy) -> None:
        self.loader, self.strategy = loader, strategy

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


class TrainingLoader(_Loader):
    """As many batches as the rank with the fewest has; what is left over on the others is dropped.

    Ranks agree on the number once where loaders have a length, else before each batch. With a pipeline batches are read
    ahead; the position in a checkpoint is that of the batch last trained all the same.
    """

    def __init__(self, loader: Any, strategy: HybridParallelStrategy) -> None:
        super().__init__(loader, strategy)
        own = sized_len(loader)
        counts = strategy.data_parallel_counts(-1 if own is None else own)
        self.length = None if -1 in counts else min(counts)
        self._position: Any = None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("The loader of some rank has no length.")
        return self.length

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            # These are here only where the loader has them: Lightning asks.
            own = super().__getattr__(name)
            return self._state if name == "state_dict" else self._with_fresh_position(own)
        return super().__getattr__(name)

    def source_position(self) -> Any:
        """`state_dict` of the loader itself; None where it has none."""
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None

    def _state(self) -> Any:
        return self.source_position() if self._position is None else self._position

    def _with_fresh_position(self, load: Any) -> Any:
        def load_state_dict(state: Any) -> None:
            self._position = None
            load(state)

        return load_state_dict

    def __iter__(self) -> Iterator[Any]:
        steps = self.strategy.step_pipeline
        if steps is None:
            yield from self._agreed()
            return
        for prepared in steps.read(self._agreed()):
            self._position = prepared.position
            yield prepared

    def _agreed(self) -> Iterator[Any]:
        source = iter(self.loader)
        left = self._left()
        while left > 0:
            left -= 1
            batch = next(source, None)
            if self.length is None and 0 in self.strategy.data_parallel_counts(int(batch is not None)):
                return
            if batch is None:
                return
            yield batch

    def _left(self) -> float:
        """Batches until the epoch's end, beyond which nothing may be read: it would be lost to the next epoch."""
        assert self.strategy.lightning_module is not None
        trainer = self.strategy.lightning_module.trainer
        if self.length is None:
            limit = trainer.limit_train_batches
            total = limit if isinstance(limit, int) else float("inf")
        else:
            total = trainer.num_training_batches
        return total - trainer.fit_loop.epoch_loop.batch_progress.current.ready


class EvaluationLoader(_Loader):
    """Every batch of this rank once. A rank with fewer batches than others first takes part in so many more steps.

    Sharded tables need all ranks in every step. The further steps run on a batch of this rank, or a borrowed one, and
    what they count is dropped: logged values, and metrics that they were the first to update.
    """

    def __init__(self, loader: Any, strategy: HybridParallelStrategy) -> None:
        super().__init__(loader, strategy)
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            # Lightning's sampler repeats cases until all ranks have equally many.
            sampler.total_size = len(sampler.dataset)  # type: ignore[arg-type]
            sampler.num_samples = len(range(sampler.rank, sampler.total_size, sampler.num_replicas))
        own = sized_len(loader)
        if own is None and strategy.data_parallel_size > 1:
            raise ValueError("An evaluation loader needs a length (__len__) when several data-parallel ranks evaluate.")
        self.length = own

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("The loader has no length.")
        # At least 1: Lightning skips an evaluation without batches, and the other ranks would wait.
        return max(self.length, 1)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.loader)
        if self.strategy.data_parallel_size > 1 and (steps := self._numbers()) is not None:
            first = self._first(source, steps)
            own = steps[self.strategy.data_parallel_rank]
            if max(steps) > own:
                self._keep_company(first, max(steps) - own)
            if own == 0:
                return
            yield first
        yield from source

    def _numbers(self) -> list[int] | None:
        """Batches of every data-parallel rank in all loaders of this evaluation; None but for the first loader."""
        trainer = self._trainer
        name = "test" if trainer.testing else "predict" if trainer.predicting else "val"
        loaders = tree_leaves(getattr(trainer, f"{name}_dataloaders"))
        if loaders[0] is not self:
            return None
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else getattr(trainer, f"num_{name}_batches")
        own = sum(int(min(loader.length, limit)) for loader, limit in zip(loaders, limits, strict=True))
        return self.strategy.data_parallel_counts(own)

    @property
    def _trainer(self) -> Any:
        assert self.strategy.lightning_module is not None
        return self.strategy.lightning_module.trainer

    def _first(self, source: Iterator[Any], numbers: list[int]) -> Any:
        """This rank's first batch; a borrowed one where it has none."""
        batch = next(source, None)
        if 0 in numbers and max(numbers) > 0:
            group = megatron.data_parallel_group()
            content = [batch]
            dist.broadcast_object_list(content, dist.get_global_rank(group, numbers.index(max(numbers))), group=group)
            batch = content[0] if batch is None else batch
        return batch

    def _keep_company(self, batch: Any, steps: int) -> None:
        """Steps whose results nobody sees."""
        trainer, strategy, module = self._trainer, self.strategy, self.strategy.lightning_module
        assert module is not None
        name = "test_step" if trainer.testing else "predict_step" if trainer.predicting else "validation_step"
        several = len(tree_leaves(trainer.val_dataloaders)) > 1 if name == "validation_step" else False
        metrics = [m for m in module.modules() if isinstance(m, Metric) and m._update_count == 0]
        arguments = {"batch_idx": 0, "dataloader_idx": 0}
        parameters = inspect.signature(getattr(module, name)).parameters
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = strategy.batch_to_device(batch)
        for _ in range(steps):
            if name != "predict_step":
                trainer._logger_connector.on_batch_start(batch, 0 if several else None)
            call._call_strategy_hook(trainer, name, batch, *(v for k, v in arguments.items() if k in parameters))
        if name != "predict_step":
            trainer._results.reset()
            for logged in trainer._results.values():
                # Lightning leaves out of the reduction what was reset and not logged again.
                logged.has_reset = False
        for metric in metrics:
            metric.reset()
