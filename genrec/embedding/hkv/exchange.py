"""What travels between the ranks of sharded dynamic tables: keys to their owners, rows back.

The exchanges are TorchRec's own; which rank a key goes to, `KeyDist` asks `owner_rank`, as load and export do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Multistreamable

from genrec.embedding.hkv.state import owner_rank


@dataclass
class DynamicShardingContext(Multistreamable):
    """What a batch's way back needs: one TorchRec context for each exchange, and the keys of this rank's own batch."""

    sharding_contexts: list[Any] = field(default_factory=list)
    features: list[KeyedJaggedTensor] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors."""
        for context in self.sharding_contexts:
            context.record_stream(stream)
        for features in self.features:
            features.record_stream(stream)


class KeyDist(RwSparseFeaturesDist):
    """TorchRec's row-wise exchange of ids, with each key sent to the rank that `owner_rank` names.

    Args:
        pg: Of the ranks.
        num_features: Features of a batch.
        is_sequence: Whether rows come back one by one, not pooled.
    """

    def __init__(self, pg: dist.ProcessGroup, num_features: int, is_sequence: bool) -> None:
        # Blocks of one id each: what TorchRec would divide among the ranks are the ranks' own numbers.
        super().__init__(pg, num_features, [pg.size()] * num_features, is_sequence=is_sequence)

    def forward(self, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Keys on their way to their owners, each rank's in the order of the batch."""
        keys = features.values()
        owners = KeyedJaggedTensor(
            features.keys(), owner_rank(keys, self._world_size), features.weights_or_none(),
            lengths=features.lengths(), stride=features.stride(),
        )  # fmt: skip
        routed, place = bucketize_kjt_before_all2all(
            owners, num_buckets=self._world_size, block_sizes=self._feature_block_sizes_tensor, output_permute=True
        )
        assert place is not None
        self.unbucketize_permute_tensor = place if self._is_sequence else None
        routed = KeyedJaggedTensor(
            routed.keys(), torch.empty_like(keys).scatter_(0, place.to(torch.int64), keys), routed.weights_or_none(),
            lengths=routed.lengths(), stride=features.stride(),
        )  # fmt: skip
        return self._dist(routed)


class SequenceAwaitable(LazyAwaitable[dict[str, JaggedTensor]]):
    """Rows of every feature, once they have come."""

    def __init__(self, rows: list[Awaitable[Tensor]], features: list[KeyedJaggedTensor]) -> None:
        super().__init__()
        self._rows, self._features = rows, features

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        out: dict[str, JaggedTensor] = {}
        for awaitable, features in zip(self._rows, self._features, strict=True):
            sizes = features.length_per_key()
            for name, values in zip(features.keys(), awaitable.wait().split(sizes), strict=True):
                out[name] = JaggedTensor(values, lengths=features[name].lengths())
        return out


class PooledAwaitable(LazyAwaitable[KeyedTensor]):
    """Pooled rows of every feature, once they have come."""

    def __init__(
        self, values: Awaitable[Tensor], features: KeyedJaggedTensor, dims: list[int], pooling: Sequence[str]
    ) -> None:
        super().__init__()
        self._values, self._features, self._dims, self._pooling = values, features, dims, pooling

    def _wait_impl(self) -> KeyedTensor:
        values = self._values.wait()
        if "mean" in self._pooling:
            lengths = self._features.lengths().view(len(self._dims), -1).clamp(min=1)
            columns = [
                part / count.unsqueeze(1) if pooling == "mean" else part
                for part, count, pooling in zip(values.split(self._dims, 1), lengths, self._pooling, strict=True)
            ]
            values = torch.cat(columns, dim=1)
        return KeyedTensor(self._features.keys(), self._dims, values)


def select_features(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Some of the features, in this order.

    Raises:
        KeyError: One is missing.
    """
    present = features.keys()
    if present == names:
        return features
    missing = [name for name in names if name not in present]
    if missing:
        raise KeyError(f"Dynamic tables look up the features {missing}, but the batch has {present}.")
    return features.permute([present.index(name) for name in names])
