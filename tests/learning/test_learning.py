"""Models learn: what can be memorised is, what has an order is found, and a seed repeats."""

import lightning as L
import pytest
import torch

from genrec.models import HSTURanking, HSTURetrieval, MLPRanking, PopularityRecommender, SASRec, Task
from tests.helpers import loader, markov_sequences, ranking_batch, retrieval_batch

USERS, ITEMS, LENGTH = 100, 120, 10
STILL = {"dropout": 0.0, "input_dropout": 0.0}


def fit(model, batches, epochs):
    run = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    run.fit(model, loader(batches))
    return run


def random_walks(seed=0):
    """Walks with nothing to generalise; each begins with an item of its own, so that all can be memorised."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(ITEMS, (USERS, LENGTH - 1), generator=generator)
    return torch.cat([torch.arange(USERS).unsqueeze(1), rest], dim=1).tolist()


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (HSTURetrieval, {}),
        (HSTURetrieval, {"form": "production", "similarity": "cosine", "temperature": 0.05, "item_bias": True}),
        (HSTURetrieval, {"loss": "sampled_softmax", "num_negatives": 256, "logq_correction": True}),
        (SASRec, {}),
    ],
)
def test_retrieval_memorises_a_hundred_users(model_class, options):
    L.seed_everything(0, verbose=False)
    walks = random_walks()
    batches = [retrieval_batch(walks[start : start + 25]) for start in range(0, USERS, 25)]
    model = model_class(
        ITEMS, hidden_dim=48, max_seqlen=LENGTH, learning_rate=5e-3, filter_seen=False, **STILL, **options
    )
    run = fit(model, batches, 60)
    (metrics,) = run.validate(model, loader(batches), verbose=False)
    assert metrics["val/loss"] < 0.1
    assert metrics["val/hr@10"] > 0.995


@pytest.mark.parametrize("options", [{}, {"form": "paper", "action_mode": "summed"}])
def test_ranking_memorises_a_hundred_users(options):
    L.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    walks = random_walks()
    actions = torch.randint(3, (USERS, LENGTH), generator=generator).tolist()
    labels = torch.randint(2, (USERS * 4, 2), generator=generator)
    tasks = [Task("click"), Task("stars", "multiclass", num_classes=2)]
    batches = [
        ranking_batch(
            walks[s : s + 25], actions[s : s + 25], [4] * 25, labels[4 * s : 4 * s + 100], users=range(s, s + 25)
        )
        for s in range(0, USERS, 25)
    ]
    model = HSTURanking(
        ITEMS, tasks, action_feature="action", num_actions=3, hidden_dim=48, max_seqlen=LENGTH, learning_rate=1e-2,
        **STILL, **options,
    )  # fmt: skip
    run = fit(model, batches, 80)
    (metrics,) = run.validate(model, loader(batches), verbose=False)
    assert metrics["val/loss"] < 0.05
    assert metrics["val/auc/click"] > 0.999
    assert metrics["val/accuracy/stars"] > 0.99


def test_hstu_finds_the_order_that_popularity_can_not_see():
    L.seed_everything(0, verbose=False)
    walks = markov_sequences(1500, 50, 12)
    train = [retrieval_batch([walk[:-1] for walk in walks[s : s + 50]]) for s in range(0, 1500, 50)]
    test = [retrieval_batch([w[:-1] for w in walks], targets=[w[-1] for w in walks])]
    options = {"max_seqlen": 12, "filter_seen": False, "top_ks": [1, 10]}
    popularity = PopularityRecommender(50, **options)
    (floor,) = fit(popularity, train, 1).test(popularity, loader(test), verbose=False)
    model = HSTURetrieval(50, hidden_dim=32, learning_rate=5e-3, **options)
    (metrics,) = fit(model, train, 12).test(model, loader(test), verbose=False)
    # Four steps in five follow the rule, which no one sees who only counts.
    assert metrics["test/hr@1"] > 0.7
    assert metrics["test/ndcg@10"] > 1.5 * floor["test/ndcg@10"]


def test_ranking_reads_the_history_that_the_perceptron_can_not_see():
    """Every candidate is in the history; the label says whether it is its second item."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(20, (2200, 5), generator=generator)
    same = torch.rand(2200, generator=generator) < 0.5
    candidate = torch.where(same, history[:, 1], history[:, 3])
    labels = (candidate == history[:, 1]).float().unsqueeze(1)
    walks = torch.cat([history, candidate.unsqueeze(1)], dim=1).tolist()

    def batches(start, stop):
        return [
            ranking_batch(walks[s : s + 50], [[0] * 6] * 50, [1] * 50, labels[s : s + 50], users=[0] * 50)
            for s in range(start, stop, 50)
        ]

    auc = {}
    for model_class, options in ((HSTURanking, {"dropout": 0.0}), (MLPRanking, {})):
        L.seed_everything(0, verbose=False)
        model = model_class(
            20, [Task("same")], hidden_dim=32, max_seqlen=6, input_dropout=0.0, learning_rate=5e-3, **options
        )
        (metrics,) = fit(model, batches(0, 2000), 12).test(model, loader(batches(2000, 2200)), verbose=False)
        auc[model_class] = metrics["test/auc/same"]
    assert auc[HSTURanking] > 0.9
    assert auc[MLPRanking] < 0.65


@pytest.mark.parametrize("options", [{}, {"loss": "sampled_softmax"}])
def test_a_seed_repeats_exactly(options):
    walks = markov_sequences(40, 30, 8)
    batches = [retrieval_batch(walks[s : s + 20]) for s in range(0, 40, 20)]

    def train():
        L.seed_everything(5, verbose=False)
        model = HSTURetrieval(30, hidden_dim=16, max_seqlen=8, **options)
        fit(model, batches, 3)
        return model.state_dict()

    first, second = train(), train()
    assert all(torch.equal(first[name], second[name]) for name in first)
