from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from genrec.data.batch import SequenceBatch
from genrec.layers import HSTUConfig, HSTUStack, PreprocessorConfig, SequencePreprocessor

# Three sequences: 2 events + 2 candidates, none at all, 3 events + 1 candidate.
LENGTHS, TARGETS = [4, 0, 4], [2, 0, 1]
TIMES = torch.tensor([10, 20, 35, 30, 100, 140, 190, 250])
ASKED = torch.tensor([20, 35, 30, 31, 140, 190, 250, 260])
ITEMS = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
ACTIONS = ITEMS * 10


def _jagged(values: Tensor, lengths: list[int]) -> JaggedTensor:
    return JaggedTensor(values=values, lengths=torch.tensor(lengths))


def _embeddings() -> dict[str, JaggedTensor]:
    """Width 1, so that a token is a number: items 1..8, their actions ten times that, contexts 100 and 201, 202."""
    return {
        "item": _jagged(ITEMS[:, None], LENGTHS),
        "action": _jagged(ACTIONS[:, None], LENGTHS),
        "genre": _jagged(ITEMS[:, None] / 10, LENGTHS),
        "age": _jagged(torch.tensor([[100.0]]), [0, 0, 1]),
        "sex": _jagged(torch.tensor([[201.0], [202.0]]), [1, 1, 0]),
    }


def _batch(targets: list[int] | None = TARGETS, times: bool = True, asked: bool = True) -> SequenceBatch:
    empty = KeyedJaggedTensor.from_lengths_sync(
        ["item"], torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    )
    return SequenceBatch(
        features=empty,
        seq_offsets=torch.tensor([0, 4, 4, 8]),
        max_seqlen=4,
        timestamps=TIMES if times else None,
        query_timestamps=ASKED if times and asked else None,
        num_targets=None if targets is None else torch.tensor(targets),
    )


def _run(batch: SequenceBatch, **config: Any) -> tuple[SequencePreprocessor, Any]:
    preprocessor = SequencePreprocessor(PreprocessorConfig(hidden_dim=1, **config))
    return preprocessor, preprocessor(_embeddings(), batch)


def _lists(values: Tensor, tokens: Any) -> list[list[float]]:
    return [values[a:b].flatten().tolist() for a, b in pairwise(tokens.seq_offsets.tolist())]


def test_items_alone() -> None:
    preprocessor, tokens = _run(_batch(None))
    assert _lists(tokens.x, tokens) == [[1, 2, 3, 4], [], [5, 6, 7, 8]]
    assert tokens.num_contexts is None
    assert tokens.num_targets is None
    assert tokens.timestamps.tolist() == TIMES.tolist()
    assert tokens.query_timestamps.tolist() == ASKED.tolist()
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == ITEMS.tolist()


def test_interleaved_history() -> None:
    preprocessor, tokens = _run(_batch(None), action_feature="action")
    assert _lists(tokens.x, tokens) == [[1, 10, 2, 20, 3, 30, 4, 40], [], [5, 50, 6, 60, 7, 70, 8, 80]]
    assert tokens.max_seqlen == 8
    # An item is asked for its action at its own time; an action for the next item at the next event's.
    assert _lists(tokens.timestamps, tokens)[0] == [10, 10, 20, 20, 35, 35, 30, 30]
    assert _lists(tokens.query_timestamps, tokens)[0] == [10, 20, 20, 35, 35, 30, 30, 31]
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == ACTIONS.tolist()


def test_interleaved_with_candidates() -> None:
    preprocessor, tokens = _run(_batch(), action_feature="action")
    assert _lists(tokens.x, tokens) == [[1, 10, 2, 20, 3, 4], [], [5, 50, 6, 60, 7, 70, 8]]
    assert tokens.num_targets.tolist() == TARGETS
    assert tokens.target_group_size == 1
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == [3, 4, 8]
    # The row before a candidate and the candidates stay at their own times.
    assert _lists(tokens.query_timestamps, tokens) == [
        [10, 20, 20, 20, 35, 30],
        [],
        [100, 140, 140, 190, 190, 190, 250],
    ]


def test_candidates_with_their_actions() -> None:
    preprocessor, tokens = _run(_batch(), action_feature="action", candidate_actions=True)
    assert _lists(tokens.x, tokens) == [[1, 10, 2, 20, 3, 30, 4, 40], [], [5, 50, 6, 60, 7, 70, 8, 80]]
    assert tokens.num_targets.tolist() == [4, 0, 2]
    assert tokens.target_group_size == 2
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == [3, 4, 8]


def test_summed() -> None:
    preprocessor, tokens = _run(_batch(), action_feature="action", action_mode="summed")
    assert _lists(tokens.x, tokens) == [[11, 22, 3, 4], [], [55, 66, 77, 8]]
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == [3, 4, 8]
    _, history = _run(_batch(None), action_feature="action", action_mode="summed")
    assert _lists(history.x, history) == [[11, 22, 33, 44], [], [55, 66, 77, 88]]


def test_contexts_lead_and_may_be_missing() -> None:
    options: dict[str, Any] = {"contextual_features": ["age", "sex"]}
    preprocessor, tokens = _run(_batch(), action_feature="action", **options)
    assert _lists(tokens.x, tokens) == [[201, 1, 10, 2, 20, 3, 4], [202], [100, 5, 50, 6, 60, 7, 70, 8]]
    assert tokens.num_contexts.tolist() == [1, 1, 1]
    assert tokens.max_seqlen == 10
    assert _lists(tokens.timestamps, tokens) == [
        [10, 10, 10, 20, 20, 35, 30],
        [0],
        [100, 100, 100, 140, 140, 190, 190, 250],
    ]
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == [3, 4, 8]
    preprocessor, tokens = _run(_batch(None), **options)
    assert _lists(tokens.x, tokens) == [[201, 1, 2, 3, 4], [202], [100, 5, 6, 7, 8]]
    assert preprocessor.outputs(tokens.x, tokens).flatten().tolist() == ITEMS.tolist()


def test_both_contexts_in_order() -> None:
    embeddings = _embeddings()
    embeddings["age"] = _jagged(torch.tensor([[100.0], [101.0]]), [1, 0, 1])
    config = PreprocessorConfig(hidden_dim=1, contextual_features=["sex", "age"])
    tokens = SequencePreprocessor(config)(embeddings, _batch())
    assert _lists(tokens.x, tokens) == [[201, 100, 1, 2, 3, 4], [202], [101, 5, 6, 7, 8]]
    assert tokens.num_contexts.tolist() == [2, 1, 1]


def test_times_without_query_times_follow_the_next_row() -> None:
    _, tokens = _run(_batch(None, asked=False))
    assert tokens.query_timestamps.tolist() == [20, 35, 30, 30, 140, 190, 250, 250]
    _, tokens = _run(_batch(None, times=False))
    assert tokens.timestamps is None
    assert tokens.query_timestamps is None


def test_no_query_time_crosses_into_the_next_sequence() -> None:
    """The second sequence is a candidate alone: the row before it belongs to another sequence and keeps its t'."""
    batch = replace(_batch([0, 0, 4]))
    _, tokens = _run(batch)
    assert tokens.query_timestamps.tolist() == [20, 35, 30, 31, *TIMES[4:].tolist()]


def test_side_features() -> None:
    _, tokens = _run(_batch(None), side_features=["genre"])
    torch.testing.assert_close(tokens.x[:, 0], ITEMS * 1.1)
    preprocessor = SequencePreprocessor(PreprocessorConfig(1, side_features=["genre"], side_mode="concat"))
    assert preprocessor.item_projection is not None
    with torch.no_grad():
        preprocessor.item_projection.weight.copy_(torch.tensor([[2.0, 30.0]]))
        preprocessor.item_projection.bias.fill_(7.0)
    tokens = preprocessor(_embeddings(), _batch(None))
    torch.testing.assert_close(tokens.x[:, 0], ITEMS * 5 + 7)


def test_other_widths_are_projected() -> None:
    config = PreprocessorConfig(hidden_dim=3, item_feature="item", contextual_features=["age"],
                                embedding_dims={"item": 1, "age": 1})  # fmt: skip
    preprocessor = SequencePreprocessor(config)
    tokens = preprocessor(_embeddings(), _batch(None))
    assert tokens.x.shape == (9, 3)
    want = preprocessor.projections["age"](torch.tensor([100.0]))
    torch.testing.assert_close(tokens.x[4], want)


def test_scale_comes_before_positions() -> None:
    preprocessor, _ = _run(_batch(None), max_positions=10, scale_by_sqrt_dim=True)
    preprocessor = SequencePreprocessor(replace(preprocessor.config, hidden_dim=4))
    embeddings = {"item": _jagged(ITEMS[:, None].expand(-1, 4), LENGTHS)}
    tokens = preprocessor(embeddings, _batch(None))
    assert preprocessor.positions is not None
    want = 2 * ITEMS[:, None] + preprocessor.positions.weight[torch.arange(4).repeat(2)]
    torch.testing.assert_close(tokens.x, want)


def _with_positions(count_from: str, max_positions: int = 10, **config: Any) -> list[list[float]]:
    config = {"hidden_dim": 1, "max_positions": max_positions, "position_from": count_from, **config}
    preprocessor = SequencePreprocessor(PreprocessorConfig(**config))
    assert preprocessor.positions is not None
    with torch.no_grad():
        preprocessor.positions.weight.copy_(torch.arange(len(preprocessor.positions.weight))[:, None])
    zero = {name: _jagged(jt.values() * 0, jt.lengths().tolist()) for name, jt in _embeddings().items()}
    tokens = preprocessor(zero, _batch())
    return _lists(tokens.x, tokens)


def test_positions() -> None:
    assert _with_positions("start") == [[0, 1, 2, 2], [], [0, 1, 2, 3]]
    assert _with_positions("end") == [[2, 1, 0, 0], [], [3, 2, 1, 0]]
    assert _with_positions("start", max_positions=3) == [[0, 1, 2, 2], [], [0, 1, 2, 2]]
    interleaved = {"action_feature": "action", "candidate_actions": True}
    assert _with_positions("start", **interleaved) == [[0, 1, 2, 3, 4, 4, 4, 4], [], [0, 1, 2, 3, 4, 5, 6, 6]]
    contexts = {"contextual_features": ["age", "sex"]}
    assert _with_positions("start", **contexts) == [[1, 2, 3, 4, 4], [1], [0, 2, 3, 4, 5]]
    assert _with_positions("end", **contexts) == [[1, 4, 3, 2, 2], [1], [0, 5, 4, 3, 2]]


@pytest.mark.parametrize(("kind", "seconds", "want"), [
    ("sqrt", [0, 59, 60, 239, 240, 60 * 101, -5], [0, 0, 1, 1, 2, 9, 0]),
    ("log", [0, 1, 2, 3, 10**9, -5], [0, 0, 2, 3, 9, 0]),
])  # fmt: skip
def test_time_buckets(kind: str, seconds: list[int], want: list[int]) -> None:
    config = PreprocessorConfig(hidden_dim=1, time_encoding=kind, num_time_buckets=10)
    times = SequencePreprocessor(config).times
    assert times is not None
    assert times.buckets(torch.tensor(seconds)).tolist() == want


def test_ages_are_counted_from_the_request() -> None:
    def ages(batch: SequenceBatch) -> list[list[float]]:
        preprocessor = SequencePreprocessor(PreprocessorConfig(1, time_encoding="sqrt", num_time_buckets=300))
        assert preprocessor.times is not None
        with torch.no_grad():
            preprocessor.times.weight.copy_(torch.arange(300)[:, None] ** 2)
        batch = replace(batch, timestamps=TIMES * 60, query_timestamps=ASKED * 60)
        zero = {"item": _jagged(ITEMS[:, None] * 0, LENGTHS)}
        tokens = preprocessor(zero, batch)
        return _lists(tokens.x, tokens)

    floor = [[int(age**0.5) ** 2 for age in row] for row in ([21, 11, 0, 1], [], [160, 120, 70, 10])]
    assert ages(_batch(None)) == floor
    # With candidates the request is the earliest of them: 30 and 250.
    floor = [[int(age**0.5) ** 2 for age in row] for row in ([20, 10, 0, 0], [], [150, 110, 60, 0])]
    assert ages(_batch()) == floor


MODES: list[dict[str, Any]] = [
    {"action_mode": "interleaved"},
    {"action_mode": "interleaved", "candidate_actions": True},
    {"action_mode": "summed"},
]


def _scores(action_delta: int | None, mode: dict[str, Any], item_delta: int | None = None) -> Tensor:
    """(3, D): the candidates' states after two layers, one action or item turned round (LayerNorm hides a shift)."""
    torch.manual_seed(0)
    config = PreprocessorConfig(hidden_dim=8, action_feature="action", contextual_features=["sex"], max_positions=20,
                                time_encoding="log", **mode)  # fmt: skip
    preprocessor = SequencePreprocessor(config).double()
    stack = HSTUStack(HSTUConfig(hidden_dim=8, max_seqlen=20, dropout=0.0, attention_backend="torch")).double()
    item, action = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    if action_delta is not None:
        action[action_delta] *= -1.0
    if item_delta is not None:
        item[item_delta] *= -1.0
    embeddings = {
        "item": _jagged(item, LENGTHS),
        "action": _jagged(action, LENGTHS),
        "sex": _jagged(torch.ones(2, 8, dtype=torch.float64), [1, 1, 0]),
    }
    tokens = preprocessor(embeddings, _batch())
    return preprocessor.outputs(stack(tokens.x, tokens), tokens)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_candidate_sees_its_own_or_anothers_action(mode: dict[str, Any]) -> None:
    before = _scores(None, mode)
    for row in (2, 3, 7):
        assert torch.equal(_scores(row, mode), before), f"action of candidate row {row}"
    for row, candidates in ((0, [0, 1]), (1, [0, 1]), (6, [2])):
        changed = (_scores(row, mode) != before).any(1).nonzero().flatten().tolist()
        assert changed == candidates, f"action of history row {row}"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_candidate_sees_another_item(mode: dict[str, Any]) -> None:
    before = _scores(None, mode)
    for candidate, row in enumerate((2, 3, 7)):
        changed = (_scores(None, mode, row) != before).any(1).nonzero().flatten().tolist()
        assert changed == [candidate]


def test_retrieval_row_sees_nothing_that_follows() -> None:
    torch.manual_seed(0)
    config = PreprocessorConfig(hidden_dim=8, action_feature="action", max_positions=20)
    preprocessor = SequencePreprocessor(config).double()
    stack = HSTUStack(HSTUConfig(hidden_dim=8, max_seqlen=20, dropout=0.0, attention_backend="torch")).double()
    item, action = (torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    embeddings = {"item": _jagged(item, LENGTHS), "action": _jagged(action, LENGTHS)}
    tokens = preprocessor(embeddings, _batch(None))
    out = preprocessor.outputs(stack(tokens.x, tokens), tokens)
    for row in range(8):
        first = 0 if row < 4 else 4
        for gradient in torch.autograd.grad(out[row].sum(), [item, action], retain_graph=True):
            assert gradient.abs().sum(1).nonzero().flatten().tolist() == list(range(first, row + 1))


@pytest.mark.parametrize("targets", [None, [0, 0, 0]])
def test_empty_batch(targets: list[int] | None) -> None:
    config = PreprocessorConfig(hidden_dim=1, action_feature="action", contextual_features=["sex"], max_positions=4,
                                time_encoding="log")  # fmt: skip
    none = _jagged(torch.zeros(0, 1), [0, 0, 0])
    batch = replace(_batch(targets), seq_offsets=torch.zeros(4, dtype=torch.long), max_seqlen=0,
                    timestamps=TIMES[:0], query_timestamps=None)  # fmt: skip
    preprocessor = SequencePreprocessor(config)
    tokens = preprocessor({"item": none, "action": none, "sex": none}, batch)
    assert tokens.x.shape == (0, 1)
    assert preprocessor.outputs(tokens.x, tokens).shape == (0, 1)
    tokens = preprocessor({"item": none, "action": none, "sex": _embeddings()["sex"]}, batch)
    assert tokens.seq_offsets.tolist() == [0, 1, 2, 2]


def test_gradients_reach_every_embedding() -> None:
    embeddings = {name: jt.values().clone().requires_grad_() for name, jt in _embeddings().items()}
    config = PreprocessorConfig(1, action_feature="action", contextual_features=["age", "sex"], side_features=["genre"])
    jagged = {name: _jagged(x, _embeddings()[name].lengths().tolist()) for name, x in embeddings.items()}
    tokens = SequencePreprocessor(config)(jagged, _batch())
    (tokens.x[:, 0] * torch.arange(1, 17)).sum().backward()
    want = {"age": [9], "sex": [1, 8], "item": [2, 4, 6, 7, 10, 12, 14, 16], "genre": [2, 4, 6, 7, 10, 12, 14, 16],
            "action": [3, 5, 0, 0, 11, 13, 15, 0]}  # fmt: skip
    for name, x in embeddings.items():
        assert x.grad is not None
        assert x.grad.flatten().tolist() == want[name], name


def test_errors_say_what_is_wrong() -> None:
    batch, embeddings = _batch(), _embeddings()
    config = PreprocessorConfig(hidden_dim=1, action_feature="action", contextual_features=["sex"])
    with pytest.raises(KeyError, match="No embeddings of action"):
        SequencePreprocessor(config)({k: v for k, v in embeddings.items() if k != "action"}, batch)
    with pytest.raises(ValueError, match="'action' has 7 values for 8 events"):
        SequencePreprocessor(config)({**embeddings, "action": _jagged(ACTIONS[:7, None], [4, 0, 3])}, batch)
    with pytest.raises(ValueError, match="'sex' has more than one value"):
        SequencePreprocessor(config)({**embeddings, "sex": _jagged(torch.zeros(2, 1), [2, 0, 0])}, batch)
    with pytest.raises(ValueError, match="needs timestamps"):
        SequencePreprocessor(replace(config, time_encoding="log"))(embeddings, _batch(times=False))
    with pytest.raises(ValueError, match="candidate_actions needs"):
        PreprocessorConfig(1, candidate_actions=True)
    with pytest.raises(ValueError, match="features that are not used: itme"):
        PreprocessorConfig(1, embedding_dims={"itme": 3})
    for field, value in (("action_mode", "both"), ("side_mode", "mean")):
        with pytest.raises(ValueError, match=field):
            PreprocessorConfig(1, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position_from"):
        SequencePreprocessor(PreprocessorConfig(1, max_positions=2, position_from="middle"))
    with pytest.raises(ValueError, match="time_encoding"):
        SequencePreprocessor(PreprocessorConfig(1, time_encoding="cube"))


def test_max_tokens_covers_what_is_made() -> None:
    for config in (PreprocessorConfig(1), PreprocessorConfig(1, action_feature="action", contextual_features=["sex"])):
        tokens = SequencePreprocessor(config)(_embeddings(), _batch())
        assert tokens.seq_offsets.diff().max() <= tokens.max_seqlen == config.max_tokens(4)


def test_no_candidate_sees_the_time_of_another() -> None:
    torch.manual_seed(0)
    preprocessor = SequencePreprocessor(
        PreprocessorConfig(hidden_dim=8, action_feature="action", max_positions=20)
    ).double()
    stack = HSTUStack(HSTUConfig(hidden_dim=8, max_seqlen=20, dropout=0.0, attention_backend="torch")).double()
    embeddings = {name: _jagged(torch.randn(8, 8, dtype=torch.float64), LENGTHS) for name in ("item", "action")}

    def scores(row: int | None) -> Tensor:
        times = TIMES.clone()
        if row is not None:
            times[row] += 10_000
        batch = replace(_batch(asked=False), timestamps=times)
        tokens = preprocessor(embeddings, batch)
        return preprocessor.outputs(stack(tokens.x, tokens), tokens)

    before = scores(None)
    for candidate, row in enumerate((2, 3, 7)):
        assert (scores(row) != before).any(1).nonzero().flatten().tolist() == [candidate]


@pytest.mark.parametrize("mode", [{}, {"candidate_actions": True}, {"action_mode": "summed"}], ids=str)
def test_layer_backends_make_the_same_tokens(mode: dict[str, Any]) -> None:
    config = PreprocessorConfig(hidden_dim=1, action_feature="action", contextual_features=["age", "sex"],
                                side_features=["genre"], max_positions=20, time_encoding="log", num_time_buckets=30,
                                scale_by_sqrt_dim=True, **mode)  # fmt: skip
    plain = SequencePreprocessor(config)
    fused = SequencePreprocessor(replace(config, layer_backend="triton"))
    fused.load_state_dict(plain.state_dict())
    results = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in (plain.to(device), fused.to(device)):
        embeddings = {name: values.to(torch.device(device)) for name, values in _embeddings().items()}
        for values in embeddings.values():
            values.values().requires_grad_()
        tokens = module(embeddings, _batch().to(torch.device(device)))
        leaves = [*module.parameters(), *(values.values() for values in embeddings.values())]
        upstream = torch.arange(1.0, len(tokens.x) + 1, device=device)[:, None]
        results.append([tokens.x, *torch.autograd.grad(tokens.x, leaves, upstream)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("fp32_residual", [True, False])
def test_tokens_take_the_dtype_of_autocast_on_request(fp32_residual: bool, backend: str) -> None:
    config = PreprocessorConfig(hidden_dim=1, action_feature="action", max_positions=20, time_encoding="log",
                                num_time_buckets=30, fp32_residual=fp32_residual, layer_backend=backend)  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = SequencePreprocessor(config).to(device)
    embeddings = {name: values.to(device) for name, values in _embeddings().items()}
    exact = module(embeddings, _batch().to(device)).x
    assert exact.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        x = module(embeddings, _batch().to(device)).x
    assert x.dtype == (torch.float32 if fp32_residual else torch.bfloat16)
    torch.testing.assert_close(x.float(), exact, rtol=0.0 if fp32_residual else 2**-6, atol=2**-7)


def test_labels_that_do_not_fit_the_candidates_are_an_error() -> None:
    batch = replace(_batch(), labels=torch.zeros(sum(TARGETS) + 1, 1))
    module = SequencePreprocessor(PreprocessorConfig(hidden_dim=1, action_feature="action"))
    with pytest.raises(RuntimeError, match="labels don't fit the batch's num_targets"):
        module(_embeddings(), batch)
