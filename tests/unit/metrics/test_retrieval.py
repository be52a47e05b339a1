"""HR, NDCG, MRR and Recall against hand-made cases and a plain loop."""

import math

import pytest
import torch

from genrec.metrics import MRR, NDCG, HitRate, Recall, retrieval_metrics


def value(metric, *args, **kwargs):
    metric.update(*args, **kwargs)
    return metric.compute().item()


@pytest.mark.parametrize(("rank", "hit"), [(1, 1.0), (9, 1.0), (10, 1.0), (11, 0.0)])
def test_rank_k_itself_is_a_hit(rank, hit):
    ranks = torch.tensor([rank])
    assert value(HitRate(10), ranks) == hit
    assert value(Recall(10), ranks) == hit
    assert value(NDCG(10), ranks) == pytest.approx(hit / math.log2(rank + 1))
    assert value(MRR(10), ranks) == pytest.approx(hit / rank)


@pytest.mark.parametrize("absent", [torch.tensor([0]), torch.tensor([-1]), torch.tensor([math.nan])])
def test_an_absent_target_earns_nothing_but_counts(absent):
    for metric in (HitRate(10), NDCG(10), MRR(), Recall(10)):
        metric.update(torch.ones(1))
        metric.update(absent)
        assert metric.compute().item() == 0.5


def test_an_infinite_rank_earns_nothing():
    assert value(MRR(), torch.tensor([math.inf, 2.0])) == 0.25


def test_hand_made_values():
    ranks = torch.tensor([1, 3, 7, 100])
    assert value(HitRate(5), ranks) == 0.5
    assert value(NDCG(5), ranks) == pytest.approx((1 + 0.5) / 4)
    assert value(MRR(), ranks) == pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 100) / 4)


def test_a_plain_loop_agrees():
    ranks = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    hits = gains = reciprocal = 0.0
    for rank in ranks.tolist():
        if 1 <= rank <= 10:
            hits += 1
            gains += 1 / math.log2(rank + 1)
        if rank >= 1:
            reciprocal += 1 / rank
    collection = retrieval_metrics([10], prefix="val/")
    for part in ranks.split(77):
        collection.update(part)
    result = {key: metric.item() for key, metric in collection.compute().items()}
    assert result == pytest.approx({"val/hr@10": hits / 500, "val/ndcg@10": gains / 500, "val/mrr": reciprocal / 500})


def test_weights():
    assert value(HitRate(1), torch.tensor([1, 2]), torch.tensor([3.0, 1.0])) == 0.75


def test_without_cases_the_value_is_nan():
    metric = HitRate(10)
    metric.update(torch.empty(0, dtype=torch.int64))
    assert math.isnan(metric.compute().item())


@pytest.mark.parametrize("compute_groups", [True, False])
def test_members_of_a_collection_do_not_share_counts(compute_groups):
    """Torchmetrics merges members whose states look alike after the first batch, here all zero."""
    from torchmetrics import MetricCollection

    collection = MetricCollection({"a": HitRate(1), "b": HitRate(10)}, compute_groups=compute_groups)
    collection.update(torch.tensor([50]))
    collection.update(torch.tensor([5]))
    assert {key: metric.item() for key, metric in collection.compute().items()} == {"a": 0.0, "b": 0.5}


def test_recall_with_several_relevant_items():
    ranks = torch.tensor([[1, 4, 11], [10, 0, 0], [30, 31, 32]])
    assert value(Recall(10), ranks) == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert value(Recall(10), ranks, torch.tensor([4, 1, 3])) == pytest.approx((2 / 4 + 1 + 0) / 3)


def test_recall_leaves_out_cases_without_relevant_items():
    assert value(Recall(10), torch.tensor([[1], [0]]), torch.tensor([1, 0])) == 1.0


def test_recall_refuses_more_hits_than_relevant_items():
    with pytest.raises(ValueError, match="num_relevant"):
        Recall(10).update(torch.tensor([[1, 2]]), torch.tensor([1]))


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1"):
        HitRate(0)
    with pytest.raises(ValueError, match=r"ranks \(3,\), weights \(2,\)"):
        HitRate(1).update(torch.ones(3), torch.ones(2))


def test_reset():
    metric = HitRate(1)
    metric.update(torch.tensor([1]))
    metric.reset()
    assert value(metric, torch.tensor([2])) == 0.0
