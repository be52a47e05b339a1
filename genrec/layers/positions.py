"""What is added to tokens at the input: learned absolute positions, and how long ago an event was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.attention import time_bucket


class PositionEncoding(nn.Module):
    """Learned absolute positions of tokens `contexts | history | targets`.

    The i-th contextual feature has a position of its own. History tokens are counted from the start of the history
    (0, 1, ...) or from its end (the newest is 1). All targets share one position: that of the first one, from
    the end 0. Positions beyond the table share its last row.

    Args:
        max_positions: Rows for history and targets.
        num_contexts: Rows for contextual features.
        dim: D.
        count_from: "start" or "end".
    """

    def __init__(self, max_positions: int, num_contexts: int, dim: int, count_from: str = "start") -> None:
        super().__init__()
        if count_from not in ("start", "end"):
            raise ValueError(f"position_from must be 'start' or 'end', got '{count_from}'.")
        self.num_contexts = num_contexts
        self.count_from = count_from
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_contexts + max_positions, dim)))

    def index(self, place: Tensor, history_len: Tensor, is_context: Tensor) -> Tensor:
        """(T',) int64 row of each token.

        Args:
            place: (T',) number of a token among the history and target tokens of its sequence; for a contextual
                token the number of its feature.
            history_len: (T',) history tokens of the token's sequence.
            is_context: (T',) bool.
        """
        capped = torch.minimum(place, history_len)
        index = capped if self.count_from == "start" else history_len - capped
        index = torch.where(is_context, place, index + self.num_contexts)
        return index.clamp(max=self.weight.shape[0] - 1)

    def forward(self, place: Tensor, history_len: Tensor, is_context: Tensor) -> Tensor:
        """(T', D). Arguments as those of `index`."""
        return nn.functional.embedding(self.index(place, history_len, is_context), self.weight)


class TimeEncoding(nn.Module):
    """Learned encoding of the time from an event to the request, in buckets.

    Args:
        num_buckets: Rows of the table.
        dim: D.
        kind: "sqrt": trunc(sqrt(seconds / 60)); "log": trunc(ln(seconds) / 0.301).
    """

    def __init__(self, num_buckets: int, dim: int, kind: str = "sqrt") -> None:
        super().__init__()
        if kind not in ("sqrt", "log"):
            raise ValueError(f"time_encoding must be 'none', 'sqrt' or 'log', got '{kind}'.")
        self.kind = kind
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_buckets, dim)))

    def buckets(self, age: Tensor) -> Tensor:
        """int64 bucket of each age in seconds; events after the request have age 0."""
        age = age.clamp(min=0)
        last = self.weight.shape[0] - 1
        if self.kind == "log":
            return time_bucket(age, last + 1)
        return (age.double() / 60).sqrt().long().clamp(max=last)

    def forward(self, age: Tensor) -> Tensor:
        """(T',) int64 seconds from event to request -> (T', D)."""
        return nn.functional.embedding(self.buckets(age), self.weight)
