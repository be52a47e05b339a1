# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""From a batch of events to the tokens that the encoder reads.

What a row of the batch may know, and when:

* An event's action follows its item. Interleaved, the item's token comes before the action's, and attention is causal.
  Summed, the action is added to the item's own token, so nothing may be read there that predicts that action.
* A candidate's score is read at its item's token, which never holds the candidate's action. With
  `candidate_actions` the action is a later token of the same group, which only itself sees.
* The relative time bias may use when the next event happens (t', the paper's choice) but never which it is. With
  candidates, the last history row uses its own time, and a candidate its own, so that no candidate acts on another.
"""

from __future__ import annotations

from genrec.environment import require_torchrec

require_torchrec()

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.layers.jagged import select_rows, where_true
from genrec.layers.ops import get_layer_ops
from genrec.layers.positions import PositionEncoding, TimeEncoding
from genrec.layers.tokens import TokenSequence


@dataclass(frozen=True)
class PreprocessorConfig:
    """How events become tokens.

    Args:
        hidden_dim: D, width of the tokens.
        item_feature: Sequence feature of the items.
        action_feature: Sequence feature of the actions, or None for items alone.
        side_features: Sequence features that describe the items.
        contextual_features: Features of the whole sequence (a user's demographics): leading tokens, in this order.
            A missing value makes no token.
        action_mode: "interleaved": item, action, item, action, ...; "summed": action added to the item it follows.
        candidate_actions: Interleaved only: candidates have their action token too.
        side_mode: "sum": side features added to the item; "concat": all concatenated and projected to D.
        embedding_dims: Width of the embeddings of features for which it is not D; they are projected to D.
        max_positions: Rows of the learned absolute positions, in tokens; 0 for none.
        position_from: "start" or "end": where history positions are counted from.
        time_encoding: "none", "sqrt" or "log".
        num_time_buckets: Rows of the time encoding.
        scale_by_sqrt_dim: Multiply embeddings by sqrt(D) before positions are added.
        fp32_residual: Under autocast the tokens, and with them what each layer adds to, stay in the embeddings' dtype;
            False: they take autocast's, with half the traffic between layers.
        dropout: Of the tokens.
        layer_backend: What places the tokens and adds their encodings: see `genrec.layers.ops`.
    """

    hidden_dim: int
    item_feature: str = "item"
    action_feature: str | None = None
    side_features: list[str] = field(default_factory=list)
    contextual_features: list[str] = field(default_factory=list)
    action_mode: str = "interleaved"
    candidate_actions: bool = False
    side_mode: str = "sum"
    embedding_dims: dict[str, int] = field(default_factory=dict)
    max_positions: int = 0
    position_from: str = "start"
    time_encoding: str = "none"
    num_time_buckets: int = 2048
    scale_by_sqrt_dim: bool = False
    fp32_residual: bool = True
    dropout: float = 0.0
    layer_backend: str = "torch"

    def __post_init__(self) -> None:
        if self.action_mode not in ("interleaved", "summed"):
            raise ValueError(f"action_mode must be 'interleaved' or 'summed', got '{self.action_mode}'.")
        if self.side_mode not in ("sum", "concat"):
            raise ValueError(f"side_mode must be 'sum' or 'concat', got '{self.side_mode}'.")
        if self.candidate_actions and not self.interleaved:
            raise ValueError("candidate_actions needs an action_feature and action_mode 'interleaved'.")
        unknown = set(self.embedding_dims) - set(self.features)
        if unknown:
            raise ValueError(f"embedding_dims names features that are not used: {', '.join(sorted(unknown))}.")

    @property
    def features(self) -> list[str]:
        """Every feature whose embeddings are read."""
        action = [] if self.action_feature is None else [self.action_feature]
        return [self.item_feature, *action, *self.side_features, *self.contextual_features]

    @property
    def interleaved(self) -> bool:
        """Whether an event is two tokens."""
        return self.action_feature is not None and self.action_mode == "interleaved"

    def max_tokens(self, max_rows: int) -> int:
        """Most tokens of a sequence of `max_rows` events: what `HSTUConfig.max_seqlen` must cover."""
        return len(self.contextual_features) + max_rows * (2 if self.interleaved else 1)


class _Layout(NamedTuple):
    """Where the rows of a batch go. Rows are (T,), sequences (B,)."""

    sequence: Tensor
    """(T,) the sequence of each row."""
    is_target: Tensor | None
    """(T,) bool; None without candidates."""
    item_token: Tensor
    """(T,) token of each row's item."""
    target_rows: Tensor | None
    """(sum of num_targets,) rows of the candidates; None without."""
    action_rows: Tensor | None
    """(A,) rows whose action is a token; None for all."""
    context_tokens: list[Tensor]
    """For each contextual feature, tokens of its values."""
    context_sequences: list[Tensor]
    token_offsets: Tensor
    """(B + 1,)"""
    num_contexts: Tensor | None
    history_tokens: Tensor
    """(B,)"""


class SequencePreprocessor(nn.Module):
    """Events to tokens. Vectorised over the batch; nothing is padded."""

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        self.config = config
        c, dim = config, config.hidden_dim
        described = {c.item_feature, *c.side_features} if c.side_mode == "concat" else set()
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim) for name, width in c.embedding_dims.items() if name not in described}
        )
        width = sum(c.embedding_dims.get(name, dim) for name in (c.item_feature, *c.side_features))
        self.item_projection = nn.Linear(width, dim) if c.side_mode == "concat" else None
        contexts = len(c.contextual_features)
        self.positions = PositionEncoding(c.max_positions, contexts, dim, c.position_from) if c.max_positions else None
        self.times = TimeEncoding(c.num_time_buckets, dim, c.time_encoding) if c.time_encoding != "none" else None
        self.ops = get_layer_ops(c.layer_backend)

    def forward(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> TokenSequence:
        """The tokens of a batch.

        Args:
            embeddings: For each of `config.features` its embeddings: (T, width) values for a sequence feature, one
                for each row; for a contextual feature at most one for each sequence.
            batch: The events.

        Raises:
            KeyError: A feature has no embeddings.
            ValueError: A feature's values don't fit the batch, or times are needed and missing.
        """
        self._check(embeddings, batch)
        layout = self._layout(embeddings, batch)
        tokens = self._tokens(batch, layout, self._embed(embeddings, batch, layout))
        c, encodings = self.config, []
        if self.positions is not None:
            encodings.append((self.positions.weight, self.positions.index(*self._places(batch, layout))))
        if self.times is not None:
            encodings.append((self.times.weight, self.times.buckets(self._ages(batch, tokens, layout))))
        scale = c.hidden_dim**0.5 if c.scale_by_sqrt_dim else 1.0
        x = self.ops.add_encodings(tokens.x, scale, encodings, c.dropout, self.training)
        return replace(tokens, x=self._in_state_dtype(x))

    def outputs(self, y: Tensor, tokens: TokenSequence) -> Tensor:
        """The states from which the model answers.

        Args:
            y: (T', D), the encoder's output for `tokens`.
            tokens: What `forward` returned.

        Returns:
            With candidates (sum of num_targets, D): each candidate's item token, in the order of the candidates.
            Without (T, D): each event's last token, which has seen the event's item and action.
        """
        return y if tokens.output_index is None else select_rows(y, tokens.output_index)

    def _check(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> None:
        c = self.config
        missing = [name for name in c.features if name not in embeddings]
        if missing:
            raise KeyError(f"No embeddings of {', '.join(missing)}; there are {', '.join(embeddings)}.")
        rows = embeddings[c.item_feature].values().shape[0]
        for name in c.features:
            values = embeddings[name].values()
            if name not in c.contextual_features and values.shape[0] != rows:
                raise ValueError(f"Feature '{name}' has {values.shape[0]} values for {rows} events: it needs one each.")
            lengths = embeddings[name].lengths()
            # Reading a GPU's lengths would wait for it; the values' count, which is free, catches most mistakes.
            excess = values.shape[0] > batch.batch_size or (not lengths.is_cuda and bool((lengths > 1).any()))
            if name in c.contextual_features and excess:
                raise ValueError(f"Contextual feature '{name}' has more than one value for a sequence.")
        if self.times is not None and batch.timestamps is None:
            raise ValueError("time_encoding needs timestamps: give the batch some, or set it to 'none'.")

    def _layout(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch) -> _Layout:
        c, offsets = self.config, batch.seq_offsets
        rows, device = embeddings[c.item_feature].values().shape[0], offsets.device
        lengths = offsets.diff()
        sequence = torch.repeat_interleave(lengths, output_size=rows)
        local = torch.arange(rows, device=device) - offsets[sequence]
        per_row = 2 if c.interleaved else 1
        per_target = 2 if c.candidate_actions else 1
        targets = torch.zeros_like(lengths) if batch.num_targets is None else batch.num_targets.to(lengths.dtype)
        history = lengths - targets
        present = [embeddings[name].lengths().to(lengths.dtype) for name in c.contextual_features]
        contexts = torch.stack(present).sum(0) if present else torch.zeros_like(lengths)
        token_lengths = contexts + per_row * history + per_target * targets
        token_offsets = torch.cat([offsets.new_zeros(1), token_lengths.cumsum(0)])
        item_token = token_offsets[sequence] + contexts[sequence] + per_row * local
        is_target = target_rows = action_rows = None
        if batch.num_targets is not None:
            beyond = local - history[sequence]
            is_target = beyond >= 0
            item_token = item_token - (per_row - per_target) * beyond.clamp(min=0)
            # Ranking labels tell how many candidates there are; asking a GPU would wait for all that it has to do.
            count = None if batch.labels is None or batch.labels.dim() != 2 else batch.labels.shape[0]
            target_rows = where_true(is_target, count)
            if c.interleaved and not c.candidate_actions:
                action_rows = where_true(~is_target, None if count is None else rows - count)
        tokens, sequences, start = [], [], token_offsets[:-1]
        for name, here in zip(c.contextual_features, present, strict=True):
            sequences.append(torch.repeat_interleave(here, output_size=embeddings[name].values().shape[0]))
            tokens.append(start[sequences[-1]])
            start = start + here
        return _Layout(sequence, is_target, item_token, target_rows, action_rows, tokens, sequences, token_offsets,
                       contexts if present else None, per_row * history)  # fmt: skip

    def _embed(self, embeddings: Mapping[str, JaggedTensor], batch: SequenceBatch, layout: _Layout) -> Tensor:
        """(T', D): every embedding at its token."""
        c = self.config

        def project(name: str) -> Tensor:
            values = self._in_state_dtype(embeddings[name].values())
            return self.projections[name](values) if name in self.projections else values

        described = [c.item_feature, *c.side_features]
        if self.item_projection is not None:
            item = self.item_projection(torch.cat([embeddings[name].values() for name in described], dim=-1))
        else:
            item = project(described[0])
            for name in described[1:]:
                item = item + project(name)
        pool, place = [item], [layout.item_token]
        if c.action_feature is not None:
            action = project(c.action_feature)
            if c.interleaved:
                rows = layout.action_rows
                pool.append(action if rows is None else select_rows(action, rows))
                place.append((layout.item_token if rows is None else layout.item_token[rows]) + 1)
            elif layout.is_target is None:
                pool[0] = item + action
            else:
                pool[0] = item + torch.where(layout.is_target[:, None], 0.0, action)
        pool += [project(name) for name in c.contextual_features]
        place += layout.context_tokens
        if len(pool) == 1:
            return pool[0]
        return self.ops.place_rows(pool, place)

    def _in_state_dtype(self, x: Tensor) -> Tensor:
        """x, in autocast's dtype where the tokens are to have that."""
        kind = x.device.type
        narrow = not self.config.fp32_residual and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(kind)) if narrow else x

    def _tokens(self, batch: SequenceBatch, layout: _Layout, x: Tensor) -> TokenSequence:
        c = self.config
        timestamps, asked = self._token_times(batch, layout, x.shape[0])
        per_target = 2 if c.candidate_actions else 1
        if layout.target_rows is not None:
            output_index = layout.item_token[layout.target_rows]
        elif c.interleaved:
            output_index = layout.item_token + 1
        else:
            output_index = layout.item_token if c.contextual_features else None
        return TokenSequence(
            x=x,
            seq_offsets=layout.token_offsets,
            max_seqlen=c.max_tokens(batch.max_seqlen),
            num_contexts=layout.num_contexts,
            num_targets=None if batch.num_targets is None else batch.num_targets * per_target,
            target_group_size=per_target,
            timestamps=timestamps,
            query_timestamps=asked,
            output_index=output_index,
        )

    def _token_times(self, batch: SequenceBatch, layout: _Layout, total: int) -> tuple[Tensor | None, Tensor | None]:
        """(T',) time of each token, and t', when its answer is asked for. A context's time is the first event's."""
        if batch.timestamps is None:
            return None, None
        happened, rows = batch.timestamps, batch.timestamps.shape[0]
        asked = batch.query_timestamps
        if asked is None:
            asked = torch.cat([happened[1:], happened[-1:]])
            last = (batch.seq_offsets[1:] - 1).clamp(min=0)[batch.seq_offsets.diff() > 0]
            asked = asked.index_copy(0, last, happened[last])
        if layout.is_target is not None:
            # A row before a candidate would carry the time of that candidate to all others.
            own = layout.is_target.clone()
            own[:-1] |= layout.is_target[1:] & (layout.sequence[1:] == layout.sequence[:-1])
            asked = torch.where(own, happened, asked)
        if not self.config.interleaved and not layout.context_tokens:
            return happened, asked
        times, queries = happened.new_zeros(total), happened.new_zeros(total)
        if self.config.interleaved:
            chosen = slice(None) if layout.action_rows is None else layout.action_rows
            times[layout.item_token[chosen] + 1] = happened[chosen]
            queries[layout.item_token[chosen] + 1] = asked[chosen]
            queries[layout.item_token] = happened
        else:
            queries[layout.item_token] = asked
        times[layout.item_token] = happened
        if rows:
            first = happened[batch.seq_offsets[:-1].clamp(max=rows - 1)] * (batch.seq_offsets.diff() > 0)
            for place, sequence in zip(layout.context_tokens, layout.context_sequences, strict=True):
                times[place] = queries[place] = first[sequence]
        return times, queries

    def _places(self, batch: SequenceBatch, layout: _Layout) -> tuple[Tensor, Tensor, Tensor]:
        """For each token: its number, the history tokens of its sequence, and whether it is a context."""
        lengths = layout.token_offsets.diff()
        features = [torch.full_like(tokens, number) for number, tokens in enumerate(layout.context_tokens)]
        total = layout.item_token.shape[0] + sum(len(f) for f in features)
        if self.config.interleaved:
            rows = layout.action_rows
            total += layout.item_token.shape[0] if rows is None else rows.shape[0]
        sequence = torch.repeat_interleave(lengths, output_size=total)
        start = (
            layout.token_offsets[:-1]
            if layout.num_contexts is None
            else layout.token_offsets[:-1] + layout.num_contexts
        )
        place = torch.arange(total, device=lengths.device) - start[sequence]
        is_context = place < 0
        for tokens, number in zip(layout.context_tokens, features, strict=True):
            place[tokens] = number
        return place, layout.history_tokens[sequence], is_context

    def _ages(self, batch: SequenceBatch, tokens: TokenSequence, layout: _Layout) -> Tensor:
        """(T',) seconds from each token to the request: the last row's t', with candidates the earliest of theirs."""
        assert batch.timestamps is not None
        assert tokens.timestamps is not None
        happened, offsets = batch.timestamps, batch.seq_offsets
        if happened.shape[0] == 0:
            return torch.zeros_like(tokens.timestamps)
        last = (offsets[1:] - 1).clamp(min=0)
        request = (happened if batch.query_timestamps is None else batch.query_timestamps)[last]
        if layout.is_target is not None:
            far = torch.iinfo(torch.int64).max
            candidates = torch.where(layout.is_target, happened, far)
            earliest = torch.full_like(request, far).scatter_reduce(0, layout.sequence, candidates, "amin")
            request = torch.where(earliest == far, request, earliest)
        sequence = torch.repeat_interleave(tokens.seq_offsets.diff(), output_size=tokens.x.shape[0])
        return request[sequence] - tokens.timestamps
