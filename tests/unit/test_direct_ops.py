from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genrec._ops import op


@op("genrec_test::scaled")
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.sum()


@scaled.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.factor = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])


scaled.register_autograd(lambda ctx, g, _: (g * ctx.factor, None), setup_context=_setup)


@op("genrec_test::joined")
def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _note_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = [len(x) for x in inputs[0]]


joined.register_autograd(lambda ctx, g: list(g.split(ctx.sizes)), setup_context=_note_sizes)


@op("genrec_test::parted")
def parted(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return [part.clone() for part in x.split(sizes)]


parted.register_autograd(lambda ctx, g: (torch.cat(g), None), setup_context=lambda ctx, inputs, output: None)


@op("genrec_test::negated")
def negated(x: Tensor) -> Tensor:
    return -x


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*arguments, **(kwargs or {}))


def test_short_way_and_dispatcher_give_the_same() -> None:
    x = torch.randn(3, requires_grad=True)
    for call in (scaled, scaled.registered):
        y, total = call(x, 2.0)
        assert torch.equal(y, 2 * x)
        assert not total.requires_grad
        (gradient,) = torch.autograd.grad(y.sum(), [x])
        assert torch.equal(gradient, torch.full((3,), 2.0))
    assert "scaled" in scaled(x, 2.0)[0].grad_fn.name()
    with torch.no_grad():
        assert scaled(x, 2.0)[0].grad_fn is None


def test_who_wants_to_see_the_op_sees_it() -> None:
    x = torch.randn(3)
    with _Watch() as watch:
        scaled(x, 2.0)
    assert any("genrec_test.scaled" in name for name in watch.seen)
    torch.library.opcheck(scaled.registered, (torch.randn(3, requires_grad=True), 2.0))
    compiled = torch.compile(lambda x: scaled(x, 2.0)[0] + 1, backend="aot_eager", fullgraph=True)
    leaf = torch.randn(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(compiled(leaf).sum(), [leaf])[0], torch.full((3,), 2.0))


def test_lists_get_their_gradients() -> None:
    parts = [torch.randn(n, requires_grad=True) for n in (2, 3)]
    found = torch.autograd.grad((joined(parts) * torch.arange(5)).sum(), parts)
    assert [x.tolist() for x in found] == [[0.0, 1.0], [2.0, 3.0, 4.0]]
    assert joined([x.detach() for x in parts]).grad_fn is None
    x = torch.arange(5.0, requires_grad=True)
    first, second = parted(x, [2, 3])
    (gradient,) = torch.autograd.grad(first.sum() + 2 * second.sum(), [x])
    assert gradient.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_without_a_derivative_it_says_so() -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="negated"):
        torch.autograd.grad(negated(x).sum(), [x])
    assert torch.equal(negated(x.detach()), -x)
