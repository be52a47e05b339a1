"""Softmax losses against torch's cross-entropy, values and gradients, and the memory that they take."""

import pytest
import torch
import torch.nn.functional as F

from genrec.models.softmax import full_softmax_loss, sampled_softmax_loss


def _case(rows=37, items=53, dim=8, dtype=torch.float64, bias=True, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    table = torch.randn(items, dim, dtype=dtype, requires_grad=True)
    item_bias = torch.randn(items, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(items, (rows,))
    weights = torch.rand(rows, dtype=dtype)
    return query, table, item_bias, labels, weights


def _reference(query, table, bias, labels, weights):
    scores = query @ table.t() if bias is None else query @ table.t() + bias
    losses = F.cross_entropy(scores, labels, reduction="none")
    return (losses if weights is None else losses * weights).sum()


# 53 items: 53 * 64 elements and more go by rows, fewer by blocks of rows and items.
@pytest.mark.parametrize("chunk_elements", [1, 53, 7 * 37, 2000, 53 * 37, 1 << 22])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_full_softmax_equals_cross_entropy(chunk_elements, weighted, bias):
    query, table, item_bias, labels, weights = _case(bias=bias)
    inputs = [t for t in (query, table, item_bias) if t is not None]
    row_weights = weights if weighted else None
    expected = _reference(query, table, item_bias, labels, row_weights)
    expected_grads = torch.autograd.grad(expected * 3, inputs)
    actual = full_softmax_loss(query, table, labels, bias=item_bias, weights=row_weights, chunk_elements=chunk_elements)
    grads = torch.autograd.grad(actual * 3, inputs)
    torch.testing.assert_close(actual, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("chunk_elements", [100, 1 << 22])
def test_full_softmax_survives_large_scores(chunk_elements):
    query, table, _, labels, _ = _case(dtype=torch.float32, bias=False)
    scale = 200.0
    expected = _reference(query * scale, table, None, labels, None)
    actual = full_softmax_loss(query * scale, table, labels, chunk_elements=chunk_elements)
    assert torch.isfinite(actual)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("chunk_elements", [100, 1 << 22])
def test_full_softmax_in_bf16_is_as_near_as_torch(chunk_elements):
    query, table, _, labels, _ = _case(dtype=torch.float32, bias=False)
    exact = torch.autograd.grad(_reference(query, table, None, labels, None), [query, table])
    low = [t.detach().bfloat16().requires_grad_() for t in (query, table)]
    torch_low = torch.autograd.grad(_reference(*low, None, labels, None), low)
    ours = torch.autograd.grad(full_softmax_loss(*low, labels, chunk_elements=chunk_elements), low)
    for ref, theirs, mine in zip(exact, torch_low, ours, strict=True):
        assert (mine - ref).abs().max() <= 2 * (theirs - ref).abs().max()


def test_full_softmax_under_autocast_keeps_parameter_dtype():
    query, table, _, labels, _ = _case(dtype=torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax_loss(query, table, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert query.grad.dtype == table.grad.dtype == torch.float32


def test_full_softmax_of_no_rows_is_zero():
    table = torch.randn(5, 4, requires_grad=True)
    for chunk in (1, 1 << 22):
        loss = full_softmax_loss(torch.zeros(0, 4), table, torch.zeros(0, dtype=torch.long), chunk_elements=chunk)
        (grad,) = torch.autograd.grad(loss, table)
        assert loss == 0
        assert not grad.any()


def test_full_softmax_rejects_labels_of_another_length():
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        full_softmax_loss(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an op returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_a_catalogue_of_a_million_never_stores_its_scores():
    items, dim, rows = 1_000_000, 4, 32
    query = torch.randn(rows, dim, requires_grad=True)
    table = torch.randn(items, dim, requires_grad=True)
    labels = torch.randint(items, (rows,))
    with _LargestTensor() as mode:
        loss = full_softmax_loss(query, table, labels)
        torch.autograd.backward(loss)
    # The table and its gradient are the largest; the scores would be 8 times as large.
    assert mode.largest <= max(items * dim, 1 << 22) < rows * items / 7
    expected = _reference(query.detach(), table.detach(), None, labels, None)
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("with_log_q", [True, False])
def test_sampled_softmax_equals_a_plain_loop(shared, with_log_q):
    torch.manual_seed(1)
    rows, count, items, dim = 6, 5, 7, 4
    table = torch.randn(items, dim, dtype=torch.float64, requires_grad=True)
    bias, log_q = torch.randn(items).double(), torch.randn(items).double()
    query = torch.randn(rows, dim, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(items, (rows,))
    ids = torch.randint(items, (count,) if shared else (rows, count))
    weights = torch.rand(rows, dtype=torch.float64)
    actual = sampled_softmax_loss(
        query, table[labels], table[ids], labels, ids,
        bias=(bias[labels], bias[ids]),
        log_q=log_q[ids] if with_log_q else None,
        weights=weights,
    )  # fmt: skip
    expected = torch.zeros((), dtype=torch.float64)
    score = query @ table.t() + bias
    corrected = score - log_q if with_log_q else score
    for row in range(rows):
        mine = ids if shared else ids[row]
        others = [corrected[row, i] for i in mine.tolist() if i != labels[row]]
        positive = score[row, labels[row]]
        expected = expected + weights[row] * (torch.stack([positive, *others]).logsumexp(0) - positive)
    torch.testing.assert_close(actual, expected)
    for grad, ref in zip(
        torch.autograd.grad(actual, [query, table]), torch.autograd.grad(expected, [query, table]), strict=True
    ):
        torch.testing.assert_close(grad, ref)


def test_log_q_correction_estimates_the_full_softmax():
    torch.manual_seed(2)
    items, rows, draws = 50, 200, 20000
    table, query = torch.randn(items, 4).double() * 0.5, torch.randn(rows, 4).double()
    labels = torch.randint(items, (rows,))
    share = torch.rand(items).double() + 0.1
    share /= share.sum()
    ids = torch.multinomial(share, draws, replacement=True)
    log_q = (share * draws).log()
    actual = sampled_softmax_loss(query, table[labels], table[ids], labels, ids, log_q=log_q[ids])
    expected = _reference(query, table, None, labels, None)
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)
