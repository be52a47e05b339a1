"""Ranking models: multi-task losses, what a candidate sees, metrics, prediction, saving."""

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from genrec.models import HSTURanking, MLPRanking, PredictionWriter, Task
from tests.helpers import loader, ranking_batch

TASKS = [Task("click"), Task("stars", "multiclass", num_classes=3, weight=0.5), Task("time", "regression", weight=2.0)]
SMALL = {
    "action_feature": "action", "num_actions": 4, "contextual_features": {"age": 5}, "side_features": {"genre": 3},
    "hidden_dim": 16, "max_seqlen": 12, "input_dropout": 0.0, "head_hidden_dims": [8],
}  # fmt: skip
FORMS = [
    (HSTURanking, {"dropout": 0.0}),
    (HSTURanking, {"dropout": 0.0, "form": "paper", "action_mode": "summed", "positions": "end"}),
    (HSTURanking, {"dropout": 0.0, "candidate_actions": True, "time_encoding": "sqrt", "output_norm": "l2"}),
    (MLPRanking, {}),
]


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **options})


def batch(permutation=None, users=(11, 12)):
    """User 0: three events and three candidates; user 1: no history, two candidates, age unknown."""
    order = [0, 1, 2] if permutation is None else permutation
    candidates = [[4, 0, 1], [5, 1, 0], [6, 2, 2]]
    chosen = [candidates[i] for i in order]
    labels = torch.tensor([[1, 2, 0.5], [0, 0, 1.5], [1, 1, -1.0], [0, 1, 0.0], [1, 0, 2.0]])
    labels[:3] = labels[order]
    return ranking_batch(
        [[1, 2, 3, *(c[0] for c in chosen)], [7, 8]],
        [[0, 1, 2, *(c[1] for c in chosen)], [3, 3]],
        [3, 2],
        labels,
        extra={"genre": [[0, 1, 2, *(c[2] for c in chosen)], [0, 1]], "age": [[4], []]},
        users=users,
    )


@pytest.mark.parametrize(("model_class", "options"), FORMS)
def test_loss_is_each_tasks_own_divided_by_its_labels(model_class, options):
    torch.manual_seed(0)
    model = model_class(10, TASKS, **SMALL, **options)
    prepared = model.prepare_batch(batch())
    logits = model(prepared)
    labels = prepared.labels
    expected = {
        "click": F.binary_cross_entropy_with_logits(logits["click"], labels[:, 0]),
        "stars": F.cross_entropy(logits["stars"], labels[:, 1].long()),
        "time": F.mse_loss(logits["time"], labels[:, 2]),
    }
    total, parts = model.total_loss(model.loss(logits, prepared))
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach())
    torch.testing.assert_close(total, expected["click"] + 0.5 * expected["stars"] + 2 * expected["time"])
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("model_class", "options"), FORMS)
def test_candidates_are_scored_alone(model_class, options):
    """Their order, and which others stand beside them, change nothing; nor does what they would do."""
    torch.manual_seed(0)
    model = model_class(10, TASKS, **SMALL, **options).eval()
    order = [2, 0, 1]
    # The candidates' times follow their rows, and times may matter: all of one time, as in one request.
    first, second = batch(), batch(order)
    for one in (first, second):
        one.timestamps = torch.tensor([0, 100, 200, 300, 300, 300, 300, 300])
        one.query_timestamps = one.timestamps
    with torch.no_grad():
        logits = model(model.prepare_batch(first))
        permuted = model(model.prepare_batch(second))
        for name in logits:
            torch.testing.assert_close(permuted[name][:3], logits[name][:3][order])
            torch.testing.assert_close(permuted[name][3:], logits[name][3:])
        # Another action of the candidates is never read.
        first.features.values()[8 + 3 : 8 + 6] = 1
        blind = model(model.prepare_batch(first))
    for name in logits:
        torch.testing.assert_close(blind[name], logits[name])


@pytest.mark.parametrize(("model_class", "options"), FORMS)
def test_history_and_context_matter(model_class, options):
    torch.manual_seed(0)
    model = model_class(10, TASKS, **SMALL, **options).eval()
    for parameter in model.tables.parameters():
        parameter.data.mul_(20)
    with torch.no_grad():
        before = model(model.prepare_batch(batch()))["click"]
        # The last item of user 0's history, the first action, and the age.
        for position, value in ((2, 9), (8, 3), (24, 1)):
            changed = batch()
            changed.features.values()[position] = value
            after = model(model.prepare_batch(changed))["click"]
            assert (after - before)[:3].abs().max() > 1e-6
            torch.testing.assert_close(after[3:], before[3:])


def test_labels_that_are_missing_count_nothing():
    torch.manual_seed(0)
    model = HSTURanking(10, [Task("click"), Task("like")], **SMALL, dropout=0.0)
    one = batch()
    one.labels = torch.tensor([[1, 1.0], [0, torch.nan], [1, torch.nan], [0, torch.nan], [1, torch.nan]])
    prepared = model.prepare_batch(one)
    logits = model(prepared)
    losses = model.loss(logits, prepared)
    assert losses["click"].count == 5
    assert losses["like"].count == 1
    torch.testing.assert_close(losses["like"].mean(), -F.logsigmoid(logits["like"][0]))
    one.labels[:, 1] = torch.nan
    empty = model.loss(logits, prepared)["like"].mean()
    assert empty == 0
    assert not empty.isnan()


def test_label_weights_weigh_the_candidates():
    model = HSTURanking(10, [Task("click")], **SMALL, dropout=0.0)
    one = batch()
    one.labels = one.labels[:, :1]
    one.label_weights = torch.tensor([1.0, 0, 0, 0, 3.0])
    prepared = model.prepare_batch(one)
    logits = model(prepared)
    each = F.binary_cross_entropy_with_logits(logits["click"], one.labels[:, 0], reduction="none")
    torch.testing.assert_close(model.loss(logits, prepared)["click"].mean(), (each[0] + 3 * each[4]) / 4)


def test_metrics_are_those_of_scikit_learn():
    torch.manual_seed(0)
    model = HSTURanking(10, TASKS, **SMALL, dropout=0.0)
    run = trainer()
    (metrics,) = run.test(model, loader([batch()]), verbose=False)
    one = batch()
    with torch.no_grad():
        logits = model.eval()(model.prepare_batch(one))
    labels = one.labels[:, 0].numpy()
    scores = logits["click"].numpy()
    assert metrics["test/auc/click"] == pytest.approx(roc_auc_score(labels, scores))
    per_user = [roc_auc_score(labels[:3], scores[:3]), roc_auc_score(labels[3:], scores[3:])]
    assert metrics["test/gauc/click"] == pytest.approx((3 * per_user[0] + 2 * per_user[1]) / 5)
    rate = labels.mean()
    entropy = F.binary_cross_entropy(torch.full((5,), rate), one.labels[:, 0])
    log_loss = F.binary_cross_entropy_with_logits(logits["click"], one.labels[:, 0])
    assert metrics["test/ne/click"] == pytest.approx((log_loss / entropy).item(), rel=1e-5)
    assert metrics["test/accuracy/stars"] == pytest.approx(
        (logits["stars"].argmax(1) == one.labels[:, 1]).float().mean().item()
    )


def test_gauc_without_users_says_so():
    model = HSTURanking(10, TASKS, **SMALL)
    one = batch()
    one.user_ids = None
    with pytest.raises(ValueError, match="per_user_metrics=False"):
        trainer().validate(model, loader([one]), verbose=False)


@pytest.mark.parametrize(("model_class", "options"), FORMS)
def test_predict_and_load(tmp_path, model_class, options):
    L.seed_everything(0, verbose=False)
    model = model_class(10, TASKS, **SMALL, **options)
    run = trainer(max_epochs=1)
    run.fit(model, loader([batch()]), loader([batch()]))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = model_class.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    assert loaded.tasks == TASKS
    trainer(callbacks=[PredictionWriter(tmp_path)]).predict(loaded, loader([batch()]), return_predictions=False)
    table = pq.read_table(tmp_path / "predictions-0.parquet").to_pydict()
    assert table["user_id"] == [11, 11, 11, 12, 12]
    assert table["item"] == [4, 5, 6, 7, 8]
    with torch.no_grad():
        expected = model.eval()(model.prepare_batch(batch()))
    torch.testing.assert_close(torch.tensor(table["click"]), expected["click"].sigmoid())
    torch.testing.assert_close(torch.tensor(table["stars"]), expected["stars"].softmax(1))
    torch.testing.assert_close(torch.tensor(table["time"]), expected["time"])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ([Task("a"), Task("a")], "different names"),
        ([{"name": "a", "kind": "multiclass"}], "num_classes"),
        ([{"name": "a", "kind": "ordinal"}], "kind must be"),
    ],
)
def test_bad_tasks_say_so(tasks, message):
    with pytest.raises(ValueError, match=message):
        HSTURanking(10, tasks)


def test_labels_of_another_shape_say_so():
    model = HSTURanking(10, [Task("click")], **SMALL)
    prepared = model.prepare_batch(batch())
    with pytest.raises(ValueError, match=r"5 candidates and a column for each of the 1 tasks"):
        model.loss(model(prepared), prepared)


@pytest.mark.parametrize(("model_class", "options"), FORMS[:3])
def test_layer_backends_give_the_same_model(model_class, options):
    """Weights of one load into the other; tokens, layers and gradients agree."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this model is on the CPU, where only the interpreter runs the kernels")
    results = []
    for more in ({}, {"layer_backend": "triton", "layer_recompute": ["norm", "silu", "gate"]}):
        torch.manual_seed(0)
        model = model_class(10, TASKS, attention_backend="torch", **SMALL, **options, **more)
        if results:
            model.load_state_dict(results[0][0])
        prepared = model.prepare_batch(batch())
        total, _ = model.total_loss(model.loss(model(prepared), prepared))
        total.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((model.state_dict(), total.detach(), gradients))
    (_, loss, gradients), (_, fused_loss, fused_gradients) = results
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=2e-5)
