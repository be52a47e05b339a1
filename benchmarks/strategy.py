"""Time of HybridParallelStrategy beside a loop of one's own with TorchRec and DDP, alternating, on gloo processes.

    python benchmarks/strategy.py

Both train the same HSTURanking on the same batches: row-wise tables (RowWiseAdagrad), AdamW for the dense part,
torch's DistributedDataParallel, the loss divided by the labels of all ranks. The loop does nothing else; the strategy
runs under lightning.Trainer with logging and callbacks as they come (no logger, no checkpoints, no progress bar).

"CPU" is the processor time of the first rank's process, which other processes on the machine hardly change; the time by
the clock they do. The overhead is the median over the rounds of each round's ratio to the loop.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from typing import Any

WARM_UP = 3


class Sizes(argparse.Namespace):
    """Of the model and of a batch."""

    batch: int
    events: int
    hidden: int
    layers: int
    items: int


def make_model(sizes: Sizes) -> Any:
    import torch

    from genrec.models import HSTURanking, Task

    torch.manual_seed(0)
    return HSTURanking(
        sizes.items, [Task("click"), Task("like")], action_feature="action", num_actions=4, hidden_dim=sizes.hidden,
        num_layers=sizes.layers, num_heads=4, max_seqlen=sizes.events, table_optimizer="rowwise_adagrad",
        table_learning_rate=0.01,
    )  # fmt: skip


def make_batches(sizes: Sizes, rank: int, count: int) -> list[Any]:
    """Histories of `events` / 2 to `events` events, the last 10 of which are candidates."""
    import torch
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from genrec.data.batch import SequenceBatch

    batches = []
    for number in range(count):
        draw = torch.Generator().manual_seed(1000 * number + rank)
        lengths = torch.randint(sizes.events // 2, sizes.events + 1, (sizes.batch,), generator=draw)
        rows = int(lengths.sum())
        items = torch.randint(sizes.items, (rows,), generator=draw)
        actions = torch.randint(4, (rows,), generator=draw)
        batches.append(
            SequenceBatch(
                features=KeyedJaggedTensor(["item", "action"], torch.cat([items, actions]), lengths=lengths.repeat(2)),
                seq_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
                max_seqlen=sizes.events,
                timestamps=torch.arange(rows) * 3600,
                query_timestamps=torch.arange(rows) * 3600,
                num_targets=torch.full((sizes.batch,), 10),
                labels=torch.randint(2, (10 * sizes.batch, 2), generator=draw).float(),
                user_ids=torch.arange(sizes.batch),
            )
        )
    return batches


def now() -> tuple[float, float]:
    """Seconds by the clock, and of this process's processor time."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """What has passed of both."""
    clock, cpu = now()
    return clock - start[0], cpu - start[1]


def raw_loop(sizes: Sizes, batches: list[Any], pipelined: bool) -> tuple[float, float]:
    """Seconds (clock, CPU) of the batches after the warm-up, in a loop with TorchRec and DDP."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.distributed.types import ShardedModule, ShardingEnv
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    from genrec.models.losses import LossSum

    class Step(nn.Module):
        """A batch's loss, divided by the labels of all ranks."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> torch.Tensor:
            losses = self.model.loss(self.model(batch), batch)
            counts = torch.stack([part.count.float() for part in losses.values()])
            dist.all_reduce(counts)
            counts /= dist.get_world_size()
            return torch.stack(
                [LossSum(p.total, c).mean() * p.weight for p, c in zip(losses.values(), counts, strict=True)]
            ).sum()

    model = make_model(sizes)
    for collection in model.tables.static.values():
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size, "cpu"),
        constraints={name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("item", "action")},
    )
    sharder = EmbeddingCollectionSharder()
    DistributedModelParallel(
        model, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"),
        planner.collective_plan(model, [sharder], dist.group.WORLD), [sharder], init_data_parallel=False,
    )  # fmt: skip
    step = Step(model)
    sharded = [
        f"{path}.{name}"
        for path, child in step.named_modules()
        if isinstance(child, ShardedModule)
        for name, _ in child.named_parameters()
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, sharded)
    wrapped = DistributedDataParallel(step, broadcast_buffers=False)
    optimizer = model.configure_optimizers()
    model.train()
    prepared = (model.prepare_batch(batch) for batch in batches)
    started = now()
    if pipelined:

        def forward(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            loss = wrapped(batch)
            return loss, loss.detach()

        pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"), custom_model_fwd=forward)
        for number in range(len(batches)):
            if number == WARM_UP:
                started = now()
            pipeline.progress(prepared)
        return since(started)
    for number, batch in enumerate(prepared):
        if number == WARM_UP:
            started = now()
        loss = wrapped(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return since(started)


def strategy(sizes: Sizes, batches: list[Any], pipeline: str) -> tuple[float, float]:
    """Seconds (clock, CPU) of the same under lightning.Trainer with the strategy."""
    import lightning as L
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    from genrec.parallel import HybridParallelStrategy

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx <= WARM_UP - 1:
                self.started = now()
            self.taken = since(self.started)

    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), max_epochs=1, callbacks=[clock], logger=False,
        strategy=HybridParallelStrategy(sharding="row_wise", pipeline=pipeline),  # type: ignore[arg-type]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(make_model(sizes), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.taken


VARIANTS = {
    "loop": lambda sizes, batches: raw_loop(sizes, batches, pipelined=False),
    "strategy, pipeline none": lambda sizes, batches: strategy(sizes, batches, "none"),
    "loop, TrainPipelineSparseDist": lambda sizes, batches: raw_loop(sizes, batches, pipelined=True),
    "strategy, pipeline sparse_dist": lambda sizes, batches: strategy(sizes, batches, "sparse_dist"),
}
BESIDE = {
    "strategy, pipeline none": "loop",
    "strategy, pipeline sparse_dist": "loop, TrainPipelineSparseDist",
}


def rank_main(queue: Any, rank: int, world_size: int, port: int, sizes: Sizes) -> None:
    """One process: all variants, in turn, `rounds` times."""
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    batches = make_batches(sizes, rank, WARM_UP + sizes.steps)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for turn in range(sizes.rounds + 1):
        # Which comes first changes, and the first turn is thrown away.
        for name in sorted(VARIANTS, reverse=turn % 2 == 1):
            dist.barrier()
            taken = VARIANTS[name](sizes, batches)
            if turn:
                seconds[name].append(taken)
    queue.put((rank, seconds))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, sizes: Sizes) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each round by variant, as the first rank sees them."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(queue, rank, world_size, port, sizes)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64, help="sequences of a batch on each rank")
    parser.add_argument("--events", type=int, default=100, help="longest sequence")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    sizes = parser.parse_args(namespace=Sizes())
    from genrec.environment import headline

    print(headline())
    print(
        f"HSTURanking: {sizes.layers} layers, d={sizes.hidden}, {sizes.events // 2}-{sizes.events} events, "
        f"{sizes.batch} sequences a rank, {sizes.items:,} items; {sizes.rounds} rounds of {sizes.steps} steps; "
        "1 thread a rank, gloo"
    )
    print(f"\n{'ranks':>5}  {'variant':<32}{'ms a step':>18}{'overhead':>10}{'CPU ms a step':>22}{'overhead':>10}")
    for world_size in sizes.worlds:
        seconds = measure(world_size, sizes)
        for name in VARIANTS:
            line = f"{world_size:>5}  {name:<32}"
            for kind in range(2):
                steps = sorted(1e3 * taken[kind] / sizes.steps for taken in seconds[name])
                spread = f"{statistics.median(steps):.1f} ({steps[0]:.1f}-{steps[-1]:.1f})"
                line += f"{spread:>{(18, 22)[kind]}}{overhead(seconds, name, kind):>10}"
            print(line, flush=True)


def overhead(seconds: dict[str, list[tuple[float, float]]], name: str, kind: int) -> str:
    """Beside the loop; of neighbours in time: the machine's own ups and downs touch both."""
    if name not in BESIDE:
        return ""
    ratios = [own[kind] / raw[kind] for own, raw in zip(seconds[name], seconds[BESIDE[name]], strict=True)]
    return f"{100 * (statistics.median(ratios) - 1):+.1f} %"


if __name__ == "__main__":
    main()
