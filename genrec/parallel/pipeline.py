"""TorchRec's train pipelines, driven one batch at a time from `training_step`.

Lightning's loop stays in charge: it takes a batch, calls the step, counts, validates, saves. The pipeline reads the
same stream of batches further ahead. A step of the loop runs `pipeline.progress()`, which calls back for the module's
own `training_step` and for Lightning's backward pass; Lightning itself then skips its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from genrec.callbacks import StepSeed

if TYPE_CHECKING:
    from genrec.parallel.strategy import HybridParallelStrategy


@dataclass
class PreparedBatch:
    """A batch that has been through the transfer hooks before Lightning's loop takes it.

    Attributes:
        batch: On the device.
        random_state: torch's after the hooks, with which its step goes on; None where nobody seeds steps.
        position: Of the loader after this batch, for checkpoints; None where it has none.
    """

    batch: Any
    random_state: Tensor | None = None
    position: Any = None


class Lookahead:
    """One stream of batches with two readers: `take` for the loop, the iterator itself for the pipeline, ahead of it.

    Args:
        source: Of prepared batches.
    """

    def __init__(self, source: Iterator[PreparedBatch]) -> None:
        self._source = source
        self._for_loop: deque[PreparedBatch] = deque()
        self._for_pipeline: deque[PreparedBatch] = deque()
        self._started: deque[PreparedBatch] = deque()

    def _pull(self) -> None:
        prepared = next(self._source)
        self._for_loop.append(prepared)
        self._for_pipeline.append(prepared)

    def take(self) -> Iterator[PreparedBatch]:
        """Batches for the loop."""
        while True:
            if not self._for_loop:
                try:
                    self._pull()
                except StopIteration:
                    return
            yield self._for_loop.popleft()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._for_pipeline:
            self._pull()
        prepared = self._for_pipeline.popleft()
        self._started.append(prepared)
        return prepared.batch

    def next_step(self) -> PreparedBatch:
        """The batch whose step the pipeline runs now."""
        return self._started.popleft()


class StepPipeline:
    """A pipeline of TorchRec's in the place of the strategy's training step.

    Args:
        strategy: With its trainer in `fit`.
        kind: "base" or "sparse_dist".
        run_step: (batch, further arguments) -> the output of the module's `training_step`.
    """

    def __init__(self, strategy: HybridParallelStrategy, kind: str, run_step: Callable[..., Any]) -> None:
        assert strategy.lightning_module is not None
        self.strategy, self.kind, self.run_step = strategy, kind, run_step
        self.trainer: Any = strategy.lightning_module.trainer
        self.lookahead: Lookahead | None = None
        self._arguments: tuple[Any, ...] = ()
        self._output: Any = None
        self._batch_idx = 0
        self._pipeline: Any = (_SparseDist if kind == "sparse_dist" else _Base)(self, strategy)

    def read(self, source: Iterator[Any]) -> Iterator[PreparedBatch]:
        """Batches for Lightning's loop out of the raw ones of an epoch."""
        self.lookahead = Lookahead(self._prepared(source))
        return self.lookahead.take()

    def _prepared(self, source: Iterator[Any]) -> Iterator[PreparedBatch]:
        seeds = next((c for c in self.trainer.callbacks if isinstance(c, StepSeed)), None)
        loader = self.trainer.train_dataloader
        for number, raw in enumerate(source, seeds.batches if seeds else 0):
            with torch.random.fork_rng([], enabled=seeds is not None):
                if seeds is not None:
                    # What the hooks draw is a function of the batch's number, not of how far ahead it is read.
                    torch.default_generator.manual_seed(seeds.seed_of(self.trainer, number))
                batch = self._through_hooks(raw)
                state = torch.get_rng_state() if seeds is not None else None
            yield PreparedBatch(batch, state, loader.source_position())

    def _through_hooks(self, raw: Any) -> Any:
        module = self.strategy.lightning_module
        assert module is not None
        raw = self.trainer.precision_plugin.convert_input(raw)
        raw = module._on_before_batch_transfer(raw, dataloader_idx=0)
        return self.strategy.batch_to_device(raw)

    def step(self, batch_idx: int, arguments: tuple[Any, ...]) -> Any:
        """One batch: forward and backward pass. Returns the output of the module's `training_step`."""
        self._batch_idx, self._arguments = batch_idx, arguments
        self._pipeline.progress(self.lookahead)
        return self._output

    def forward(self, batch: Any) -> tuple[Tensor, None]:
        """The module's step, as TorchRec's pipelines call it: its loss for the backward pass."""
        assert self.lookahead is not None
        state = self.lookahead.next_step().random_state
        if state is not None:
            torch.set_rng_state(state)
        self._output = output = self.run_step(batch, *self._arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise ValueError("With a pipeline, training_step must return a loss for every batch.")
        return loss / self.trainer.accumulate_grad_batches, None

    def backward(self, loss: Tensor) -> None:
        """Lightning's: zero the gradients where a step begins, then its backward pass with its hooks."""
        loop, optimizer = self.trainer.fit_loop.epoch_loop.automatic_optimization, self.trainer.optimizers[0]
        if self._batch_idx % self.trainer.accumulate_grad_batches == 0:
            loop._on_before_zero_grad(optimizer)
            loop._optimizer_zero_grad(self._batch_idx, optimizer)
        call._call_strategy_hook(self.trainer, "backward", loss, optimizer)

    def pause(self) -> None:
        """Let the module run by itself; batches under way are kept."""
        if self.kind == "sparse_dist":
            self._pipeline.detach()

    def resume(self) -> None:
        """Take up the batches under way again."""
        if self.kind == "sparse_dist":
            # Their ids are exchanged already.
            self._pipeline.attach(sparse_dist=False)


class _NoOptimizer:
    """Lightning zeroes gradients and steps."""

    def zero_grad(self) -> None:
        pass

    def step(self) -> None:
        pass


class _SparseDist(TrainPipelineSparseDist):
    def __init__(self, steps: StepPipeline, strategy: HybridParallelStrategy) -> None:
        super().__init__(
            strategy.lightning_module, _NoOptimizer(), strategy.root_device, custom_model_fwd=steps.forward
        )
        self._steps = steps

    def _backward(self, losses: Tensor) -> None:
        self._steps.backward(losses)


class _Base(TrainPipelineBase):
    def __init__(self, steps: StepPipeline, strategy: HybridParallelStrategy) -> None:
        super().__init__(_Step(steps), _NoOptimizer(), strategy.root_device)
        self._steps = steps

    def _backward(self, losses: Tensor) -> None:
        self._steps.backward(losses)

    def progress(self, dataloader_iter: Any) -> Any:
        if dataloader_iter is not getattr(self, "_reading", None):
            self.reset()
            self._reading = dataloader_iter
        return super().progress(dataloader_iter)


class _Step(nn.Module):
    def __init__(self, steps: StepPipeline) -> None:
        super().__init__()
        self.forward = steps.forward  # type: ignore[method-assign]
