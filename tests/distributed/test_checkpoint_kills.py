"""Saves that are cut off: by SIGKILL at random moments, and before every single operation on the file system."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genrec.embedding.config import EmbeddingTableConfig
from genrec.embedding.hkv import DynamicEmbeddingCollection
from genrec.parallel import checkpoint

ROUNDS = 20


class Model(nn.Module):
    """All its numbers are the step; the dynamic table has as many keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        table = EmbeddingTableConfig("shop", 4, ["shop"], backend="hkv", capacity=1024)
        self.tables = DynamicEmbeddingCollection([table], seed=1)
        self.optimizer = torch.optim.AdamW(self.layers.parameters())

    @torch.no_grad()
    def set_step(self, step: int) -> None:
        for parameter in self.layers.parameters():
            parameter.fill_(step)
            zeros = torch.full_like(parameter, step)
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": zeros, "exp_avg_sq": zeros}
        self.tables.group.train()
        self.tables.group.embed("shop", torch.arange(step))

    def save(self, path: Path, step: int, **options: Any) -> None:
        self.set_step(step)
        checkpoint.save(path, {"global_step": step}, self, [self.optimizer], **options)

    def load(self, path: Path) -> int:
        """The step of a checkpoint, all of which must be of that step."""
        step = checkpoint.load(path, self, [self.optimizer])["global_step"]
        values: list[Tensor] = [p.detach() for p in self.layers.parameters()]
        values += [value for state in self.optimizer.state.values() for value in state.values()]
        assert all(bool((value == step).all()) for value in values)
        assert len(self.tables.tables["shop"]) == step
        return step


def _save_on_and_on(rank: int, port: int, folder: str, first: int) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = Model()
    for step in range(first, 10**6):
        # Every third in the background, while the next step's numbers are being written into the model.
        model.save(Path(folder) / "last.ckpt", step, async_save=step % 3 == 0)
        if rank == 0 and step % 3:
            (Path(folder) / "done.part").write_text(str(step))
            os.replace(Path(folder) / "done.part", Path(folder) / "done")


def test_whatever_moment_a_rank_is_killed_at_the_last_checkpoint_loads(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genrec.parallel.checkpoint", "genrec.embedding.hkv", "tests.distributed.ranks"])
    draw, done, step, steps = random.Random(0), tmp_path / "done", 0, []
    for _ in range(ROUNDS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [
            context.Process(target=_save_on_and_on, args=(rank, port, str(tmp_path), step + 1)) for rank in range(2)
        ]
        done.unlink(missing_ok=True)
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 200
        while not done.exists():
            assert time.monotonic() < deadline, "no save has finished"
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        victim = draw.randrange(2)
        for rank in (ranks[victim], ranks[1 - victim]):
            rank.kill()
        for rank in ranks:
            rank.join()
        assert ranks[victim].exitcode == -signal.SIGKILL
        known, step = int(done.read_text()), Model().load(tmp_path / "last.ckpt")
        assert step >= known
        steps.append(step)
    assert steps == sorted(set(steps))


class Disk:
    """Python's audit events of a folder's file system: lets so many operations through and fails all that follow.

    To what is on the disk that is a process that dies before an operation, and much faster than one that does.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")

    def __init__(self, folder: Path) -> None:
        self.folder, self.left, self.done = str(folder), None, 0  # type: ignore[var-annotated]
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left is None or event not in self.EVENTS or self.folder not in str(arguments[0]):
            return
        if self.done == self.left:
            raise OSError("cut off")
        self.done += 1

    @contextlib.contextmanager
    def cut_off_after(self, operations: int) -> Iterator[None]:
        self.left, self.done = operations, 0
        try:
            yield
        finally:
            self.left = None


def test_a_save_cut_off_before_any_operation_leaves_the_previous_one_or_is_complete(tmp_path: Path) -> None:
    """A file may still be cut off in its middle: none counts before all are closed and listed."""
    path, disk, outcomes = tmp_path / "last.ckpt", Disk(tmp_path), []
    Model().save(path, 1)
    while True:
        with disk.cut_off_after(len(outcomes)), contextlib.suppress(RuntimeError, OSError):
            Model().save(path, 2)
        finished = disk.done < len(outcomes)
        outcomes.append(Model().load(path))
        if finished:
            break
        if outcomes[-1] == 2:
            Model().save(path, 1)
    assert len(outcomes) > 15
    # It flips once: everything before is the old one, everything after the new one.
    flip = outcomes.index(2)
    assert outcomes == [1] * flip + [2] * (len(outcomes) - flip)
    assert len(list(path.iterdir())) == 2
