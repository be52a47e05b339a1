"""Optimizers against torch's, exact state, schedules, and what Lightning does with them."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn

from genrec._optimizer_names import step_device
from genrec.embedding import TableOptimizerConfig
from genrec.models import HSTURetrieval
from genrec.models.optim import (
    CombinedOptimizer,
    DenseOptimizerConfig,
    RowWiseAdagrad,
    ScheduleConfig,
    build_scheduler,
    dense_optimizer,
    schedule_factor,
    table_optimizer,
)
from tests.helpers import loader, retrieval_batch


def _parts(seed=0):
    torch.manual_seed(seed)
    return nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))


def _combined(table, matrix, vector, **table_options):
    return CombinedOptimizer(
        {
            "dense": dense_optimizer([matrix, vector], DenseOptimizerConfig(0.01, weight_decay=0.1)),
            "tables.item": table_optimizer(table, TableOptimizerConfig(**table_options)),
        }
    )


def _train(optimizer, parts, steps, start=0, scheduler=None):
    table, matrix, vector = parts
    for step in range(start, start + steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 5, generator=generator)
        ((x @ table @ matrix + vector).tanh().square().sum()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


REFERENCES = {
    "sgd": lambda p: torch.optim.SGD([p], 0.02, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam([p], 0.02, (0.8, 0.99), 1e-6, 0.05),
    "adamw": lambda p: torch.optim.AdamW([p], 0.02, (0.8, 0.99), 1e-6, 0.05),
    "adagrad": lambda p: torch.optim.Adagrad([p], 0.02, eps=1e-6, weight_decay=0.05),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_table_optimizers_are_torchs(name):
    parts, others = _parts(), _parts()
    options = {"name": name, "learning_rate": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.05}
    _train(_combined(*parts, **options), parts, 4)
    groups = [{"params": [others[1]], "weight_decay": 0.1}, {"params": [others[2]], "weight_decay": 0.0}]
    apart = [REFERENCES[name](others[0]), torch.optim.AdamW(groups, lr=0.01)]
    for step in range(4):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(step))
        for optimizer in apart:
            optimizer.zero_grad()
        ((x @ others[0] @ others[1] + others[2]).tanh().square().sum()).backward()
        for optimizer in apart:
            optimizer.step()
    for mine, reference in zip(parts, others, strict=True):
        torch.testing.assert_close(mine, reference)


def test_rowwise_adagrad_is_its_formula():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = RowWiseAdagrad([weight], lr=0.1, eps=1e-3, weight_decay=0.5)
    sums, expected = [0.0, 0.0], weight.detach().clone()
    for grad in (torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.0], [1.0, 1.0]])):
        weight.grad = grad.clone()
        optimizer.step()
        for row in range(2):
            full = grad[row] + 0.5 * expected[row]
            sums[row] += (full**2).mean().item()
            expected[row] -= 0.1 * full / (math.sqrt(sums[row]) + 1e-3)
    torch.testing.assert_close(weight.detach(), expected)


def test_gradients_of_tables_are_clamped():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = table_optimizer(weight, TableOptimizerConfig("sgd", learning_rate=1.0, max_gradient=0.5))
    (weight * torch.tensor([[3.0, -3.0], [0.2, 0.0]])).sum().backward()
    optimizer.step()
    assert weight.tolist() == [[-0.5, 0.5], [pytest.approx(-0.2), 0.0]]


@pytest.mark.parametrize("name", [*REFERENCES, "rowwise_adagrad"])
def test_state_is_exact_and_reaches_the_parts(name):
    parts = _parts()
    optimizer = _combined(*parts, name=name)
    scheduler = build_scheduler(optimizer, ScheduleConfig("linear", 2, 10))
    _train(optimizer, parts, 3, scheduler=scheduler)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    resumed = tuple(nn.Parameter(p.detach().clone()) for p in parts)
    _train(optimizer, parts, 3, 3, scheduler)
    other = _combined(*resumed, name=name)
    other_scheduler = build_scheduler(other, ScheduleConfig("linear", 2, 10))
    other.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[1])
    _train(other, resumed, 3, 3, other_scheduler)
    for mine, reference in zip(resumed, parts, strict=True):
        assert torch.equal(mine, reference)
    assert other.optimizers["tables.item"].param_groups[0] is other.param_groups[-1]


def test_fused_optimizers_follow_the_schedule():
    class Fused(torch.optim.SGD):
        rates: list = []  # noqa: RUF012

        def step(self, closure=None):
            self.rates.append(self.param_groups[0]["lr"])

    parts = _parts()
    fused = Fused([nn.Parameter(torch.zeros(1))], lr=0.5)
    optimizer = CombinedOptimizer({"dense": torch.optim.SGD(parts, lr=1.0)}, [fused])
    scheduler = build_scheduler(optimizer, ScheduleConfig("linear", total_steps=4))
    _train(optimizer, parts, 3, scheduler=scheduler)
    assert fused.rates == [0.5, 0.375, 0.25]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(), [1, 1, 1, 1, 1, 1]),
        (ScheduleConfig("constant", 2), [0.5, 1, 1, 1, 1, 1]),
        (ScheduleConfig("linear", 2, 6, 0.2), [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (ScheduleConfig("cosine", 0, 4), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]),
        (ScheduleConfig("inverse_sqrt", 4), [0.25, 0.5, 0.75, 1, 1, math.sqrt(4 / 5)]),
    ],
)
def test_schedules(config, expected):
    assert [schedule_factor(step, config) for step in range(len(expected))] == pytest.approx(expected)


def test_a_schedule_without_an_end_says_so():
    with pytest.raises(ValueError, match="total_steps"):
        build_scheduler(torch.optim.SGD(_parts(), lr=1.0), ScheduleConfig("cosine"))


def test_weight_decay_spares_vectors():
    table, matrix, vector = _parts()
    optimizer = dense_optimizer([table, matrix, vector], DenseOptimizerConfig(0.1, weight_decay=0.5))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.5), (1, 0.0)]


def test_lightning_sees_one_optimizer():
    """Schedule from the trainer's steps, clipping of all parameters, and all groups reached."""
    norms = []

    class Watched(HSTURetrieval):
        def on_before_optimizer_step(self, optimizer):
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    model = Watched(10, hidden_dim=8, max_seqlen=8, schedule="linear", table_learning_rate=0.5, table_optimizer="sgd")
    batches = [retrieval_batch([[1, 2, 3, 4]])] * 4
    run = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1e-3,
    )  # fmt: skip
    run.fit(model, loader(batches))
    (optimizer,) = run.optimizers
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"dense": 0.0, "tables.item": 0.0}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3, 0.5}
    assert run.global_step == 4
    assert len(norms) == 4


@pytest.mark.parametrize(
    ("option", "device"), [(None, "cpu"), ("foreach", "cpu"), ("fused", "meta"), ("capturable", "meta")]
)
def test_steps_lie_where_their_optimizer_reads_them(option, device):
    other, weight = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.Adam([{"params": [other]}, {"params": [weight]}])
    if option is not None:
        optimizer.param_groups[1][option] = True
    assert step_device(optimizer, weight).type == device
    assert step_device(optimizer, other).type == "cpu"
