"""`run_ranks`: a function in each of several gloo processes. One call costs seconds: put many checks into it."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torchrec.distributed.model_parallel", "genrec.embedding.hkv.sharding", "genrec.models"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, preload: Sequence[str] = (), backend: str = "gloo"
) -> list[Any]:
    """`function(rank, world_size, *arguments)` in each of so many processes; their results by rank.

    Args:
        function: Of a module that the processes can import.
        world_size: Processes.
        arguments: More of its arguments.
        preload: Modules that are imported once for all processes.
        backend: "gloo", or "nccl" with a GPU for each rank.

    Raises:
        AssertionError: A rank failed; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *preload])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(queue, function, rank, world_size, port, backend, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = queue.get(timeout=500)
            if error is not None:
                raise AssertionError(f"rank {rank}: {error}")
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=30 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank_main(queue: Any, function: Any, rank: int, world_size: int, port: int, backend: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        # As bytes: tensors would travel through files that go with this process.
        result = io.BytesIO()
        torch.save(function(rank, world_size, *arguments), result)
        queue.put((rank, result.getvalue(), None))
    except BaseException as error:
        queue.put((rank, None, f"{error}\n{traceback.format_exc()}"))
    finally:
        dist.destroy_process_group()
