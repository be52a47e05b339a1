"""Retrieval models: losses, evaluation by hand-made cases, recommend, saving."""

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genrec.models import HSTURetrieval, PopularityRecommender, PredictionWriter, SASRec
from genrec.models.catalogue import Seen, target_ranks, top_items
from tests.helpers import loader, markov_sequences, retrieval_batch

SMALL = {"hidden_dim": 16, "max_seqlen": 12, "dropout": 0.0, "input_dropout": 0.0}
SEQUENCES = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 0, 1]]


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


class _Fixed(HSTURetrieval):
    """Scores every item with fixed numbers, whatever the history."""

    def __init__(self, scores, **options):
        self.fixed = scores
        super().__init__(num_items=len(scores), **{**SMALL, **options})

    def catalogue(self):
        return torch.tensor(self.fixed).unsqueeze(1) * F.one_hot(torch.tensor(0), self.hidden_dim)

    def build_head(self):
        return _One()


class _One(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


# Ranks and filtering, by hand.


def test_rank_counts_ties_against_the_target():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    items = scores.t().contiguous()
    targets = torch.tensor([0, 2, 5])
    assert target_ranks(torch.ones(3, 1), items, targets).tolist() == [1, 4, 6]


def test_seen_items_do_not_compete_but_a_seen_target_does():
    items = torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    query = torch.ones(3, 1)
    targets = torch.tensor([2, 2, 0])
    seen = Seen(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 2, 0, 1]))
    assert target_ranks(query, items, targets, seen=seen).tolist() == [2, 3, 1]
    assert target_ranks(query, items, targets).tolist() == [3, 3, 1]


def test_ranks_do_not_depend_on_chunks(monkeypatch):
    torch.manual_seed(0)
    query, items, targets = torch.randn(20, 4), torch.randn(50, 4), torch.randint(50, (20,))
    seen = Seen(torch.arange(20).repeat_interleave(5), torch.randint(50, (100,)))
    whole = target_ranks(query, items, targets, seen=seen)
    top = top_items(query, items, 7, seen=seen)
    expected = []
    for row in range(20):
        out = set(seen.item[seen.case == row].tolist()) - {int(targets[row])}
        score = items @ query[row]
        expected.append(1 + sum(1 for i in range(50) if i not in out and score[i] > score[targets[row]]))
    assert whole.tolist() == expected
    monkeypatch.setattr("genrec.models.catalogue._CHUNK_ELEMENTS", {"cpu": 3 * 50, "other": 1})
    assert target_ranks(query, items, targets, seen=seen).tolist() == expected
    assert torch.equal(top_items(query, items, 7, seen=seen)[0], top[0])


def test_a_score_that_is_not_a_number_ranks_last():
    items = torch.tensor([[1.0], [float("nan")], [2.0]])
    assert target_ranks(torch.ones(1, 1), items, torch.tensor([1])).tolist() == [3]


@pytest.mark.parametrize(("filter_seen", "expected"), [(False, (0.5, 1 / 3 + 1 / 4)), (True, (1.0, 1.0 + 1 / 3))])
def test_evaluation_filters_what_was_seen(filter_seen, expected):
    # Scores fall with the id. User 0 saw 0 and 1 and wants 2; user 1 saw 3 and wants 3 again... behind 0, 1 and 2.
    model = _Fixed([9.0, 8.0, 7.0, 6.0, 5.0], filter_seen=filter_seen, top_ks=[3])
    batch = retrieval_batch([[0, 1], [3, 0]], targets=[2, 3])
    (metrics,) = trainer().test(model, loader([batch]), verbose=False)
    # Ranks: unfiltered 3 and 4; filtered 1 and 3 (1 and 2 before it; 0 is seen).
    assert metrics["test/hr@3"] == pytest.approx(expected[0])
    assert metrics["test/mrr"] == pytest.approx(expected[1] / 2)


def test_seen_items_beyond_the_batch_are_filtered_too():
    batch = retrieval_batch([[3], [3]], targets=[2, 2], extra={"item_seen": [[0, 1, 3], [0]]})
    model = _Fixed([9.0, 8.0, 7.0, 6.0], top_ks=[1])
    (metrics,) = trainer().test(model, loader([batch]), verbose=False)
    assert metrics["test/mrr"] == pytest.approx((1 + 1 / 2) / 2)


# Losses.


def full_reference(model, batch):
    """The loss from the model's parts, with torch's own cross-entropy."""
    prepared = model.prepare_batch(batch)
    output = model(prepared)
    items = model.item_vectors(model.tables.static["dim16"].embeddings["item"].weight)
    scores = output.query @ items.t() / model.temperature
    if model.item_bias is not None:
        scores = scores + model.item_bias
    return F.cross_entropy(scores, batch.labels[batch.labels >= 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"similarity": "cosine", "temperature": 0.05, "scale_by_sqrt_dim": True},
        {"item_bias": True, "form": "production", "positions": "end"},
    ],
)
def test_full_softmax_is_torchs_cross_entropy_of_every_next_item(options):
    torch.manual_seed(0)
    model = HSTURetrieval(10, **SMALL, **options).train()
    batch = retrieval_batch(SEQUENCES)
    prepared = model.prepare_batch(batch)
    losses = model.loss(model(prepared), prepared)
    assert losses["next_item"].count == 8
    torch.testing.assert_close(losses["next_item"].mean(), full_reference(model, batch))
    weight = model.tables.static["dim16"].embeddings["item"].weight
    actual = torch.autograd.grad(model.total_loss(losses)[0], weight)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(full_reference(model, batch), weight)[0])


def test_label_weights_weigh_the_rows():
    torch.manual_seed(0)
    model = HSTURetrieval(10, **SMALL).train()
    heavy, alone = retrieval_batch(SEQUENCES), retrieval_batch([SEQUENCES[0]])
    heavy.label_weights = torch.tensor([1.0] * 4 + [0.0] * 7)
    values = []
    for batch in (heavy, alone):
        prepared = model.prepare_batch(batch)
        values.append(model.total_loss(model.loss(model(prepared), prepared))[0])
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("shared", [True, False])
def test_sampled_losses_train_and_draw_what_they_say(sampling, shared):
    torch.manual_seed(0)
    counts = torch.tensor([0, 5, 0, 1, 1, 1, 1, 1, 1, 1])
    model = HSTURetrieval(
        10, loss="sampled_softmax", num_negatives=64, negative_sampling=sampling, shared_negatives=shared,
        item_counts=counts if sampling == "popularity" else None, logq_correction=True, item_bias=True, **SMALL,
    ).train()  # fmt: skip
    batch = retrieval_batch(SEQUENCES)
    prepared = model.prepare_batch(batch)
    ids = prepared.features["item_negative"].values()
    assert ids.numel() == 64 * (1 if shared else 8)
    drawn = set(ids.tolist())
    if sampling == "popularity":
        assert drawn == {1, 3, 4, 5, 6, 7, 8, 9}
    elif sampling == "in_batch":
        assert drawn == {2, 3, 4, 7, 8, 9, 0, 1}
    else:
        assert drawn == set(range(10))
    total, _ = model.total_loss(model.loss(model(prepared), prepared))
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_popularity_sampling_without_counts_asks_for_them():
    model = HSTURetrieval(10, loss="sampled_softmax", negative_sampling="popularity", **SMALL)
    with pytest.raises(ValueError, match="item_counts"):
        trainer(max_epochs=1).fit(model, loader([retrieval_batch(SEQUENCES)]))


# Independence, recommend, prediction, saving.


def test_scores_do_not_depend_on_batch_mates_or_the_bound_of_lengths():
    torch.manual_seed(0)
    model = HSTURetrieval(20, **SMALL).eval()
    together = retrieval_batch(SEQUENCES, targets=[0, 0, 0])
    padded = retrieval_batch(SEQUENCES, targets=[0, 0, 0], max_seqlen=12)
    with torch.no_grad():
        query = model(model.prepare_batch(together)).query
        torch.testing.assert_close(model(model.prepare_batch(padded)).query, query)
        for number, ids in enumerate(SEQUENCES):
            alone = model(model.prepare_batch(retrieval_batch([ids], targets=[0]))).query
            torch.testing.assert_close(alone[0], query[number])


def test_recommend_equals_a_plain_argsort():
    torch.manual_seed(0)
    model = HSTURetrieval(10, relative_bias="position", **SMALL)
    ids, scores = model.recommend(SEQUENCES, k=4)
    assert model.training
    model.eval()
    query = model(model.prepare_batch(retrieval_batch(SEQUENCES, targets=[0, 0, 0], timed=False))).query
    everything = query @ model.tables.lookup("item", torch.arange(10)).t()
    for user, history in enumerate(SEQUENCES):
        everything[user, history] = -torch.inf
    order = everything.argsort(dim=1, descending=True)[:, :4]
    # The last user has seen all but four.
    assert torch.equal(ids, order)
    torch.testing.assert_close(scores, everything.gather(1, order))
    unfiltered, _ = model.recommend(SEQUENCES, k=10, filter_seen=False)
    assert torch.equal(unfiltered.sort(dim=1).values, torch.arange(10).expand(3, 10))


def test_recommend_says_when_items_run_out_and_sees_beyond_the_window():
    model = HSTURetrieval(6, relative_bias="none", **{**SMALL, "max_seqlen": 2})
    ids, scores = model.recommend([torch.tensor([0, 1, 2, 3])], k=4)
    assert set(ids[0, :2].tolist()) == {4, 5}
    assert ids[0, 2:].tolist() == [-1, -1]
    assert scores[0, 2:].tolist() == [-torch.inf, -torch.inf]


def test_recommend_with_times_and_features():
    model = HSTURetrieval(
        10, action_feature="action", num_actions=3, side_features={"genre": 4}, contextual_features={"age": 5}, **SMALL
    )
    history = {
        "item": [[1, 2, 3], [4]], "action": [[0, 1, 2], [1]], "genre": [[0, 0, 3], [2]], "age": [4, None],
        "timestamps": [[10, 20, 30], [5]], "query_timestamps": [40, 50],
    }  # fmt: skip
    ids, _ = model.recommend(history, k=3)
    assert ids.shape == (2, 3)
    with pytest.raises(ValueError, match="lacks genre"):
        model.recommend({name: value for name, value in history.items() if name != "genre"})
    with pytest.raises(ValueError, match="as many values as items"):
        model.recommend({**history, "action": [[0, 1], [1]]})


def test_recommend_refuses_an_empty_history():
    with pytest.raises(ValueError, match="sequence is empty"):
        HSTURetrieval(10, relative_bias="none", **SMALL).recommend([[1], []])


def test_predict_writes_parquet(tmp_path):
    model = HSTURetrieval(20, predict_k=3, **SMALL)
    batches = [retrieval_batch(SEQUENCES, users=[7, 8, 9]), retrieval_batch([[1, 2]], users=[4])]
    trainer(callbacks=[PredictionWriter(tmp_path)]).predict(model, loader(batches), return_predictions=False)
    table = pq.read_table(tmp_path / "predictions-0.parquet").to_pydict()
    assert table["user_id"] == [7, 8, 9, 4]
    expected = model.recommend({"item": [[1, 2]], "timestamps": [[0, 86_400]], "query_timestamps": [2 * 86_400]}, k=3)
    assert table["items"][3] == expected[0][0].tolist()
    assert not (tmp_path / "predictions-0.parquet.part").exists()


@pytest.mark.parametrize("model_class", [HSTURetrieval, SASRec])
def test_save_load_and_resume(tmp_path, model_class):
    torch.manual_seed(0)
    options = {**SMALL, "item_bias": True, "schedule": "cosine", "warmup_steps": 2, "table_optimizer": "adagrad"}
    batches = [retrieval_batch([walk]) for walk in markov_sequences(4, 20, 8)]

    def fit(epochs, checkpoint=None):
        L.seed_everything(3, verbose=False)
        model = model_class(20, total_steps=16, **options)
        run = trainer(max_epochs=epochs)
        run.fit(model, loader(batches), ckpt_path=checkpoint)
        return model, run

    whole, _ = fit(4)
    _, half_run = fit(2)
    half_run.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    loaded = model_class.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    assert loaded.hparams.total_steps == 16
    half = half_run.lightning_module
    history = {"item": SEQUENCES, "timestamps": SEQUENCES}
    assert torch.equal(loaded.recommend(history)[0], half.recommend(history)[0])


def test_a_subclass_with_arguments_of_its_own_loads(tmp_path):
    class Narrow(HSTURetrieval):
        def __init__(self, num_items, width=8, **options):
            self.width = width
            super().__init__(num_items, hidden_dim=2 * width, relative_bias="none", **options)

        def build_head(self):
            return nn.Linear(2 * self.width, 2 * self.width)

    model = Narrow(20, width=4, max_seqlen=12, item_counts=None)
    run = trainer(max_epochs=1)
    run.fit(model, loader([retrieval_batch(SEQUENCES)]))
    run.save_checkpoint(tmp_path / "narrow.ckpt")
    loaded = Narrow.load_from_checkpoint(tmp_path / "narrow.ckpt", weights_only=False)
    assert loaded.hidden_dim == 8
    assert torch.equal(loaded.recommend(SEQUENCES)[1], model.recommend(SEQUENCES)[1])


def test_popularity_counts_and_ranks():
    model = PopularityRecommender(5, filter_seen=False, top_ks=[1])
    batches = [retrieval_batch([[0, 1, 1], [1, 2]]), retrieval_batch([[2, 3]], targets=[4])]
    run = trainer(max_epochs=2)
    run.fit(model, loader(batches))
    # Rows 0 1 1 1 2 2 3, and the label 4 of the last row.
    assert model.counts.tolist() == [1, 3, 2, 1, 1]
    (metrics,) = run.test(model, loader([retrieval_batch([[0], [0]], targets=[1, 3])]), verbose=False)
    # 1 is first; 3 stands in a tie of three behind two others.
    assert metrics["test/mrr"] == pytest.approx((1 + 1 / 5) / 2)
    share = torch.tensor([2, 4, 3, 2, 2]) / 13
    assert metrics["test/loss"] == pytest.approx(-(share[1].log() + share[3].log()).item() / 2, rel=1e-5)
    assert model.recommend([[1, 0, 3], [4]], k=2)[0].tolist() == [[2, 4], [1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bpr"}, "full_softmax"),
        ({"similarity": "euclid"}, "cosine"),
        ({"temperature": 0.0}, "temperature"),
        ({"embedding_dims": {"item": 4}}, "hidden_dim"),
        ({"positions": "middle"}, "positions"),
        ({"schedule": "step"}, "schedule"),
        ({"action_feature": "action"}, "num_actions"),
    ],
)
def test_bad_arguments_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        HSTURetrieval(10, **options)
