"""`TokenSequence`: what the encoder reads. An event is one token or two; contextual features are tokens too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from genrec.attention import AttentionMask


@dataclass(frozen=True)
class TokenSequence:
    """B jagged sequences of T' tokens in all, each `contexts | history | targets`.

    Attributes:
        x: (T', D) token embeddings, the encoder's input.
        seq_offsets: (B + 1,) int64; tokens [seq_offsets[b], seq_offsets[b + 1]) are sequence b.
        max_seqlen: An upper bound of the sequences' lengths, in tokens.
        num_contexts: (B,) int64, leading contextual tokens; None where there are none.
        num_targets: (B,) int64, tokens of candidates at the end; None where there are none.
        target_group_size: Tokens of one candidate: 2 where its action follows it.
        timestamps: (T',) int64, or None for data without times.
        query_timestamps: (T',) int64, when the answer of each token is asked for; None as timestamps.
        output_index: (outputs,) int64, the tokens that the model reads its answers from; None for all, in order.
    """

    x: Tensor
    seq_offsets: Tensor
    max_seqlen: int
    num_contexts: Tensor | None = None
    num_targets: Tensor | None = None
    target_group_size: int = 1
    timestamps: Tensor | None = None
    query_timestamps: Tensor | None = None
    output_index: Tensor | None = None

    def mask(self, window: int | None = None, causal: bool = True) -> AttentionMask:
        """The attention mask of these tokens."""
        return AttentionMask(self.num_contexts, self.num_targets, self.target_group_size, window, causal)

    def with_x(self, x: Tensor) -> TokenSequence:
        """The same tokens with other embeddings, (T', D)."""
        return replace(self, x=x)
