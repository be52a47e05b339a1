"""Small batches and loaders for tests of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.data.batch import SequenceBatch

DAY = 86_400


def kjt(features: dict[str, Sequence[Sequence[int]]]) -> KeyedJaggedTensor:
    """Features by name, a list of ids for each sequence."""
    values = [i for lists in features.values() for ids in lists for i in ids]
    lengths = [len(ids) for lists in features.values() for ids in lists]
    return KeyedJaggedTensor(
        list(features), torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths, dtype=torch.int64)
    )


def retrieval_batch(
    sequences: Sequence[Sequence[int]],
    *,
    targets: Sequence[int] | None = None,
    max_seqlen: int | None = None,
    extra: dict[str, Sequence[Sequence[int]]] | None = None,
    users: Sequence[int] | None = None,
    timed: bool = True,
) -> SequenceBatch:
    """Histories. Labels are the next items; with `targets` only the last row has one, that target."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = []
    for number, ids in enumerate(sequences):
        following = [*ids[1:], -1] if targets is None else [-1] * (len(ids) - 1) + [targets[number]]
        labels += following if ids else []
    times = torch.tensor([DAY * i for ids in sequences for i in range(len(ids))])
    return SequenceBatch(
        features=kjt({"item": sequences, **(extra or {})}),
        seq_offsets=offsets,
        max_seqlen=max_seqlen or int(lengths.max()),
        timestamps=times if timed else None,
        query_timestamps=times + DAY if timed else None,
        labels=torch.tensor(labels, dtype=torch.int64),
        user_ids=None if users is None else torch.tensor(users),
    )


def ranking_batch(
    sequences: Sequence[Sequence[int]],
    actions: Sequence[Sequence[int]],
    num_targets: Sequence[int],
    labels: Tensor,
    *,
    extra: dict[str, Sequence[Sequence[int]]] | None = None,
    users: Sequence[int] | None = None,
) -> SequenceBatch:
    """Histories that end with candidates; `labels` is (candidates, tasks)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    times = torch.tensor([DAY * i for ids in sequences for i in range(len(ids))])
    return SequenceBatch(
        features=kjt({"item": sequences, "action": actions, **(extra or {})}),
        seq_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        max_seqlen=int(lengths.max()),
        timestamps=times,
        query_timestamps=times,
        num_targets=torch.tensor(num_targets),
        labels=labels.float(),
        user_ids=torch.tensor(users if users is not None else range(len(sequences))),
    )


def loader(batches: Sequence[SequenceBatch]) -> DataLoader:
    """A loader that yields these batches in order."""
    return DataLoader(list(batches), batch_size=None)


def markov_sequences(users: int, items: int, length: int, seed: int = 0) -> list[list[int]]:
    """Walks over items: mostly i -> (3 i + 1) mod items, else a popular item (item ids skewed to small ones)."""
    generator = torch.Generator().manual_seed(seed)
    walks = []
    for _ in range(users):
        item, walk = int(torch.randint(items, (), generator=generator)), []
        for _ in range(length):
            walk.append(item)
            noise, jump = torch.rand(2, generator=generator).tolist()
            item = (3 * item + 1) % items if noise < 0.8 else int(items * jump**2)
        walks.append(walk)
    return walks
