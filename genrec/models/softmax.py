"""Softmax losses over a catalogue: all items, without ever storing the (rows x items) scores, or a sample of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "other": 1 << 26}
"""Scores held at once: 16 MiB on a CPU, where more leaves the cache; 256 MiB on a GPU, where fewer leave it idle."""
_FEWEST_ROWS = 64
"""Below this many rows a chunk, products with the whole catalogue read it too often: it is chunked as well then."""


def full_softmax_loss(
    query: Tensor,
    items: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `query @ items.T + bias` against `labels`, with gradients to all three.

    Equal to `F.cross_entropy(..., reduction="sum")` (with a weight for each row), in bounded memory: besides
    gradients of the inputs' sizes it holds at most `chunk_elements` scores, for a catalogue of any size. A catalogue
    up to about chunk_elements / 64 items takes three products a row, its gradients being computed beside the loss; a
    larger one takes four, the scores being computed again in the backward pass.

    Args:
        query: (P, D). A temperature is a factor of it.
        items: (V, D).
        labels: (P,) int64 in [0, V).
        bias: (V,) or None.
        weights: (P,) weight of each row, or None for ones. It gets no gradient.
        chunk_elements: Most scores held at once; None for a value that suits the device.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """
    _check_rows(query, items, labels, weights)
    if chunk_elements is None:
        chunk_elements = _CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "other"]
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, items = query.to(dtype), items.to(dtype)
    inputs = (query, items, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    with torch.autocast(device_type, enabled=False):
        if chunk_elements // items.shape[0] >= min(_FEWEST_ROWS, max(query.shape[0], 1)):
            rows = chunk_elements // items.shape[0]
            return _RowChunkedSoftmax.apply(query, items, bias, labels, weights, rows, needs_grad)
        rows = max(min(query.shape[0], 1024), 1)
        columns = max(chunk_elements // rows, 1)
        return _BlockedSoftmax.apply(query, items, bias, labels, weights, rows, columns)


def _check_rows(query: Tensor, items: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    if query.dim() != 2 or items.dim() != 2 or query.shape[1] != items.shape[1]:
        raise ValueError(f"query and items must be (P, D) and (V, D), got {tuple(query.shape)}, {tuple(items.shape)}.")
    for name, tensor in {"labels": labels, "weights": weights}.items():
        if tensor is not None and tensor.shape != query.shape[:1]:
            raise ValueError(f"{name} must have shape ({query.shape[0]},), got {tuple(tensor.shape)}.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RowChunkedSoftmax(torch.autograd.Function):
    """Chunks of rows against all items; the gradients are computed in the forward pass, where the scores are."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        items: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        rows: int,
        needs_grad: bool,
    ) -> Tensor:
        wide = _wide(query.dtype)
        total = torch.zeros((), dtype=wide, device=query.device)
        grads = None
        if needs_grad:
            grads = (torch.empty_like(query), torch.zeros_like(items, dtype=wide), _zeros_like(bias, wide))
        buffer = query.new_empty(min(rows, query.shape[0]), items.shape[0])
        for start in range(0, query.shape[0], rows):
            part = slice(start, start + rows)
            total += _chunk(query[part], items, bias, labels[part], None if weights is None else weights[part],
                            buffer, None if grads is None else (grads[0][part], grads[1], grads[2]))  # fmt: skip
        if grads is not None:
            _subtract_labels(query, items, labels, weights, grads)
            ctx.save_for_backward(*grads)
            ctx.dtypes = (query.dtype, items.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None)


def _chunk(
    query: Tensor,
    items: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    buffer: Tensor,
    grads: tuple[Tensor, Tensor, Tensor | None] | None,
) -> Tensor:
    """Loss of a chunk of rows; adds the softmax part of the gradients (the labels' part is subtracted at the end)."""
    wide = _wide(query.dtype)
    scores = buffer[: query.shape[0]]
    torch.mm(query, items.t(), out=scores)
    scores = scores.to(wide)
    if bias is not None:
        scores += bias
    label_score = scores.gather(1, labels[:, None])
    highest = scores.amax(dim=1, keepdim=True)
    scores.sub_(highest).exp_()
    norm = scores.sum(dim=1, keepdim=True)
    losses = (highest + norm.log() - label_score).squeeze(1)
    if grads is not None:
        # Scaling the (rows, D) side instead of the scores saves a pass over them.
        row_scale = norm.reciprocal() if weights is None else weights[:, None].to(wide) / norm
        low = scores.to(query.dtype)
        grads[0].copy_(torch.mm(low, items) * row_scale)
        _add_product(grads[1], low.t(), (query * row_scale).to(query.dtype))
        if grads[2] is not None:
            grads[2].addmv_(scores.t(), row_scale.squeeze(1))
    return (losses if weights is None else losses * weights).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def _subtract_labels(
    query: Tensor,
    items: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    scale = torch.ones_like(labels, dtype=grads[1].dtype) if weights is None else weights.to(grads[1].dtype)
    grads[0].sub_(items[labels] * scale[:, None])
    grads[1].index_add_(0, labels, query * scale[:, None], alpha=-1)
    if grads[2] is not None:
        grads[2].index_add_(0, labels, scale, alpha=-1)


def _zeros_like(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor, dtype=dtype)


class _BlockedSoftmax(torch.autograd.Function):
    """Blocks of rows x items: the normaliser is found block by block, the scores again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        items: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        rows: int,
        columns: int,
    ) -> Tensor:
        wide = _wide(query.dtype)
        log_norm = torch.full((query.shape[0],), -torch.inf, dtype=wide, device=query.device)
        for column in range(0, items.shape[0], columns):
            block = slice(column, column + columns)
            for row in range(0, query.shape[0], rows):
                part = slice(row, row + rows)
                scores = _scores(query[part], items[block], None if bias is None else bias[block])
                log_norm[part] = torch.logaddexp(log_norm[part], scores.logsumexp(dim=1))
        label_score = (query.to(wide) * items[labels].to(wide)).sum(dim=1)
        if bias is not None:
            label_score = label_score + bias[labels]
        losses = log_norm - label_score
        ctx.save_for_backward(query, items, bias, labels, weights, log_norm)
        ctx.block = (rows, columns)
        return (losses if weights is None else losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        query, items, bias, labels, weights, log_norm = ctx.saved_tensors
        rows, columns = ctx.block
        wide = log_norm.dtype
        grads = (
            torch.zeros_like(query, dtype=wide), torch.zeros_like(items, dtype=wide), _zeros_like(bias, wide),
        )  # fmt: skip
        for column in range(0, items.shape[0], columns):
            block = slice(column, column + columns)
            for row in range(0, query.shape[0], rows):
                part = slice(row, row + rows)
                scores = _scores(query[part], items[block], None if bias is None else bias[block])
                share = scores.sub_(log_norm[part, None]).exp_()
                if weights is not None:
                    share *= weights[part, None]
                low = share.to(query.dtype)
                _add_product(grads[0][part], low, items[block])
                _add_product(grads[1][block], low.t(), query[part])
                if grads[2] is not None:
                    grads[2][block] += share.sum(dim=0)
        _subtract_labels(query, items, labels, weights, grads)
        dtypes = (query.dtype, items.dtype, None if bias is None else bias.dtype)
        scaled = [
            None if grad is None else grad.mul_(grad_output).to(dtype)
            for grad, dtype in zip(grads, dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _scores(query: Tensor, items: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.mm(query, items.t()).to(_wide(query.dtype))
    return scores if bias is None else scores.add_(bias)


def sampled_softmax_loss(
    query: Tensor,
    positives: Tensor,
    negatives: Tensor,
    labels: Tensor,
    negative_ids: Tensor,
    *,
    bias: tuple[Tensor, Tensor] | None = None,
    log_q: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of each row's positive against it and the row's sampled negatives.

    A negative that is the row's own label is left out. With `log_q` each negative's score is lowered by the log of the
    expected number of times that it is sampled (Bengio and Senecal 2008): their sum then estimates the full softmax's
    sum over all other items. The positive stands for itself and keeps its score.

    Args:
        query: (P, D). A temperature is a factor of it.
        positives: (P, D) rows of the labels.
        negatives: (R, D) shared by all rows, or (P, R, D).
        labels: (P,) int64.
        negative_ids: (R,) or (P, R) int64.
        bias: Biases of the positives (P,) and of the negatives (R,) or (P, R).
        log_q: Log expected counts of the negatives, (R,) or (P, R); None for no correction.
        weights: (P,) weight of each row, or None for ones.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """
    wide = _wide(query.dtype)
    positive = (query * positives).sum(dim=1, keepdim=True).to(wide)
    if negatives.dim() == 2:
        negative = (query @ negatives.t()).to(wide)
    else:
        negative = torch.bmm(negatives, query.unsqueeze(2)).squeeze(2).to(wide)
    if bias is not None:
        positive = positive + bias[0].unsqueeze(1)
        negative = negative + bias[1]
    if log_q is not None:
        negative = negative - log_q
    negative = negative.masked_fill(negative_ids == labels.unsqueeze(1), -torch.inf)
    scores = torch.cat([positive, negative], dim=1)
    losses = F.cross_entropy(scores, torch.zeros_like(labels), reduction="none")
    return (losses if weights is None else losses * weights).sum()
