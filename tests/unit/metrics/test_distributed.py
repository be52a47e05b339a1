"""Metrics of two gloo processes are those of one that saw everything, also where one of them saw nothing."""

import os
import tempfile

import torch
import torch.multiprocessing as mp

from genrec.metrics import AUC, GAUC, HitRate, NormalizedEntropy, Recall, TaskMetrics, retrieval_metrics


def data():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, generator=generator).mul(4).round()
    labels = torch.randint(0, 2, (200,), generator=generator)
    # Above 2^24, so that a trip through float32 would change them.
    users = torch.randint(0, 12, (200,), generator=generator) + 2**40
    ranks = torch.randint(0, 30, (200,), generator=generator)
    return logits, labels, users, ranks


def evaluate(part):
    logits, labels, users, ranks = (column[part] for column in data())
    metrics = {"auc": AUC(), "gauc": GAUC(), "ne": NormalizedEntropy(), "hr": HitRate(10), "recall": Recall(10)}
    tasks, collection = TaskMetrics({"like": "binary"}), retrieval_metrics([5, 10])
    if len(ranks):
        metrics["auc"].update(logits, labels)
        metrics["gauc"].update(logits, labels, users)
        metrics["ne"].update(logits, labels)
        metrics["hr"].update(ranks)
        metrics["recall"].update(ranks)
        tasks.update("like", logits, labels, users)
        collection.update(ranks)
    values = {name: metric.compute() for name, metric in metrics.items()} | tasks.compute() | collection.compute()
    return {name: value.item() for name, value in values.items()}


def worker(rank, store, split, out):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = slice(0, split) if rank == 0 else slice(split, None)
    values = {split: evaluate(part), "empty rank": evaluate(slice(0, None) if rank == 0 else slice(200, None))}
    torch.save(values, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one():
    expected = evaluate(slice(None))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store", 61, folder), nprocs=2)
        for rank in range(2):
            got = torch.load(f"{folder}/{rank}.pt")
            assert got == {61: expected, "empty rank": expected}
