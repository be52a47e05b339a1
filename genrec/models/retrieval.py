"""Retrieval: the next item at every position, against the whole catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.layers.config import HSTUConfig
from genrec.layers.heads import output_norm as build_output_norm
from genrec.layers.hstu import HSTUStack
from genrec.metrics import retrieval_metrics
from genrec.models.base import SequenceBody, SequenceRecommender
from genrec.models.catalogue import Seen, seen_items, target_ranks, top_items
from genrec.models.history import History, batch_from_history
from genrec.models.losses import LossSum
from genrec.models.negatives import NegativeSampler, NegativeSampling
from genrec.models.softmax import full_softmax_loss, sampled_softmax_loss

_LOOKUP_CHUNK = 1 << 20


@dataclass
class RetrievalOutput:
    """What a retrieval body answers.

    Attributes:
        query: (C, D) states of the rows that have a label (without labels: of each sequence's last row), normalised
            as the model says, temperature not applied.
        rows: (C,) int64, the rows of the batch that they belong to.
        items: Embeddings of extra lookups, by their key: targets, negatives, catalogue.
    """

    query: Tensor
    rows: Tensor
    items: dict[str, Tensor]


class RetrievalBody(SequenceBody):
    """Queries of the rows that have a label (or the last ones), and the embeddings of extra lookups passed on."""

    def __init__(self, preprocessor: nn.Module, encoder: nn.Module, head: nn.Module, extra_keys: list[str]) -> None:
        super().__init__(preprocessor, encoder, head)
        self.extra_keys = extra_keys

    def forward(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> RetrievalOutput:
        """`RetrievalOutput` of a prepared batch."""
        rows = answer_rows(batch)
        query = self.head(self.states(embeddings, batch).index_select(0, rows))
        return RetrievalOutput(query, rows, {key: embeddings[key].values() for key in self.extra_keys})


def answer_rows(batch: SequenceBatch) -> Tensor:
    """(C,) rows that have a label; without labels the last row of each sequence that has any."""
    if batch.labels is not None:
        return torch.nonzero(batch.labels >= 0).squeeze(1)
    return (batch.seq_offsets[1:] - 1)[batch.seq_offsets.diff() > 0]


class RetrievalModel(SequenceRecommender):
    """Next-item retrieval with any encoder: losses, evaluation, `recommend`. Override `build_encoder`.

    Logged at evaluation: `<stage>/loss` (full softmax), `<stage>/hr@<K>`, `<stage>/ndcg@<K>`, `<stage>/mrr`. Every row
    with a label is a case. It is ranked exactly among all items (`target_ranks`: ties count
    against the target). With `filter_seen`, items of the case's sequence up to its row don't compete; the target
    itself is never filtered, so a repeated item can be found. The batch's own history is what counts as seen, plus
    ids under the key `<item_feature>_seen` where the batch has it (history that was cut off).

    Args:
        num_items: V.
        loss: "full_softmax" (in chunks, any V) or "sampled_softmax".
        num_negatives: Negatives of the sampled softmax.
        negative_sampling: "uniform", "popularity" (needs counts) or "in_batch".
        shared_negatives: One draw for all rows of a batch, or one for each row.
        logq_correction: Correct the sampled softmax for how often each negative is drawn.
        item_counts: (V,) how often each item occurs in training, for "popularity"; None: the datamodule's
            `item_counts` when fitting starts.
        similarity: "dot" or "cosine" (both sides L2-normalised).
        output_norm: Of the encoder's output: "none", "l2" or "layer"; None: "l2" with cosine, else "layer".
        temperature: Scores are divided by it.
        item_bias: A learned bias for each item.
        filter_seen: Leave seen items out at evaluation.
        top_ks: K of HR@K and NDCG@K.
        predict_k: Items that `predict` writes for each user.
        options: As in `SequenceRecommender`.
    """

    def __init__(
        self,
        num_items: int,
        *,
        loss: Literal["full_softmax", "sampled_softmax"] = "full_softmax",
        num_negatives: int = 128,
        negative_sampling: NegativeSampling = "uniform",
        shared_negatives: bool = True,
        logq_correction: bool = False,
        item_counts: Tensor | None = None,
        similarity: Literal["dot", "cosine"] = "dot",
        output_norm: str | None = None,
        temperature: float = 1.0,
        item_bias: bool = False,
        filter_seen: bool = True,
        top_ks: Sequence[int] = (10, 50, 200),
        predict_k: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(num_items, **options)
        if loss not in ("full_softmax", "sampled_softmax"):
            raise ValueError(f"loss must be 'full_softmax' or 'sampled_softmax', got '{loss}'.")
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity must be 'dot' or 'cosine', got '{similarity}'.")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if self.embedding_dims.get(self.item_feature, self.hidden_dim) != self.hidden_dim:
            raise ValueError("Retrieval ties the item table to the output: its width must be hidden_dim.")
        self.loss_name = loss
        self.similarity = similarity
        self.output_norm = output_norm or ("l2" if similarity == "cosine" else "layer")
        self.temperature = temperature
        self.filter_seen = filter_seen
        self.predict_k = predict_k
        self.logq_correction = logq_correction
        self.negatives = (
            NegativeSampler(num_items, num_negatives, negative_sampling, shared_negatives, item_counts)
            if loss == "sampled_softmax"
            else None
        )
        self.item_bias = nn.Parameter(torch.zeros(num_items)) if item_bias else None
        self.metrics = nn.ModuleDict(
            {stage: retrieval_metrics(top_ks, prefix=f"{stage}/") for stage in ("val", "test")}
        )
        self._catalogue: Tensor | None = None

    @property
    def target_key(self) -> str:
        """Extra feature of the labels' embeddings."""
        return f"{self.item_feature}_target"

    @property
    def negative_key(self) -> str:
        """Extra feature of the negatives' embeddings."""
        return f"{self.item_feature}_negative"

    @property
    def catalogue_key(self) -> str:
        """Extra feature of all items' embeddings."""
        return f"{self.item_feature}_catalogue"

    @property
    def seen_key(self) -> str:
        """Optional key of a batch: items of a sequence that are seen though they are not in it."""
        return f"{self.item_feature}_seen"

    def build_head(self) -> nn.Module:
        """(rows, D) states -> (rows, D) queries."""
        return build_output_norm(self.output_norm, self.hidden_dim)

    def build_body(self) -> nn.Module:
        """Preprocessor, encoder and head, and the extra lookups passed on."""
        keys = self.extra_features()[self.item_feature]
        return RetrievalBody(self.build_preprocessor(), self.build_encoder(), self.build_head(), keys)

    def extra_features(self) -> dict[str, list[str]]:
        """Catalogue, or targets and negatives: all in the item table."""
        keys = [self.catalogue_key] if self.loss_name == "full_softmax" else [self.target_key, self.negative_key]
        return {self.item_feature: keys}

    def extra_lookups(self, batch: SequenceBatch) -> dict[str, Tensor | JaggedTensor]:
        """What the training loss needs beside the batch; nothing at evaluation."""
        if not self.training or batch.labels is None:
            return {}
        labels = batch.labels
        if self.negatives is None:
            return {self.catalogue_key: torch.arange(self.num_items, device=labels.device)}
        targets = labels[labels >= 0]
        return {self.target_key: targets, self.negative_key: self.negatives.sample(targets).flatten()}

    def loss(self, output: RetrievalOutput, batch: SequenceBatch) -> dict[str, LossSum]:
        """Softmax cross-entropy of the next items: in training the one chosen, at evaluation the full one."""
        if batch.labels is None:
            raise ValueError("A loss needs labels: the batch has none.")
        labels = batch.labels[output.rows]
        weights = None if batch.label_weights is None else batch.label_weights[output.rows]
        query = output.query / self.temperature
        if self.training and self.negatives is not None:
            total = self._sampled_loss(query, labels, weights, output, batch, self.negatives)
        else:
            items = self.item_vectors(output.items[self.catalogue_key]) if self.training else self.catalogue()
            total = full_softmax_loss(query, items, labels, bias=self.item_bias, weights=weights)
        count = total.new_full((), float(labels.numel())) if weights is None else weights.sum()
        return {"next_item": LossSum(total, count)}

    def _sampled_loss(
        self,
        query: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        output: RetrievalOutput,
        batch: SequenceBatch,
        negatives: NegativeSampler,
    ) -> Tensor:
        ids = batch.features[self.negative_key].values()
        positives = self.item_vectors(output.items[self.target_key])
        negative = self.item_vectors(output.items[self.negative_key])
        if not negatives.shared:
            ids = ids.view(-1, negatives.num_negatives)
            negative = negative.view(*ids.shape, -1)
        bias = None if self.item_bias is None else (self.item_bias[labels], self.item_bias[ids])
        log_q = negatives.log_expected_count(ids, labels) if self.logq_correction else None
        return sampled_softmax_loss(query, positives, negative, labels, ids, bias=bias, log_q=log_q, weights=weights)

    def item_vectors(self, embeddings: Tensor) -> Tensor:
        """Item embeddings as they are scored: L2-normalised for cosine similarity."""
        return F.normalize(embeddings, dim=-1, eps=1e-6) if self.similarity == "cosine" else embeddings

    @torch.no_grad()
    def catalogue(self) -> Tensor:
        """(V, D) vectors of all items, as they are scored; made once for each evaluation."""
        if self._catalogue is not None:
            return self._catalogue
        chunks = torch.arange(self.num_items, device=self.device).split(_LOOKUP_CHUNK)
        return self.item_vectors(torch.cat([self.tables.lookup(self.item_feature, ids) for ids in chunks]))

    def on_evaluation_start(self) -> None:
        """Make the catalogue once for an evaluation or prediction. All ranks come by here together."""
        self._catalogue = None
        self._catalogue = self.catalogue()

    def on_evaluation_end(self) -> None:
        """Drop it: training moves the items."""
        self._catalogue = None

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = on_evaluation_start
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = on_evaluation_end

    def on_fit_start(self) -> None:
        """Take the counts for popularity sampling from the datamodule, where none were given."""
        if self.negatives is not None and self.negatives.needs_counts:
            self.negatives.set_counts(getattr(getattr(self.trainer, "datamodule", None), "item_counts", None))

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """`evaluation_step` of a validation batch."""
        self.evaluation_step(batch, "val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """`evaluation_step` of a test batch."""
        self.evaluation_step(batch, "test")

    def evaluation_step(self, batch: SequenceBatch, stage: str) -> None:
        """Loss and ranks of a batch's labels."""
        output = self(batch)
        self.log_loss(self.loss(output, batch), stage, output.rows.numel())
        assert batch.labels is not None
        ranks = target_ranks(
            output.query / self.temperature,
            self.catalogue(),
            batch.labels[output.rows],
            bias=self.item_bias,
            seen=self._seen(batch, output.rows) if self.filter_seen else None,
        )
        self.metrics[stage].update(ranks)  # type: ignore[operator]
        self.log_dict(self.metrics[stage], on_step=False, on_epoch=True)  # type: ignore[arg-type]

    def _seen(self, batch: SequenceBatch, rows: Tensor) -> Seen:
        further = batch.features[self.seen_key] if self.seen_key in batch.features.keys() else None  # noqa: SIM118
        return seen_items(batch.features[self.item_feature].values(), batch.seq_offsets, rows, further)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """The best items after each sequence: `user_id` where known, `items` (B, k), `scores` (B, k)."""
        ids, scores = self._top(replace(batch, labels=None), self.predict_k, self.filter_seen)
        users = {} if batch.user_ids is None else {"user_id": batch.user_ids}
        return {**users, "items": ids, "scores": scores}

    def _top(self, batch: SequenceBatch, k: int, filter_seen: bool) -> tuple[Tensor, Tensor]:
        output = self(batch)
        if output.rows.numel() != batch.batch_size:
            raise ValueError("A sequence is empty: without any history there is nothing to recommend from.")
        seen = self._seen(batch, output.rows) if filter_seen else None
        return top_items(output.query / self.temperature, self.catalogue(), k, bias=self.item_bias, seen=seen)

    @torch.no_grad()
    def recommend(self, history: History, k: int = 10, filter_seen: bool = True) -> tuple[Tensor, Tensor]:
        """The k best next items of some users.

        Args:
            history: A list of item ids (oldest first) for each user; or a dict of such lists by feature, with
                "timestamps" where the model reads times and "query_timestamps" (one for each user: when the
                recommendation is shown; by default the time of the last event).
            k: How many items.
            filter_seen: Leave out the items of the history, all of it, also what is beyond `max_seqlen`.

        Returns:
            (users, k) ids, best first, and (users, k) scores. Where fewer items are left, id -1 and score -inf.

        Raises:
            ValueError: A history is empty, or features are missing or of other lengths.
        """
        training = self.training
        self.eval()
        try:
            batch = batch_from_history(history, self.preprocessor_config, self.max_seqlen, self.seen_key)
            return self._top(self.prepare_batch(batch).to(self.device), k, filter_seen)
        finally:
            self.train(training)


class HSTURetrieval(RetrievalModel):
    """HSTU for retrieval (arXiv 2402.17152): the next item at every position.

    The defaults train well on small public sets. The published settings are `scale_by_sqrt_dim=True,
    similarity="cosine", temperature=0.05, loss="sampled_softmax", shared_negatives=False`.

    Args:
        num_items: V.
        num_layers, num_heads, qk_dim, v_dim, form, relative_bias, dropout, attention_dropout: As in `HSTUConfig`.
        window, attention_backend, layer_backend, layer_recompute, recompute: As in `HSTUConfig`.
        hstu_options: Any other field of `HSTUConfig`, by name.
        options: As in `RetrievalModel`.

    Example:
        >>> model = HSTURetrieval(num_items=100, hidden_dim=32, relative_bias="position")
        >>> ids, scores = model.recommend([[3, 7, 9]], k=5)
    """

    def __init__(
        self,
        num_items: int,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        form: str = "paper",
        relative_bias: str | None = None,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        window: int | None = None,
        attention_backend: str = "auto",
        layer_backend: str = "torch",
        layer_recompute: Sequence[str] = (),
        recompute: bool = False,
        hstu_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_items, **options)
        config = HSTUConfig(
            self.hidden_dim, num_layers, num_heads, qk_dim, v_dim, self.max_tokens, form,
            relative_bias=relative_bias, dropout=dropout, attention_dropout=attention_dropout, window=window,
            attention_backend=attention_backend, layer_backend=layer_backend,
            layer_recompute=tuple(layer_recompute), recompute=recompute,
        )  # fmt: skip
        self.hstu_config = replace(config, **(hstu_options or {}))
        self.preprocessor_config = replace(self.preprocessor_config, layer_backend=self.hstu_config.layer_backend)
        self.build()

    def build_encoder(self) -> nn.Module:
        """The HSTU stack."""
        return HSTUStack(self.hstu_config)
