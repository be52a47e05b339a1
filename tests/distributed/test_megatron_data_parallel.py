"""Megatron's data parallel and distributed optimizer against torch's: on GPUs, and with `torch.cuda` faked on CPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR
from torch.overrides import TorchFunctionMode

from genrec.models.optim import CombinedOptimizer
from genrec.parallel import checkpoint, megatron
from genrec.parallel.parallelize import parallelize, shard_dims
from genrec.parallel.precision import HybridPrecision
from tests.distributed.ranks import run_ranks
from tests.distributed.test_tensor_parallel import FORMS, Model, shares

PRELOAD = ["megatron.core.tensor_parallel", "genrec.parallel.parallelize"]
RATE, DECAY, MAX_NORM = 0.02, 0.9, 0.5


class FakeCuda(TorchFunctionMode):
    """The CPU as far as Megatron asks whether it is a GPU. For a process that ends with the test."""

    def __enter__(self) -> Any:
        cpu, kind = torch.device("cpu"), torch.Tensor.type
        torch.cuda.current_device = lambda: cpu
        torch.Tensor.type = lambda self, *args: kind(self, *args) if args else f"torch.cuda.{kind(self).split('.')[-1]}"
        torch.Tensor.cuda = lambda self: self
        # Only where the wrapper looks: layers on the CPU go on as such.
        torch.Tensor.is_cuda = property(lambda self: "_data_parallel" in sys._getframe(1).f_code.co_filename)
        return super().__enter__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


class Training:
    """A model with two parameter groups and a schedule, clipped, on this rank's share of each batch."""

    def __init__(self, size: int, dense: str, device: str) -> None:
        torch.manual_seed(3)
        self.model = Model(**FORMS["production, all"]).float().to(device)
        if size > 1:
            parallelize(self.model)
        self.wrapper = megatron.wrap_data_parallel(self.model, set(), dense)
        parameters = list(self.model.parameters())
        adamw = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=RATE,
        )
        self.optimizer = CombinedOptimizer({"dense": adamw})
        self.schedule = ExponentialLR(self.optimizer, DECAY)
        if dense == "megatron":
            megatron.distribute_optimizer(self.optimizer, self.wrapper)
        (self.spread,) = megatron.distributed_parts([self.optimizer]) or (None,)
        share = shares(2)[megatron.data_parallel_rank()]
        tensors = {name: value.to(device) for name, value in vars(share).items() if isinstance(value, Tensor)}
        self.batch = replace(share, **{**tensors, "x": tensors["x"].float()})

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            for last in (False, True):
                with nullcontext() if last else self.wrapper.no_sync():
                    loss = self.wrapper(self.batch) / 2
                    loss.backward()
            losses.append(2 * float(loss))
            # As the Trainer clips.
            HybridPrecision().clip_grad_by_norm(self.optimizer, MAX_NORM)
            if self.spread is not None:
                with pytest.raises(ValueError, match="by norm alone"):
                    HybridPrecision().clip_grad_by_value(self.optimizer, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
        return losses


def _compare(rank: int, world_size: int, size: int, device: str, folder: str) -> dict[str, float]:
    megatron.initialize(size)
    plain = Training(size, "torch", device)
    expected = plain.run(6)
    megatron.destroy()
    with FakeCuda() if device == "cpu" else nullcontext():
        megatron.initialize(size, dense="megatron")
        spread = Training(size, "megatron", device)
        losses = spread.run(3)
        dims = shard_dims(spread.model)
        checkpoint.save(folder, {}, spread.model, [spread.optimizer], shard_dims=dims)
        rates = spread.schedule.state_dict()
        losses += spread.run(3)
        spread.spread.collect_state()

        resumed = Training(size, "megatron", device)
        checkpoint.load(folder, resumed.model, [resumed.optimizer], shard_dims=dims)
        resumed.schedule.load_state_dict(rates)
        for group, other in zip(resumed.optimizer.param_groups, spread.optimizer.param_groups, strict=True):
            group["lr"] = rates["_last_lr"][0]
            assert other["lr"] == pytest.approx(RATE * DECAY**6)
        again = resumed.run(3)
        megatron.destroy()
    pairs = list(zip(plain.model.parameters(), spread.model.parameters(), strict=True))
    return {
        "losses": max(abs(a - b) for a, b in zip(expected, losses, strict=True)),
        "weights": max(float((a - b).abs().max()) for a, b in pairs),
        "moments": max(
            float((plain.optimizer.state[a][m].cpu() - spread.optimizer.state[b][m]).abs().max())
            for a, b in pairs for m in ("exp_avg", "exp_avg_sq")
        ),
        "steps": sum(abs(float(spread.optimizer.state[b]["step"]) - 6) for _, b in pairs),
        "resumed losses": max(abs(a - b) for a, b in zip(losses[3:], again, strict=True)),
        "resumed weights": max(
            float((a - b).abs().max())
            for a, b in zip(resumed.model.parameters(), spread.model.parameters(), strict=True)
        ),
    }  # fmt: skip


def check(results: list[dict[str, float]]) -> None:
    for result in results:
        assert result["losses"] < 1e-5
        assert result["weights"] < 1e-5
        assert result["moments"] < 1e-5
        assert result["steps"] == 0
        assert result["resumed losses"] == 0.0
        assert result["resumed weights"] == 0.0


@pytest.mark.parametrize(("world_size", "size"), [(2, 1), (4, 2)])
def test_megatron_with_faked_cuda_trains_and_resumes_as_torch_does(world_size, size, tmp_path):
    check(run_ranks(_compare, world_size, size, "cpu", f"{tmp_path}/saved", preload=PRELOAD))


@pytest.mark.gpu
@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_megatron_on_gpus_trains_and_resumes_as_torch_does(world_size, size, tmp_path):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    check(run_ranks(_compare, world_size, size, "cuda", f"{tmp_path}/saved", preload=PRELOAD, backend="nccl"))


def test_megatron_names_what_it_can_not_train(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        megatron.initialize(1, dense="megatron")
        with pytest.raises(ValueError, match=r"'weight' is torch.float32 on cpu: set dense='torch'"):
            megatron.wrap_data_parallel(torch.nn.Linear(2, 2), set(), "megatron")
    finally:
        megatron.destroy()
        torch.distributed.destroy_process_group()
