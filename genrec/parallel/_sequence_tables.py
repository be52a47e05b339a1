"""Sharded sequence tables that give the GPU enough to do: TorchRec's, with each sequence looked up in pieces.

FBGEMM's kernels go over the ids of a sequence (its bag) one after the other, with one warp. Sequences of thousands of
ids are few bags, and the lookup takes milliseconds with most of the GPU idle. The embeddings of a sequence's ids are
independent of each other, so a bag may be cut anywhere: ids, their order and the embeddings stay as they are, only
the lengths are told of more, shorter bags, and added up again behind the lookup.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

PIECES = 32
"""Into how many pieces a sequence is cut: 64 sequences of 2,000 ids become enough bags for all multiprocessors."""


def cut_lengths(lengths: Tensor, pieces: int) -> Tensor:
    """(n,) lengths -> (n * pieces,): those of each one's pieces in turn, as even as can be."""
    part = torch.arange(pieces, dtype=lengths.dtype, device=lengths.device)
    return ((lengths[:, None] + part) // pieces).flatten()


def cut(features: KeyedJaggedTensor, pieces: int) -> KeyedJaggedTensor:
    """The same ids in `pieces` bags for each one; stride B * pieces."""
    return KeyedJaggedTensor(
        features.keys(), features.values(), features.weights_or_none(),
        lengths=cut_lengths(features.lengths(), pieces), stride=features.stride() * pieces,
        length_per_key=features.length_per_key_or_none(),
    )  # fmt: skip


def joined(found: dict[str, JaggedTensor], pieces: int) -> dict[str, JaggedTensor]:
    """The embeddings of what was cut, with the lengths of whole sequences."""
    return {
        name: JaggedTensor(part.values(), lengths=part.lengths().view(-1, pieces).sum(1))
        for name, part in found.items()
    }


class PiecewiseEmbeddingCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection; features whose batch sizes differ (variable stride) are not cut.

    Attributes:
        pieces: For each sequence; 1 for none.
    """

    pieces: int = 1

    def input_dist(self, ctx: Any, features: Any) -> Any:
        """As TorchRec's."""
        whole = not isinstance(features, KeyedJaggedTensor) or features.variable_stride_per_key()
        ctx.pieces = 1 if whole else self.pieces
        return super().input_dist(ctx, features if ctx.pieces == 1 else cut(features, ctx.pieces))

    def compute_and_output_dist(self, ctx: Any, input: Any) -> Any:
        """As TorchRec's."""
        return self._joined(ctx, super().compute_and_output_dist(ctx, input))

    def output_dist(self, ctx: Any, output: Any) -> Any:
        """As TorchRec's."""
        return self._joined(ctx, super().output_dist(ctx, output))

    @staticmethod
    def _joined(ctx: Any, awaitable: Any) -> Any:
        if ctx.pieces > 1:
            awaitable.callbacks.append(partial(joined, pieces=ctx.pieces))
        return awaitable


class SequenceTableSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of `EmbeddingCollection`, for lookups in pieces.

    Args:
        pieces: For each sequence; None: `PIECES` on a GPU and none on a CPU, whose threads share out the ids anyway.
        fused_params: Of FBGEMM's tables, as TorchRec's sharder takes them.
    """

    def __init__(self, pieces: int | None = None, fused_params: dict[str, Any] | None = None) -> None:
        super().__init__(fused_params)
        self.pieces = pieces

    def shard(
        self, module: Any, params: Any, env: Any, device: torch.device | None = None, module_fqn: Any = None
    ) -> Any:
        """As TorchRec's."""
        sharded = PiecewiseEmbeddingCollection(
            module, params, env, self.fused_params, device, qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )  # fmt: skip
        on_gpu = device is not None and device.type == "cuda"
        sharded.pieces = self.pieces if self.pieces is not None else (PIECES if on_gpu else 1)
        return sharded
