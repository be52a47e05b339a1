"""From plain lists to a `SequenceBatch`: what `recommend` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.layers.preprocess import PreprocessorConfig

Ids = Sequence[int] | Tensor
History = Sequence[Ids] | Mapping[str, Sequence[Ids] | Sequence[int]]


def batch_from_history(
    history: History, config: PreprocessorConfig, max_seqlen: int, seen_key: str | None = None
) -> SequenceBatch:
    """A batch without labels or candidates.

    Args:
        history: Item ids of each user, oldest first; or a dict of such lists by feature. "timestamps" holds those of
            the events, "query_timestamps" one for each user. A contextual feature has an id or None for each user.
        config: Names the features.
        max_seqlen: The newest events that are kept.
        seen_key: Key under which all items of a history are put too, the cut-off ones included.

    Raises:
        ValueError: A feature is missing, or its lists have other lengths than the items'.
    """
    given: dict[str, Sequence] = dict(history) if isinstance(history, Mapping) else {config.item_feature: history}
    missing = [name for name in config.features if name not in given]
    if missing:
        raise ValueError(
            f"The history lacks {', '.join(missing)}: give a dict with a list for each user under each of "
            f"{', '.join(config.features)}."
        )
    items = [_list(ids) for ids in given[config.item_feature]]
    lengths = [len(ids) for ids in items]
    values: dict[str, list[list[int]]] = {}
    for name in config.features:
        if name in config.contextual_features:
            values[name] = [[] if value is None else [int(value)] for value in given[name]]
        else:
            values[name] = [ids[-max_seqlen:] for ids in _like(name, given[name], lengths)]
    if seen_key is not None:
        values[seen_key] = items
    kept = [min(length, max_seqlen) for length in lengths]
    times = asked = None
    if "timestamps" in given:
        happened = [ids[-max_seqlen:] for ids in _like("timestamps", given["timestamps"], lengths)]
        times = _tensor(happened)
        requests = given.get("query_timestamps", [row[-1] if row else 0 for row in happened])
        asked = _tensor([[*row[1:], int(request)] for row, request in zip(happened, requests, strict=True) if row])
    return SequenceBatch(
        features=KeyedJaggedTensor(
            list(values),
            torch.cat([_tensor(lists) for lists in values.values()]),
            lengths=torch.tensor([len(ids) for lists in values.values() for ids in lists], dtype=torch.int64),
        ),
        seq_offsets=torch.tensor([0, *kept]).cumsum(0),
        max_seqlen=max(kept, default=0),
        timestamps=times,
        query_timestamps=asked,
    )


def _like(name: str, lists: Sequence[Ids], lengths: list[int]) -> list[list[int]]:
    plain = [_list(ids) for ids in lists]
    if [len(ids) for ids in plain] != lengths:
        raise ValueError(f"'{name}' must have as many values as items for each user.")
    return plain


def _list(ids: Ids) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]


def _tensor(lists: list[list[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
