from __future__ import annotations

import pytest
import torch

from genrec.attention import AttentionMask, RelativeBias, attention_spec, time_bucket, time_bucket_edges
from genrec.attention._tiles import exact_bucket
from tests.parity.reference import bucket


def _near_edges() -> torch.Tensor:
    edges = time_bucket_edges(129)
    edges = edges[edges < 2**40]
    return torch.cat([edges - 1, edges, edges + 1, torch.arange(2000)])


@pytest.mark.parametrize("function", [time_bucket, exact_bucket])
@pytest.mark.parametrize("buckets", [1, 2, 16, 129])
def test_buckets_are_exact_at_every_edge(function, buckets: int) -> None:
    distances = torch.cat([_near_edges(), -_near_edges()])
    want = [bucket(d, buckets) for d in distances.tolist()]
    assert function(distances, buckets).tolist() == want


def test_both_bucketings_agree_everywhere() -> None:
    draw = torch.Generator().manual_seed(0)
    distances = (2 ** (torch.rand(200_000, generator=draw, dtype=torch.float64) * 62.9)).long()
    info = torch.iinfo(torch.int64)
    distances = torch.cat([distances, time_bucket_edges(300), torch.tensor([info.min, info.min + 1, info.max, 0])])
    for buckets in (1, 100, 129, 300):
        assert torch.equal(exact_bucket(distances, buckets).long(), time_bucket(distances, buckets))


def test_mask_and_bias_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="target_group_size"):
        AttentionMask(target_group_size=0)
    with pytest.raises(ValueError, match="window"):
        AttentionMask(window=-1)
    with pytest.raises(ValueError, match="2M - 1"):
        RelativeBias(torch.zeros(4), None, None)
    with pytest.raises(ValueError, match="needs timestamps"):
        RelativeBias(None, torch.zeros(4), None)
    with pytest.raises(TypeError, match="int64"):
        RelativeBias(None, torch.zeros(4), torch.zeros(3))


def test_a_trained_bias_needs_gradients():
    q = torch.zeros(3, 2, 4)
    table = torch.zeros(5, requires_grad=True)
    assert not attention_spec(q, q).needs_grad
    assert attention_spec(q, q, bias=RelativeBias(table, None, None)).needs_grad
    assert attention_spec(q, q, bias=torch.zeros(1, 1, 3, 3, requires_grad=True)).needs_grad
    with torch.no_grad():
        assert not attention_spec(q, q, bias=RelativeBias(table, None, None)).needs_grad
