from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genrec.layers.jagged import jagged_concat, jagged_interleave, jagged_split, select_rows, where_true
from genrec.layers.ops import get_layer_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton", "auto"]


def _jagged(lengths: list[int], start: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows that name themselves, their offsets, and each sequence."""
    rows = (torch.arange(sum(lengths) * 3, dtype=torch.float32) + start).view(-1, 3).to(DEVICE)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], device=DEVICE)
    return rows.requires_grad_(), offsets, list(rows.split(lengths))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths",
    [[[2, 0, 3], [1, 4, 0], [0, 0, 2]], [[0, 0], [3, 1]], [[5]], [[], []], [[0, 0], [0, 0]]],
)
def test_concat_and_split(lengths: list[list[int]], backend: str) -> None:
    parts = [_jagged(own, 100 * i) for i, own in enumerate(lengths)]
    joined, offsets = jagged_concat([p[0] for p in parts], [p[1] for p in parts], backend=backend)
    want = [torch.cat(sequences) for sequences in zip(*(p[2] for p in parts), strict=True)]
    assert offsets.diff().tolist() == [len(w) for w in want]
    assert torch.equal(joined, torch.cat(want) if want else joined[:0])
    back = jagged_split(joined, [p[1] for p in parts], [p[0].shape[0] for p in parts], backend=backend)
    assert all(torch.equal(a, p[0]) for a, p in zip(back, parts, strict=True))
    total = sum(((i + 1) * part).square().sum() for i, part in enumerate(back))
    for i, gradient in enumerate(torch.autograd.grad(total, [p[0] for p in parts])):
        torch.testing.assert_close(gradient, 2 * (i + 1) ** 2 * parts[i][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("first", "second"), [([3, 0, 2, 4], [3, 0, 2, 1]), ([1, 2], [3, 0]), ([0], [2])])
def test_interleave(first: list[int], second: list[int], backend: str) -> None:
    a, a_offsets, a_parts = _jagged(first, 0)
    b, b_offsets, b_parts = _jagged(second, 1000)
    joined, offsets = jagged_interleave(a, a_offsets, b, b_offsets, backend=backend)
    want = []
    for one, other in zip(a_parts, b_parts, strict=True):
        for k in range(max(len(one), len(other))):
            want += [part[k] for part in (one, other) if k < len(part)]
    assert torch.equal(joined, torch.stack(want))
    assert offsets.diff().tolist() == [m + n for m, n in zip(first, second, strict=True)]
    (gradient,) = torch.autograd.grad((joined[:, 0] * torch.arange(len(joined), device=DEVICE)).sum(), [b])
    assert gradient[:, 0].tolist() == [i for i, row in enumerate(want) if row[0] >= 1000]


def test_parts_that_don_t_fit_are_errors() -> None:
    x, offsets, _ = _jagged([2, 1], 0)
    with pytest.raises(ValueError, match="Each part needs offsets"):
        jagged_concat([x], [offsets, offsets])
    with pytest.raises(ValueError, match="Each part needs offsets"):
        jagged_interleave(x, offsets, x, offsets[:2])
    with pytest.raises(ValueError, match=r"x has 3 rows, its parts would have 2 \+ 2"):
        jagged_split(x, [offsets], [2, 2])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_encodings_of_both_backends(p: float) -> None:
    torch.manual_seed(0)
    x, positions, times = (torch.randn(n, 16, device=DEVICE) for n in (30, 9, 5))
    encodings = [
        (positions, torch.randint(0, 9, (30,), device=DEVICE)),
        (times, torch.randint(0, 5, (30,), device=DEVICE)),
    ]
    results = [get_layer_ops(name).add_encodings(x, 4.0, encodings, p, True) for name in ("torch", "triton")]
    if p:
        for y in results:
            kept = y != 0
            assert 0.3 < kept.float().mean() < 0.7
            want = (x * 4 + positions[encodings[0][1]] + times[encodings[1][1]]) * 2
            torch.testing.assert_close(y[kept], want[kept])
    else:
        torch.testing.assert_close(*results)
    for name in ("torch", "triton"):
        assert get_layer_ops(name).add_encodings(x, 1.0, [], p, False) is x


def test_select_rows_has_the_gradient_of_indexing() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    index = torch.tensor([5, 0, 6, 2], device=DEVICE)
    assert torch.equal(select_rows(x, index), x[index])
    assert torch.autograd.gradcheck(select_rows, (x, index))


@pytest.mark.parametrize("chosen", [[], [False], [True], [False, True, True, False, True], [True] * 4])
def test_where_true_is_nonzero(chosen: list[bool]) -> None:
    mask = torch.tensor(chosen, dtype=torch.bool, device=DEVICE)
    assert where_true(mask, sum(chosen)).tolist() == where_true(mask).tolist()


@pytest.mark.skipif(DEVICE == "cuda", reason="there the device fails, and all tests after it")
@pytest.mark.parametrize("count", [1, 3])
def test_where_true_wants_the_right_count(count: int) -> None:
    with pytest.raises(RuntimeError, match=f"{count} labels don't fit"):
        where_true(torch.tensor([True, False, True]), count)
