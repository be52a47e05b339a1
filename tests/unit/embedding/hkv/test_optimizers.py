"""Fused optimizers against torch's dense ones, on the rows that a batch touches."""

import pytest
import torch

from genrec.embedding.config import InitializerConfig
from genrec.embedding.hkv import DynamicEmbeddingCollection, HkvTable
from genrec.models.optim import CombinedOptimizer, RowWiseAdagrad
from tests.helpers import kjt
from tests.unit.embedding.hkv.tables import config

LR = 0.05
CASES = {
    "sgd": lambda w, decay: torch.optim.SGD([w], lr=LR, weight_decay=decay),
    "adam": lambda w, decay: torch.optim.Adam([w], lr=LR, weight_decay=decay),
    "adamw": lambda w, decay: torch.optim.AdamW([w], lr=LR, weight_decay=decay),
    "adagrad": lambda w, decay: torch.optim.Adagrad([w], lr=LR, eps=1e-8, weight_decay=decay),
    "rowwise_adagrad": lambda w, decay: RowWiseAdagrad([w], lr=LR, eps=1e-8, weight_decay=decay),
}


@pytest.mark.parametrize("dim", [1, 3, 4, 16, 33, 130])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_optimizer(name, decay, dim):
    torch.manual_seed(0)
    table = HkvTable(
        config(dim=dim, optimizer=name, learning_rate=LR, optimizer_arguments={"weight_decay": decay}), seed=1
    )
    keys = torch.arange(20) * 10**12 - 5
    weight = torch.nn.Parameter(table.find_or_insert(keys)[0].clone())
    dense = CASES[name](weight, decay)
    for _ in range(6):
        # Every row in every batch, some of them twice: then dense and lazy optimizers do the same.
        order = torch.cat([torch.randperm(20), torch.randint(0, 20, (15,))])
        gradient = torch.randn(35, dim)
        lookup = table.lookup(keys[order])
        table.update(lookup, gradient, LR)
        weight.grad = torch.zeros_like(weight).index_add_(0, order, gradient)
        dense.step()
    torch.testing.assert_close(table.embed(keys), weight.detach(), rtol=1e-6, atol=1e-6)


def test_untouched_rows_are_left_alone_as_by_sparse_adam():
    torch.manual_seed(0)
    table = HkvTable(config(optimizer="adam", learning_rate=LR), seed=1)
    keys = torch.arange(10)
    weight = torch.nn.Parameter(table.find_or_insert(keys)[0].clone())
    sparse = torch.optim.SparseAdam([weight], lr=LR)
    for _ in range(5):
        order = torch.randperm(10)[:4]
        gradient = torch.randn(4, 4)
        table.update(table.lookup(keys[order]), gradient, LR)
        weight.grad = torch.sparse_coo_tensor(order[None], gradient, weight.shape)
        sparse.step()
    torch.testing.assert_close(table.embed(keys), weight.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_clamped_after_the_sum():
    table = HkvTable(config(learning_rate=1.0, optimizer_arguments={"max_gradient": 0.5}))
    keys = torch.tensor([3, 3, 4])
    before, _ = table.find_or_insert(torch.tensor([3, 4]))
    gradient = torch.tensor([[0.4, -0.4, 0.1, 0.0], [0.4, -0.4, 0.1, 0.0], [9.0, -9.0, 0.3, -0.3]])
    table.update(table.lookup(keys), gradient, 1.0)
    expected = before - torch.tensor([[0.5, -0.5, 0.2, 0.0], [0.5, -0.5, 0.3, -0.3]])
    torch.testing.assert_close(table.embed(torch.tensor([3, 4])), expected)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_rows_are_rounded_once_and_keep_fp32_state(dtype):
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    table = HkvTable(config(dim=32, optimizer="adagrad", dtype=dtype), seed=3)
    reference = HkvTable(config(dim=32, optimizer="adagrad"), seed=3)
    keys = torch.arange(40)
    start = table.find_or_insert(keys)[0]
    exact = reference.find_or_insert(keys)[0]
    assert torch.equal(start, exact.to(torch_dtype).float())
    reference.insert_or_assign(keys, start)
    gradient = torch.randn(40, 32)
    for one in (table, reference):
        one.update(one.lookup(keys), gradient, 0.1)
    assert torch.equal(table.embed(keys), reference.embed(keys).to(torch_dtype).float())
    _, state = table.read_rows(table.find(keys))
    assert torch.equal(state, gradient.square())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_conversion_covers_the_whole_range(dtype):
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    table = HkvTable(config(dim=1, capacity=70_000, dtype=dtype, initial_capacity=70_000, num_choices=2))
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch_dtype).float()
    values = torch.cat([values[values.isfinite()], torch.tensor([1e-30, -1e-8, 65519.0, 3e38, 1.00048828125])])
    keys = torch.arange(values.numel())
    table.insert_or_assign(keys, values[:, None])
    assert torch.equal(table.embed(keys)[:, 0], values.to(torch_dtype).float())


@pytest.mark.parametrize("combined", [False, True])
def test_schedule_reaches_the_next_backward_pass(combined):
    """Two tables of different rates; a warm-up holds from the first step on."""
    one = InitializerConfig("constant", value=1.0)
    tables = DynamicEmbeddingCollection(
        [config("a", initializer=one), config("b", initializer=one, learning_rate=0.3)], seed=0
    )
    fused = tables.fused_optimizer
    optimizer = CombinedOptimizer({}, [fused]) if combined else fused
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.5, 1.0, 0.25][min(step, 2)])
    batch = kjt({"a": [[7]], "b": [[7]]})
    value = {"a": 1.0, "b": 1.0}
    changes = []
    for _ in range(3):
        sum(rows.values().sum() for rows in tables(batch).values()).backward()
        for name, table in tables.tables.items():
            new = table.embed(torch.tensor([7]))[0, 0].item()
            changes.append(value[name] - new)
            value[name] = new
        optimizer.step()
        scheduler.step()
    assert changes == pytest.approx([0.05, 0.15, 0.1, 0.3, 0.025, 0.075], abs=1e-6)
