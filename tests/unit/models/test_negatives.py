"""Negative samplers: what is drawn, how often, and what is said of it."""

import pytest
import torch

from genrec.models.negatives import NegativeSampler

LABELS = torch.tensor([0, 0, 0, 4])
COUNTS = torch.tensor([1, 0, 2, 3, 4])
SHARES = {
    "uniform": torch.full((5,), 0.2),
    "popularity": COUNTS / 10,
    "in_batch": torch.tensor([0.75, 0, 0, 0, 0.25]),
}


def sampler(sampling, number=20000, shared=True):
    return NegativeSampler(5, number, sampling, shared, COUNTS if sampling == "popularity" else None)


@pytest.mark.parametrize("sampling", SHARES)
def test_draws_follow_their_shares(sampling):
    torch.manual_seed(0)
    ids = sampler(sampling).sample(LABELS)
    torch.testing.assert_close(torch.bincount(ids, minlength=5) / 20000, SHARES[sampling], atol=0.015, rtol=0)


@pytest.mark.parametrize("sampling", SHARES)
def test_expected_counts_are_number_times_share(sampling):
    drawn = SHARES[sampling].nonzero().squeeze(1)
    actual = sampler(sampling, 30).log_expected_count(drawn, LABELS)
    torch.testing.assert_close(actual, (30 * SHARES[sampling][drawn]).log())


@pytest.mark.parametrize("sampling", SHARES)
@pytest.mark.parametrize(("shared", "shape"), [(True, (7,)), (False, (4, 7))])
def test_shapes_and_seed(sampling, shared, shape):
    one = sampler(sampling, 7, shared)
    torch.manual_seed(1)
    first = one.sample(LABELS)
    torch.manual_seed(1)
    assert first.shape == shape
    assert torch.equal(one.sample(LABELS), first)
    assert one.sample(LABELS[:0]).shape[-1] == 7


def test_counts_travel_in_checkpoints():
    fresh = NegativeSampler(5, 8, "popularity")
    assert fresh.needs_counts
    fresh.load_state_dict(sampler("popularity").state_dict())
    assert not fresh.needs_counts
    assert 1 not in fresh.sample(LABELS).tolist()
    fresh.set_counts(torch.tensor([0, 1, 0, 0, 0]))
    assert set(fresh.sample(LABELS).tolist()) == {1}


@pytest.mark.parametrize("counts", [torch.ones(4), torch.zeros(5), torch.tensor([1, 1, 1, 1, -1])])
def test_bad_counts_say_so(counts):
    with pytest.raises(ValueError, match=r"item_counts: \(5,\)"):
        NegativeSampler(5, 8, "popularity", counts=counts)
