"""The kernels of the Triton layer backend against plain torch in fp64, by the bound of `tests.parity.grid`.

Without a GPU they run in Triton's interpreter, on small shapes; the cases marked gpu are of real size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.layers.triton import encodings, gate
from genrec.layers.triton.encodings import add_encodings, sum_rows_by_index
from genrec.layers.triton.gate import gated_product
from genrec.layers.triton.norm import layer_norm
from genrec.layers.triton.rows import place_rows, take_rows
from genrec.layers.triton.silu import SplitActivated
from tests.parity.grid import BACKWARD_FACTOR, FORWARD_FACTOR, check_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Shape:
    rows: int
    heads: int
    v_dim: int
    qk_dim: int
    strided: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.heads}x{self.v_dim}x{self.qk_dim}{'-strided' if self.strided else ''}"


SMALL = [
    Shape(37, 2, 16, 8),
    Shape(19, 3, 25, 50, True),
    Shape(5, 1, 130, 1),
    Shape(1, 4, 1, 3),
    Shape(0, 2, 8, 8),
    Shape(3, 32, 256, 8),
]
REAL = [Shape(5000, 4, 256, 256), Shape(3001, 8, 128, 64, True), Shape(700, 32, 256, 128), Shape(4099, 2, 50, 25)]
SHAPES = [*SMALL, *(pytest.param(s, marks=pytest.mark.gpu) for s in REAL)]


def _normal(*shape: int, strided: bool = False) -> Tensor:
    """Numbers around 1, in a view with gaps where `strided`."""
    if strided:
        return torch.randn(*shape[:-1], 2 * shape[-1] + 3, dtype=torch.float64)[..., 3::2] + 0.5
    return torch.randn(*shape, dtype=torch.float64) + 0.5


def assert_parity(
    kernel: Callable[..., tuple[Tensor, ...]],
    twin: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    table_dtype: torch.dtype | None = None,
) -> None:
    """Outputs and gradients of `kernel` against `twin` in fp64, both called with the tensors of `inputs` in order."""
    rounded = {
        name: x.to(DEVICE, table_dtype or dtype if name in ("weight", "bias") else dtype) for name, x in inputs.items()
    }
    rounded = {name: _gapped(x, inputs[name]) for name, x in rounded.items()}

    def run(function: Callable[..., tuple[Tensor, ...]], kind: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(kind) if kind else x.detach() for x in rounded.values()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        outs = function(*leaves)
        upstream = [w.to(out.dtype) for w, out in zip(weights, outs, strict=True)] if weights else []
        if not weights:
            torch.manual_seed(1)
            weights.extend(torch.randn(out.shape, dtype=torch.float64).to(DEVICE, dtype) for out in outs)
            upstream = [w.to(out.dtype) for w, out in zip(weights, outs, strict=True)]
        gradients = torch.autograd.grad(outs, leaves, upstream, allow_unused=True, materialize_grads=True)
        return [t.detach().double().cpu() for t in (*outs, *gradients)]

    weights: list[Tensor] = []
    got = run(kernel, None)
    want, low = run(twin, torch.float64), run(twin, dtype)
    outputs = len(got) - len(inputs)
    names = [f"out{i}" for i in range(outputs)] + [f"d_{name}" for name in inputs]
    for i, (name, x, reference, lowered) in enumerate(zip(names, got, want, low, strict=True)):
        check_error(name, x, reference, lowered, FORWARD_FACTOR if i < outputs else BACKWARD_FACTOR, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "width", "table_rows"),
    [(50, 24, 7), (300, 5, 2), (9, 1030, 40), (0, 8, 3), pytest.param(9001, 1024, 2048, marks=pytest.mark.gpu)],
)
def test_add_encodings(rows: int, width: int, table_rows: int, tables: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = {"x": _normal(rows, width, strided=True)}
    inputs |= {f"table{i}": _normal(table_rows + i, width) for i in range(tables)}
    # Indices as ages have them: most rows share a few, and some are read by none.
    indices = [(torch.rand(rows) ** 3 * (table_rows + i)).long().to(DEVICE) for i in range(tables)]

    def kernel(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        return (add_encodings(x, list(weights), indices, None, 5.5, 0.0),)

    def twin(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        return (x * 5.5 + sum(F.embedding(i, w) for i, w in zip(indices, weights, strict=True)),)

    assert_parity(kernel, twin, inputs, dtype)


@pytest.mark.parametrize("piece", [4, 128])
def test_table_gradients_don_t_depend_on_the_order_of_work(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grad, index = torch.randn(70, 20, device=DEVICE), torch.randint(0, 6, (70,), device=DEVICE)
    index[:30] = 2
    monkeypatch.setattr(encodings, "PIECE", piece)
    got = sum_rows_by_index(grad, index, 9, torch.float32)
    torch.testing.assert_close(got, torch.zeros(9, 20, device=DEVICE).index_add(0, index, grad))
    assert (got[6:] == 0).all()
    assert torch.equal(got, sum_rows_by_index(grad, index, 9, torch.float32))


def test_encodings_drop_the_same_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(40, 1040, device=DEVICE, requires_grad=True)
    table = torch.ones(3, 1040, device=DEVICE, requires_grad=True)
    index = torch.randint(0, 3, (40,), device=DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    y = add_encodings(one, [table], [index], seed, 2.0, 0.25)
    mask = (y > 0).float() / 0.75
    assert abs(mask.mean() - 1) < 0.02
    torch.testing.assert_close(y, mask * 3)
    d_one, d_table = torch.autograd.grad(y.sum(), [one, table])
    torch.testing.assert_close(d_one, mask * 2)
    torch.testing.assert_close(d_table, torch.zeros_like(table).index_add(0, index, mask))
    monkeypatch.setattr(encodings, "tile", lambda width, per_thread=16: (8, 256, 2))
    assert torch.equal(y, add_encodings(one, [table], [index], seed, 2.0, 0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, pytest.param(1024, marks=pytest.mark.gpu)])
def test_rows_go_to_their_places_and_back(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    order = torch.randperm(45, device=DEVICE)
    places = [order[:20], order[20:20], order[20:], order[:0]]
    pool = [_normal(len(p), width, strided=True).to(DEVICE, dtype).requires_grad_() for p in places]
    joined = place_rows(pool, places)
    for part, place in zip(pool, places, strict=True):
        assert torch.equal(joined[place], part)
    upstream = torch.randn_like(joined)
    for gradient, place in zip(torch.autograd.grad(joined, pool, upstream), places, strict=True):
        assert torch.equal(gradient, upstream[place])
    whole = joined.detach().requires_grad_()
    parts = take_rows(whole, places)
    assert all(torch.equal(a, b) for a, b in zip(parts, pool, strict=True))
    (back,) = torch.autograd.grad(parts, [whole], [torch.full_like(part, 1 + i) for i, part in enumerate(parts)])
    for i, place in enumerate(places):
        assert (back[place] == 1 + i).all()


def _gapped(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`, which .to() may have made dense."""
    if x.stride() == like.stride() or like.is_contiguous():
        return x
    base = x.new_zeros((*like.shape[:-1], 2 * like.shape[-1] + 3))[..., 3::2]
    return base.copy_(x)


def _norm_twin(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float = 1e-6) -> Tensor:
    """(T, width) -> (T, width), each group on its own."""
    grouped = x.unflatten(-1, (groups, -1))
    y = F.layer_norm(grouped, grouped.shape[-1:], eps=eps)
    if weight is not None and bias is not None:
        shape = (groups, -1) if weight.numel() == x.shape[-1] else (groups, 1)
        y = y * weight.view(shape) + bias.view(shape)
    return y.flatten(-2)


def _affine(kind: str, heads: int, width: int) -> dict[str, Tensor]:
    count = {"none": 0, "column": width, "group": heads}[kind]
    return {"weight": _normal(count), "bias": _normal(count)} if count else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "column", "group"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    width, groups = shape.heads * shape.v_dim, shape.heads if kind == "group" else 1
    torch.manual_seed(0)
    inputs = {"x": _normal(shape.rows, width, strided=shape.strided), **_affine(kind, shape.heads, width)}

    def kernel(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor]:
        return (layer_norm(x, weight, bias, groups, 1e-6, dtype)[0],)

    def twin(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor]:
        return (_norm_twin(x, weight, bias, groups),)

    assert_parity(kernel, twin, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("kind", ["none", "column", "group", "elsewhere"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_product(shape: Shape, kind: str, concat: bool, dtype: torch.dtype) -> None:
    width, groups = shape.heads * shape.v_dim, shape.heads if kind == "group" else 1
    torch.manual_seed(0)
    size = (shape.rows, shape.heads, shape.v_dim)
    inputs = {"a": _normal(*size, strided=shape.strided), "u": _normal(*size, strided=shape.strided)}
    if kind == "elsewhere":
        inputs["normed"] = _normal(shape.rows, width, strided=shape.strided)
    else:
        inputs |= _affine(kind, shape.heads, width)

    def kernel(a: Tensor, u: Tensor, *rest: Tensor) -> tuple[Tensor]:
        normed = rest[0] if kind == "elsewhere" else None
        weight, bias = rest if len(rest) == 2 else (None, None)
        return (gated_product(a, u, normed, weight, bias, None, groups, 1e-6, 0.0, concat, True, dtype)[0],)

    def twin(a: Tensor, u: Tensor, *rest: Tensor) -> tuple[Tensor]:
        weight, bias = rest if len(rest) == 2 else (None, None)
        n = rest[0] if kind == "elsewhere" else _norm_twin(a.flatten(1), weight, bias, groups)
        gated = F.silu(u) * n.view_as(a)
        return ((torch.cat([F.silu(u), a, gated], -1) if concat else gated).flatten(1),)

    assert_parity(kernel, twin, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_u", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_activated(shape: Shape, silu: bool, keep_u: bool, dtype: torch.dtype) -> None:
    parts = [shape.v_dim, shape.v_dim, shape.qk_dim, shape.qk_dim]
    torch.manual_seed(0)
    inputs = {"y": _normal(shape.rows, shape.heads * sum(parts), strided=shape.strided)}

    def kernel(y: Tensor) -> tuple[Tensor, ...]:
        return SplitActivated.apply(y, shape.v_dim, shape.qk_dim, silu, keep_u)

    def twin(y: Tensor) -> tuple[Tensor, ...]:
        u, *others = y.unflatten(-1, (shape.heads, -1)).split(parts, -1)
        return u, *(F.silu(part) if silu else part for part in others)

    assert_parity(kernel, twin, inputs, dtype)


def test_views_are_not_copies() -> None:
    y = torch.randn(6, 2 * 24, device=DEVICE)
    for part in SplitActivated.apply(y, 8, 4, False, False):
        assert part.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    u, v, q, k = SplitActivated.apply(y, 8, 4, True, False)
    assert u.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert v.untyped_storage().data_ptr() == q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    u = SplitActivated.apply(y, 8, 4, True, True)[0]
    assert u.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_result_in_another_dtype(dtype: torch.dtype) -> None:
    """Under autocast the residual stream and the weights are fp32, and the kernels write what the projection reads."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*size, device=DEVICE) for size in ((9, 48), (48,), (48,)))
    y = layer_norm(x, w, b, 1, 1e-6, dtype)[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.layer_norm(x, (48,), w, b, 1e-6).to(dtype), rtol=2**-7, atol=1e-6)


def _masks(rows: int, heads: int, dim: int, p: float, seed: int, groups: int = 1) -> Tensor:
    """(rows, heads, 3, dim): what is kept of u, a and u * norm(a), as 0 and the factor."""
    one = torch.ones(rows, heads, dim, device=DEVICE)
    key = torch.tensor([seed], device=DEVICE)
    y = gated_product(one, one, one.flatten(1), None, None, key, groups, 0.0, p, True, False, torch.float32)[0]
    return y.unflatten(1, (heads, 3, dim))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p: float) -> None:
    kept = _masks(96, 4, 32, p, seed=2**40 + 5)
    factor = kept.max().item()
    assert abs(factor - 1 / (1 - p)) < 1e-3
    assert set(kept.unique().tolist()) == {0.0, factor}
    bits = (kept > 0).double()
    n = bits.numel()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(bits.mean() - (1 - p)) < 4 * deviation / n**0.5
    for dims in ((0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3)):  # by column, row, head and part
        means = bits.mean(dims)
        assert (means - (1 - p)).abs().max() < 5 * deviation / (n / means.numel()) ** 0.5
    z = (bits - (1 - p)) / deviation
    for dim in range(4):  # neighbours don't know of each other
        product = z.narrow(dim, 1, z.shape[dim] - 1) * z.narrow(dim, 0, z.shape[dim] - 1)
        assert abs(product.mean()) < 4 / product.numel() ** 0.5
    other = (_masks(96, 4, 32, p, seed=2**40 + 6) > 0).double()
    assert abs((z * (other - (1 - p)) / deviation).mean()) < 4 / n**0.5


def test_dropout_is_a_function_of_seed_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    want = _masks(40, 2, 24, 0.3, seed=7)
    assert torch.equal(want, _masks(40, 2, 24, 0.3, seed=7))
    assert torch.equal(want[:13], _masks(13, 2, 24, 0.3, seed=7))
    assert not torch.equal(want, _masks(40, 2, 24, 0.3, seed=7 + 2**32))
    for rows in (1, 2, 16):
        monkeypatch.setattr(gate, "tile", lambda width, per_thread=16, rows=rows: (rows, 64, 1))
        assert torch.equal(want, _masks(40, 2, 24, 0.3, seed=7))


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("kind", ["none", "column", "group", "elsewhere"])
def test_dropout_has_the_same_mask_backward(kind: str, concat: bool) -> None:
    rows, heads, dim, p, seed = 21, 2, 24, 0.4, 11
    groups = heads if kind == "group" else 1
    masks = _masks(rows, heads, dim, p, seed, groups)
    key = torch.tensor([seed], device=DEVICE)
    torch.manual_seed(0)
    inputs = {"a": _normal(rows, heads, dim), "u": _normal(rows, heads, dim)}
    inputs |= {"normed": _normal(rows, heads * dim)} if kind == "elsewhere" else _affine(kind, heads, heads * dim)

    def kernel(a: Tensor, u: Tensor, *rest: Tensor) -> tuple[Tensor]:
        normed = rest[0] if kind == "elsewhere" else None
        weight, bias = rest if len(rest) == 2 else (None, None)
        return (gated_product(a, u, normed, weight, bias, key, groups, 1e-6, p, concat, False, a.dtype)[0],)

    def twin(a: Tensor, u: Tensor, *rest: Tensor) -> tuple[Tensor]:
        weight, bias = rest if len(rest) == 2 else (None, None)
        n = rest[0] if kind == "elsewhere" else _norm_twin(a.flatten(1), weight, bias, groups)
        gated = u * n.view_as(a)
        y = torch.stack([u, a, gated], 2) * masks.to(a.dtype) if concat else gated * masks[:, :, 2].to(a.dtype)
        return (y.flatten(1),)

    assert_parity(kernel, twin, inputs, torch.float32)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2**30 elements apart: the third begins where 32 bits end. Untouched memory costs nothing on the CPU."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    near = torch.randn(3, 64, device=DEVICE).bfloat16()
    far.copy_(near)
    leaves = [x.requires_grad_() for x in (far, near)]
    outs = [layer_norm(x, None, None, 2, 1e-6, x.dtype)[0] for x in leaves]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(y, x, x.detach())[0] for x, y in zip(leaves, outs, strict=True)))
    places = [torch.tensor([2, 0], device=DEVICE), torch.tensor([1], device=DEVICE)]
    assert torch.equal(torch.cat(take_rows(far.detach(), places)), near[[2, 0, 1]])
    parts = [x.detach().view(3, 2, 32) if x is near else x.detach().unflatten(1, (2, 32)) for x in leaves]
    products = [gated_product(a, a, None, None, None, None, 1, 1e-6, 0.0, True, True, a.dtype)[0] for a in parts]
    assert torch.equal(*products)


@pytest.mark.gpu
def test_more_than_32_bits_of_elements() -> None:
    """Contiguous tensors of 2**31 elements and more, written and read."""
    rows = 2**21 + 3
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    y = layer_norm(x, None, None, 1, 1e-6, x.dtype)[0]
    (dx,) = torch.autograd.grad(y, x, x.detach())
    tail = x.detach()[-5:].clone().requires_grad_()
    want = layer_norm(tail, None, None, 1, 1e-6, x.dtype)[0]
    assert torch.equal(y[-5:], want)
    assert torch.equal(dx[-5:], torch.autograd.grad(want, tail, tail.detach())[0])
