"""Baselines on the same data, losses, evaluation and metrics: popularity, SASRec, and a DLRM-style perceptron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.layers.preprocess import PreprocessorConfig
from genrec.layers.transformer import SASRecConfig, SASRecStack
from genrec.models.losses import LossSum, Task
from genrec.models.ranking import RankingModel
from genrec.models.retrieval import RetrievalModel, RetrievalOutput, answer_rows
from genrec.models.softmax import full_softmax_loss


class SASRec(RetrievalModel):
    """SASRec (arXiv 1808.09781) with the losses and the evaluation of `HSTURetrieval`.

    Args:
        num_items: V.
        num_layers, num_heads, ffn_dim, activation, norm_first, dropout, attention_dropout: As in `SASRecConfig`.
        options: As in `RetrievalModel`.
    """

    def __init__(
        self,
        num_items: int,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        ffn_dim: int | None = None,
        activation: str = "relu",
        norm_first: bool = True,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        # Its blocks end with a LayerNorm of their own.
        if options.get("output_norm") is None:
            options["output_norm"] = "l2" if options.get("similarity") == "cosine" else "none"
        super().__init__(num_items, **options)
        self.sasrec_config = SASRecConfig(
            self.hidden_dim, num_layers, num_heads, ffn_dim, activation, norm_first, dropout, attention_dropout
        )
        self.build()

    def build_encoder(self) -> nn.Module:
        """The SASRec blocks."""
        return SASRecStack(self.sasrec_config)


class PopularityRecommender(RetrievalModel):
    """The most frequent items for everybody: the least that a model must beat. It has no parameters.

    Without `item_counts` it counts in its first epoch of `fit`: each event of the training batches once, and the label
    of the last row, which is an event that is not among the rows.

    Args:
        num_items: V.
        item_counts: (V,) how often each item occurs; None: counted by `fit` (one epoch is enough).
        options: As in `RetrievalModel`; only those of features and evaluation matter.
    """

    counts: Tensor

    def __init__(self, num_items: int, *, item_counts: Tensor | None = None, **options: Any) -> None:
        super().__init__(num_items, **options)
        self.automatic_optimization = False
        self._counting = item_counts is None
        self.register_buffer("counts", torch.zeros(num_items) if item_counts is None else item_counts.float())
        if self.counts.shape != (num_items,):
            raise ValueError(f"item_counts must have shape ({num_items},), got {tuple(self.counts.shape)}.")

    def prepare_batch(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch itself: nothing is looked up."""
        return batch

    def forward(self, batch: SequenceBatch) -> RetrievalOutput:
        """The same query for every case."""
        rows = answer_rows(batch)
        return RetrievalOutput(self.counts.new_ones(rows.numel(), 1), rows, {})

    def catalogue(self) -> Tensor:
        """(V, 1): log of each item's count plus one, so that the softmax of the scores is the items' share."""
        return (self.counts + 1).log().unsqueeze(1)

    def loss(self, output: RetrievalOutput, batch: SequenceBatch) -> dict[str, LossSum]:
        """Cross-entropy of the next items under the items' shares."""
        if batch.labels is None:
            raise ValueError("A loss needs labels: the batch has none.")
        labels = batch.labels[output.rows]
        total = full_softmax_loss(output.query, self.catalogue(), labels)
        return {"next_item": LossSum(total, total.new_full((), float(labels.numel())))}

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Count the batch's items, in the first epoch."""
        if not self._counting or self.current_epoch > 0:
            return
        items = batch.features[self.item_feature].values()
        last = (batch.seq_offsets[1:] - 1)[batch.seq_offsets.diff() > 0]
        final = items[:0] if batch.labels is None else batch.labels[last]
        self.counts += torch.bincount(torch.cat([items, final[final >= 0]]), minlength=self.num_items)

    def on_train_epoch_start(self) -> None:
        """Nothing: there are no tables to tell."""

    def on_train_epoch_end(self) -> None:
        """Nothing: there are no tables to report on."""

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""


class MLPRanking(RankingModel):
    """A DLRM-style perceptron without the sequence: the honest floor for `HSTURanking`.

    It reads the candidate's item and side features, the contextual features, and the history as two vectors: the mean
    of its items (with the mean of its actions, where there are any) and its last item. Dot products of all pairs of
    these vectors join the vectors themselves before the head's perceptron.

    Args:
        num_items: V.
        tasks: As in `RankingModel`.
        head_hidden_dims: Widths of the perceptron.
        options: As in `RankingModel`.
    """

    def __init__(
        self,
        num_items: int,
        tasks: Sequence[Task | Mapping[str, Any]],
        *,
        head_hidden_dims: Sequence[int] = (256, 128),
        **options: Any,
    ) -> None:
        super().__init__(num_items, tasks, head_hidden_dims=head_hidden_dims, **{"output_norm": "none", **options})
        self.build()

    @property
    def head_in_dim(self) -> int:
        """Width of all vectors and their products."""
        vectors = num_vectors(self.preprocessor_config)
        return vectors * self.hidden_dim + vectors * (vectors - 1) // 2

    def build_body(self) -> nn.Module:
        """The perceptron on pooled features."""
        return MLPRankingBody(self.preprocessor_config, self.build_head())


def num_vectors(config: PreprocessorConfig) -> int:
    """Vectors that `MLPRankingBody` reads: candidate and side features, contexts, mean and last item, mean action."""
    return 3 + len(config.side_features) + len(config.contextual_features) + (config.action_feature is not None)


class MLPRankingBody(nn.Module):
    """Pools the history, and gives the candidates' vectors and their products to the head."""

    def __init__(self, config: PreprocessorConfig, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, config.hidden_dim) for name, width in config.embedding_dims.items()}
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = head
        count = num_vectors(config)
        self.register_buffer("pairs", torch.triu_indices(count, count, offset=1), persistent=False)

    def forward(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> dict[str, Tensor]:
        """Logits by task, a row for each candidate."""
        x = self.dropout(torch.stack(self._vectors(embeddings, batch), dim=1))
        first, second = self.pairs  # type: ignore[misc]
        products = (x @ x.transpose(1, 2))[:, first, second]
        return self.head(torch.cat([x.flatten(1), products], dim=1))

    def _vectors(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> list[Tensor]:
        """`num_vectors` tensors of (candidates, D)."""
        if batch.num_targets is None:
            raise ValueError("Ranking needs candidates: the batch has no num_targets.")
        c = self.config
        values = {name: self._project(name, embeddings[name].values()) for name in c.features}
        item = values[c.item_feature]
        lengths = batch.seq_offsets.diff()
        history = lengths - batch.num_targets
        sequence = torch.repeat_interleave(lengths, output_size=item.shape[0])
        is_target = torch.arange(item.shape[0], device=item.device) - batch.seq_offsets[sequence] >= history[sequence]
        of_candidate = sequence[is_target]
        pooled = [_mean(item, sequence, is_target, history)]
        if c.action_feature is not None:
            pooled.append(_mean(values[c.action_feature], sequence, is_target, history))
        last = (batch.seq_offsets[:-1] + history - 1).clamp(min=0)
        pooled.append(item[last] * (history > 0).unsqueeze(1))
        for name in c.contextual_features:
            present = torch.repeat_interleave(embeddings[name].lengths(), output_size=values[name].shape[0])
            pooled.append(item.new_zeros(lengths.numel(), c.hidden_dim).index_copy(0, present, values[name]))
        own = [values[name][is_target] for name in (c.item_feature, *c.side_features)]
        return [*own, *(vector[of_candidate] for vector in pooled)]

    def _project(self, name: str, values: Tensor) -> Tensor:
        return self.projections[name](values) if name in self.projections else values


def _mean(values: Tensor, sequence: Tensor, is_target: Tensor, history: Tensor) -> Tensor:
    """(B, D): mean over each sequence's history; zeros without any."""
    total = values.new_zeros(history.numel(), values.shape[1])
    total = total.index_add(0, sequence, values * ~is_target.unsqueeze(1))
    return total / history.clamp(min=1).unsqueeze(1)
