"""How rows start."""

import math

import pytest
import torch

from genrec.embedding.config import InitializerConfig
from genrec.embedding.hkv import HkvTable
from tests.unit.embedding.hkv.tables import config

KEYS = torch.arange(-20_000, 20_000) * 7919


def rows(initializer: InitializerConfig, seed: int = 0, name: str = "items", keys: torch.Tensor = KEYS) -> torch.Tensor:
    return HkvTable(config(name, dim=8, capacity=2**17, initializer=initializer), seed=seed).embed(keys)


def test_depends_on_seed_table_and_key_alone():
    init = InitializerConfig("normal", std=1.0)
    first = rows(init)
    shuffle = torch.randperm(KEYS.numel())
    assert torch.equal(rows(init, keys=KEYS[shuffle]), first[shuffle])
    inserted, _ = HkvTable(config(dim=8, capacity=2**17, initializer=init), world_size=1).find_or_insert(KEYS[shuffle])
    assert torch.equal(inserted, first[shuffle])
    for other in (rows(init, seed=1), rows(init, name="users")):
        assert (other == first).float().mean() < 1e-4
    assert first.unique().numel() > 0.99 * first.numel()


@pytest.mark.parametrize("name", ["normal", "truncated_normal"])
def test_normal_rows_have_the_right_distribution(name):
    values = rows(InitializerConfig(name, mean=1.0, std=2.0)).double().flatten().sort().values
    standard = (values - 1.0) / 2.0
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    cdf = normal.cdf(standard)
    if name == "truncated_normal":
        assert standard.abs().max() <= 2.0
        low = normal.cdf(torch.tensor(-2.0).double())
        cdf = (cdf - low) / (1 - 2 * low)
    empirical = (torch.arange(values.numel()) + 0.5) / values.numel()
    # Kolmogorov's distance; 1.95 / sqrt(n) is passed with probability 0.001.
    assert (cdf - empirical).abs().max() < 1.95 / math.sqrt(values.numel())


def test_uniform_rows_have_the_right_distribution():
    values = rows(InitializerConfig("uniform", low=-0.5, high=1.5)).double().flatten().sort().values
    assert values[0] >= -0.5
    assert values[-1] <= 1.5
    empirical = (torch.arange(values.numel()) + 0.5) / values.numel()
    assert ((values + 0.5) / 2 - empirical).abs().max() < 1.95 / math.sqrt(values.numel())


def test_elements_and_neighbouring_keys_are_not_correlated():
    values = rows(InitializerConfig("normal", std=1.0))
    correlation = torch.corrcoef(torch.cat([values[:-1].T, values[1:].T]))
    assert (correlation - torch.eye(16)).abs().max() < 0.03


def test_constant_and_xavier():
    assert torch.equal(rows(InitializerConfig("constant", value=0.25)), torch.full((KEYS.numel(), 8), 0.25))
    bound = math.sqrt(6 / (2**17 + 8))
    xavier = rows(InitializerConfig("xavier_uniform"))
    assert xavier.abs().max() <= bound * (1 + 1e-6)
    assert xavier.abs().max() > 0.99 * bound


def test_unknown_keys_may_get_a_constant():
    table = HkvTable(config(unknown=0.0), seed=0)
    table.find_or_insert(torch.tensor([1]))
    out = table.embed(torch.tensor([1, 2]))
    assert out[0].abs().sum() > 0
    assert torch.equal(out[1], torch.zeros(4))


def test_evicted_keys_start_anew_with_fresh_optimizer_state():
    table = HkvTable(config(capacity=128, optimizer="adagrad"), seed=0)
    key = torch.tensor([5])
    start, _ = table.find_or_insert(key)
    table.update(table.lookup(key), torch.ones(1, 4), 0.1)
    table.find_or_insert(torch.arange(1000, 1128))
    assert not table.contains(key).item()
    again, found = table.find_or_insert(key)
    assert not found.item()
    assert torch.equal(again, start)
    assert torch.equal(table.read_rows(table.find(key))[1], torch.zeros(1, 4))
