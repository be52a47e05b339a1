"""Small sharded trainings for tests of checkpoints: a model with every kind of table, on ranks or on one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genrec.data.batch import SequenceBatch
from genrec.embedding.hkv.checkpoint import find_tables
from genrec.embedding.hkv.state import table_state
from genrec.models import HSTURetrieval
from genrec.parallel import checkpoint, megatron
from genrec.parallel._state import Shards, model_state, optimizer_pieces
from genrec.parallel.parallelize import parallelize, shard_dims
from tests.helpers import retrieval_batch

ITEMS, CATEGORIES, BATCH = 21, 7, 8


def build(optimizer: str = "adagrad", dynamic: bool = False, **options: Any) -> HSTURetrieval:
    """The same start on every rank and process."""
    torch.manual_seed(0)
    tables = {"shop": {"backend": "hkv", "capacity": 512}} if dynamic else {}
    return HSTURetrieval(
        ITEMS, side_features={"category": CATEGORIES, **({"shop": 50} if dynamic else {})}, hidden_dim=16,
        max_seqlen=8, num_heads=2, dropout=0.0, input_dropout=0.0, table_optimizer=optimizer, learning_rate=0.01,
        table_learning_rate=0.05, embedding_tables=tables, schedule="inverse_sqrt", warmup_steps=3, **options,
    )  # fmt: skip


def batch(step: int, rank: int, world_size: int, dynamic: bool = False) -> SequenceBatch:
    """This rank's sequences of the batch of a step; of one length, so that the mean of the ranks is the global mean."""
    generator = torch.Generator().manual_seed(100 + step)
    items = torch.randint(0, ITEMS, (BATCH, 6), generator=generator)
    rows = items[rank * BATCH // world_size : (rank + 1) * BATCH // world_size].tolist()
    extra = {"category": [[item % CATEGORIES for item in row] for row in rows]}
    if dynamic:
        extra["shop"] = [[item * 2**20 % 37 - 5 for item in row] for row in rows]
    return retrieval_batch(rows, extra=extra, max_seqlen=8)


class Run:
    """A model, its optimizer and scheduler, and a loop. Sharded where there is a process group.

    Args:
        placement: "row_wise", "table_wise" or "column_wise" for the item table (the other one is row-wise); None: not
            sharded.
        optimizer: Of the tables.
        dynamic: Have a dynamic table.
        split: Tensor-parallel size.
    """

    def __init__(
        self, placement: str | None, optimizer: str = "adagrad", dynamic: bool = False, split: int = 1
    ) -> None:  # fmt: skip
        self.model = build(optimizer, dynamic)
        self.dynamic = dynamic
        self.step = 0
        self.dims: dict[str, int] = {}
        if placement is not None:
            if megatron.is_initialized():
                megatron.destroy()
            megatron.initialize(split)
            if split > 1:
                parallelize(self.model)
                self.dims = shard_dims(self.model)
            shard(self.model, placement, optimizer)
        settings: Any = self.model.configure_optimizers()
        self.optimizer, self.scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]

    def train(self, steps: int) -> list[float]:
        """Global losses of some more steps."""
        rank, world = 0, 1
        if dist.is_initialized():
            rank, world = megatron.data_parallel_rank(), megatron.data_parallel_size()
            group = megatron.data_parallel_group()
        self.model.train()
        losses = []
        for _ in range(steps):
            prepared = self.model.prepare_batch(batch(self.step, rank, world, self.dynamic))
            loss, _ = self.model.total_loss(self.model.loss(self.model(prepared), prepared))
            self.optimizer.zero_grad()
            loss.backward()
            if world > 1:
                for parameter in [p for options in self.optimizer.param_groups for p in options["params"]]:
                    dist.all_reduce(parameter.grad, group=group)
                    parameter.grad /= world
                dist.all_reduce(loss.data, group=group)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            losses.append(loss.item() / world)
        return losses

    def checkpoint(self) -> dict[str, Any]:
        """Lightning's dict, as far as it matters here."""
        return {
            "global_step": self.step, "epoch": 0, "lr_schedulers": [self.scheduler.state_dict()],
            "hyper_parameters": dict(self.model.hparams), "pytorch-lightning_version": "2.6.6",
        }  # fmt: skip

    def file(self) -> dict[str, Any]:
        """The checkpoint of one process, as Lightning writes it for strategy "auto"."""
        return {
            **self.checkpoint(), "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
        }  # fmt: skip

    def save(self, path: str, **options: Any) -> None:
        """As a folder."""
        checkpoint.save(path, self.checkpoint(), self.model, [self.optimizer], shard_dims=self.dims, **options)

    def load(self, path: str, **options: Any) -> None:
        """Go on from a folder or a file of strategy "auto"."""
        self.resume(checkpoint.load(path, self.model, [self.optimizer], shard_dims=self.dims, **options))

    def resume(self, saved: Mapping[str, Any], tensors: bool = False) -> None:
        """Take what is in a checkpoint dict; with `tensors` also weights and optimizer states, as Lightning does."""
        if tensors:
            self.model.load_state_dict(saved["state_dict"])
            self.optimizer.load_state_dict(saved["optimizer_states"][0])
        self.scheduler.load_state_dict(saved["lr_schedulers"][0])
        self.step = saved["global_step"]


def shard(model: HSTURetrieval, placement: str, optimizer: str) -> None:
    """Shard the model's tables in place."""
    from torchrec import optim
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    from genrec.embedding.hkv.sharding import add_dynamic_tables, dynamic_sharders

    world = dist.get_world_size()
    (path,) = model.tables.static
    collection = model.tables.static[path]
    classes = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": optim.RowWiseAdagrad}
    options = {"lr": 0.05} if optimizer == "sgd" else {"lr": 0.05, "eps": 1e-8}
    apply_optimizer_in_backward(classes[optimizer], collection.parameters(), options)
    ways = {
        "row_wise": row_wise(), "table_wise": table_wise(rank=world - 1),
        "column_wise": column_wise(ranks=list(range(world))),
    }  # fmt: skip
    ways = {"item": ways[placement], "category": row_wise()}
    sharder = EmbeddingCollectionSharder()
    plan = construct_module_sharding_plan(
        collection, ways, sharder=sharder, world_size=world, local_size=world, device_type="cpu"
    )
    starts = {name: weight.detach().clone() for name, weight in model.tables.named_table_parameters()}
    DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=add_dynamic_tables(ShardingPlan({f"tables.static.{path}": plan}), model, world),
        sharders=[sharder, *dynamic_sharders()],
        init_data_parallel=False,
    )
    for name, start in starts.items():
        weight = model.tables.static[path].state_dict()[f"embeddings.{name}.weight"]
        for piece in weight.local_shards():
            (row, column), (rows, columns) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
            piece.tensor.copy_(start[row : row + rows, column : column + columns])


def holdings(run: Run) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    """Every weight and optimizer state of this rank: boxes (offset, content) by name; dynamic tables' rows as well."""
    shards = Shards()
    if run.dims:
        shards = Shards(run.dims, megatron.tensor_parallel_rank(), megatron.tensor_parallel_size())
    _, pieces, _ = model_state(run.model, shards)
    pieces += optimizer_pieces(run.model, [run.optimizer], shards)
    boxes: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for piece in pieces:
        boxes.setdefault(piece.key, []).append((piece.offset, piece.tensor.clone()))
    for name, table in find_tables(run.model).items():
        state = table_state(table)
        for column in ("keys", "weights", "optimizer", "scores", "steps", "updates"):
            boxes[f"dynamic.{name}.{column}"] = [((-1,), state[column])]
    return boxes


def merged(ranks: list[dict[str, list[tuple[tuple[int, ...], Tensor]]]]) -> dict[str, Tensor]:
    """The whole tensors that the ranks hold together. Ranks that hold the same box must agree."""
    out: dict[str, Tensor] = {}
    for key in sorted({key for held in ranks for key in held}):
        boxes = [box for held in ranks for box in held.get(key, [])]
        if key.startswith("dynamic."):
            keys = torch.cat([held[key.rpartition(".")[0] + ".keys"][0][1] for held in ranks])
            out[key] = torch.cat([content for _, content in boxes])[keys.argsort()]
            continue
        ends = [[start + n for start, n in zip(offset, part.shape, strict=True)] for offset, part in boxes]
        whole = torch.full([max(end) for end in zip(*ends, strict=True)], torch.nan)
        for offset, part in boxes:
            box = tuple(slice(start, start + n) for start, n in zip(offset, part.shape, strict=True))
            assert bool((whole[box].isnan() | (whole[box] == part)).all()), f"{key} differs between ranks"
            whole[box] = part.float()
        assert not whole.isnan().any(), f"no rank holds all of {key}"
        out[key] = whole
    return out
