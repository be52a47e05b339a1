"""Random sequences of all operations against the plain Python model."""

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.embedding.config import EmbeddingTableConfig, InitializerConfig, TableOptimizerConfig
from genrec.embedding.hkv import HkvTable
from genrec.embedding.hkv.state import export_counters, export_meta, get_meta, owner_rank
from tests.unit.embedding.hkv.model import ModelCounters, ModelTable, bucket_growth, mix64

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**62, -(2**62)]
OPERATIONS = [
    "find_or_insert", "find_or_insert", "find_or_insert", "insert_or_assign", "insert_and_evict", "assign", "accum",
    "erase", "erase_if", "find", "export", "clear", "reserve", "epoch", "empty", "pin", "unpin",
]  # fmt: skip


def build(capacity: int, initial: int, mode: str, choices: int, **options: Any) -> tuple[HkvTable, ModelTable]:
    config = EmbeddingTableConfig(
        "t", 3, ["f"], backend="hkv", capacity=capacity,
        initializer=InitializerConfig("constant", value=0.5), optimizer=TableOptimizerConfig("sgd"),
        options={"score": mode, "initial_capacity": initial, "num_choices": choices, "on_overflow": "init",
                 "record_evicted": True, **options},
    )  # fmt: skip
    first, most = bucket_growth(capacity, initial)
    return HkvTable(config), ModelTable(first, most, mode, choices, 0.75, start=0.5)


def check_equal(table: HkvTable, model: ModelTable) -> None:
    entries = model.entries()
    meta = export_meta(table)
    assert sorted(meta["keys"].tolist()) == sorted(entries), "each key once"
    assert table.size == len(entries)
    assert table.capacity == 128 * len(model.buckets)
    mixed = [mix64(key) for key in meta["keys"].tolist()]
    if model.choices == 1:
        assert mixed == sorted(mixed)
    weights, _ = table.read_rows(meta["rows"])
    assert len(set(meta["rows"].tolist())) == len(entries), "no row serves two keys"
    scores = meta["scores"].numpy().astype(np.uint64).tolist()
    for i, key in enumerate(meta["keys"].tolist()):
        entry = entries[key]
        assert weights[i].tolist() == pytest.approx([entry.value] * 3)
        assert int(meta["steps"][i]) == entry.step
        assert int(meta["updates"][i]) == entry.update
        assert scores[i] == (entry.step if model.mode in ("lru", "none") else entry.score)


def run_operation(table: HkvTable, model: ModelTable, name: str, rng: np.random.Generator, pool: np.ndarray) -> None:
    size = int(rng.integers(1, 160))
    keys = rng.choice(pool, size)
    batch, listed = torch.from_numpy(keys), keys.tolist()
    values = rng.integers(-8, 8, size).astype(np.float32)
    rows = torch.from_numpy(values)[:, None].expand(-1, 3)
    custom = model.mode == "custom"
    scores = rng.integers(0, 50, size) if custom else None
    given_scores = torch.from_numpy(scores) if scores is not None else None
    if name == "empty":
        nothing, found = table.find_or_insert(torch.empty(0, dtype=torch.int64))
        assert nothing.shape == (0, 3)
        assert found.numel() == 0
        model.step += 1
    elif name == "find_or_insert":
        before = [model.find(key) is not None for key in listed]
        model.insert(listed)
        out, found = table.find_or_insert(batch, given_scores)
        if scores is not None:
            model.set_scores(listed, scores.tolist())
        entries = model.entries()
        # A key that got no row still gets its initial one.
        assert found.tolist() == before
        assert out[:, 0].tolist() == [entries[key].value if key in entries else 0.5 for key in listed]
    elif name in ("insert_or_assign", "insert_and_evict"):
        earlier = len(model.evicted)
        model.insert(listed)
        model.assign(listed, values.tolist(), inserted=True)
        if scores is not None:
            model.set_scores(listed, scores.tolist())
        if name == "insert_or_assign":
            table.insert_or_assign(batch, rows, given_scores)
        else:
            table.pop_evicted()
            gone, gone_rows, _ = table.insert_and_evict(batch, rows, given_scores)
            assert sorted(gone.tolist()) == sorted(model.evicted[earlier:])
            assert gone_rows.shape == (len(gone), 3)
    elif name == "assign":
        assert table.assign(batch, rows, given_scores).tolist() == model.assign(listed, values.tolist())
        if scores is not None:
            model.set_scores(listed, scores.tolist())
    elif name == "accum":
        assert table.accum(batch, rows).tolist() == model.accum(listed, values.tolist())
    elif name == "erase":
        assert table.erase(batch[:20]) == model.erase(listed[:20])
    elif name == "erase_if":
        last = int(rng.integers(0, max(1, model.step)))
        old = [key for key, entry in model.entries().items() if entry.step <= last // 2]
        assert table.erase_if(max_step=last // 2) == model.erase(old)
        if custom:
            low = [key for key, entry in model.entries().items() if 5 <= entry.score <= 9]
            assert table.erase_if(min_score=5, max_score=9) == model.erase(low)
    elif name == "find":
        entries = model.entries()
        assert table.contains(batch).tolist() == [key in entries for key in listed]
        assert table.embed(batch)[:, 1].tolist() == [entries[k].value if k in entries else 0.5 for k in listed]
    elif name == "export":
        since, least = int(rng.integers(0, model.step + 1)), int(rng.integers(0, 9))
        wanted = [
            key
            for key, entry in model.entries().items()
            if (since == 0 or entry.update > since) and entry.order(model.mode)[0] >= least
        ]
        assert sorted(table.export(since_step=since, min_score=least)["keys"].tolist()) == sorted(wanted)
    elif name == "pin" and model.pinned_from is None:
        model.pinned_from = model.step
        table.pin(model.step)
    elif name == "unpin" and model.pinned_from is not None:
        table.unpin(model.pinned_from)
        model.pinned_from = None
    elif name == "clear":
        table.clear()
        model.buckets = [[None] * 128 for _ in model.buckets]
    elif name == "reserve":
        table.reserve(size * 2)
        model.reserve(size * 2)
    elif name == "epoch":
        model.epoch += 1
        table.epoch = model.epoch


@pytest.mark.parametrize("mode", ["lru", "lfu", "epoch_lfu", "custom", "none"])
@given(
    shape=st.sampled_from([(1, 1, 1), (128, 128, 2), (300, 300, 1), (384, 384, 2), (1000, 128, 1), (1000, 128, 2)]),
    tiers=st.sampled_from([{}, {"fast_capacity": 0.25}, {"fast_capacity": 0.1, "overflow_capacity": 0.3}]),
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=16),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_random_sequences_equal_the_model(mode, shape, tiers, operations, seed):
    options = {name: max(1, int(share * shape[0])) for name, share in tiers.items()}
    table, model = build(*shape[:2], mode, shape[2], file_directory=tempfile.gettempdir(), **options)
    rng = np.random.default_rng(seed)
    pool = np.concatenate([np.array(EXTREMES), rng.integers(-(2**63), 2**63 - 1, 600), np.arange(-50, 50)])
    for name in operations:
        run_operation(table, model, name, rng, pool)
        check_equal(table, model)
    info = table.info()
    assert info.evicted == len(model.evicted)
    assert info.refused == model.refused


@pytest.mark.parametrize("mode", ["lru", "lfu", "none"])
@given(
    threshold=st.integers(1, 4),
    ways=st.integers(1, 6),
    batches=st.lists(st.lists(st.integers(-30, 30), max_size=30), min_size=1, max_size=12),
    spread=st.sampled_from([1, 2**40]),
)
@settings(max_examples=25, deadline=None)
def test_admission_equals_the_model(mode, threshold, ways, batches, spread):
    """A table of two buckets that is full already; few counters, so that they are forgotten too."""
    table, model = build(256, 256, mode, 1, admission_threshold=threshold, admission_capacity=2 * ways)
    crowd = torch.arange(10_000, 10_300)
    table.insert_or_assign(crowd, torch.zeros(300, 3))
    model.insert(crowd.tolist())
    model.assign(crowd.tolist(), [0.0] * 300, inserted=True)
    counters = ModelCounters(2, ways, threshold)
    for batch in batches:
        keys = [key * spread for key in batch]
        table.lookup(torch.tensor(keys, dtype=torch.int64))
        if threshold > 1:
            model.train(keys, counters)
        else:
            model.insert(keys)
        check_equal(table, model)
        counted = export_counters(table)
        pairs = zip(counted["counts"].tolist(), counted["steps"].tolist(), strict=True)
        assert dict(zip(counted["keys"].tolist(), map(list, pairs), strict=True)) == counters.contents()
    assert table.info().unadmitted == counters.unadmitted


def test_batch_keeps_the_rows_that_it_names_itself():
    """A miss early in the batch must not evict a key that comes later in it."""
    table, _ = build(128, 128, "lru", 1)
    old = torch.arange(128)
    table.find_or_insert(old)
    newcomers = torch.arange(1000, 1064)
    _, found = table.find_or_insert(torch.cat([newcomers, old[:64]]))
    assert found.tolist() == [False] * 64 + [True] * 64
    assert table.contains(torch.cat([newcomers, old[:64]])).all()
    assert not table.contains(old[64:]).any()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_owner_is_the_unsigned_remainder(world_size):
    keys = torch.tensor([*EXTREMES, *range(-500, 500)])
    assert owner_rank(keys, world_size).tolist() == [mix64(key) % world_size for key in keys.tolist()]


@pytest.mark.parametrize("stride", [2, 4, 1024, 2**34])
def test_strided_keys_spread_evenly_over_ranks(stride):
    counts = torch.bincount(owner_rank(torch.arange(8000) * stride, 4), minlength=4)
    assert counts.min() > 1850
    assert counts.max() < 2150


def test_export_by_score_and_by_step():
    table, _ = build(384, 128, "lfu", 1)
    table.find_or_insert(torch.arange(60).repeat(3))
    table.find_or_insert(torch.arange(50, 90))
    everything = table.export()
    assert sorted(everything["keys"].tolist()) == list(range(90))
    assert torch.equal(everything["weights"], table.embed(everything["keys"]))
    assert sorted(table.export(since_step=1)["keys"].tolist()) == list(range(50, 90))
    assert sorted(table.export(min_score=3)["keys"].tolist()) == list(range(60))
    often = table.export(since_step=1, min_score=3)
    assert sorted(often["keys"].tolist()) == list(range(50, 60))
    assert often["scores"].tolist() == [4] * 10


def test_meta_of_absent_keys_is_zero():
    table, _ = build(128, 128, "lfu", 1)
    table.find_or_insert(torch.tensor([7, 7, 8]))
    meta = get_meta(table, torch.tensor([7, 8, 9]))
    assert meta["scores"].tolist() == [2, 1, 0]
    assert meta["steps"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("shape", ["rank", "dtype", "device"])
def test_bad_keys_and_rows_are_explained(shape):
    table, _ = build(128, 128, "lru", 1)
    if shape == "rank":
        with pytest.raises(ValueError, match=r"expected \(2, 3\) values, got \(2, 4\)"):
            table.insert_or_assign(torch.tensor([1, 2]), torch.zeros(2, 4))
    elif shape == "dtype":
        with pytest.raises(TypeError, match=r"keys must be int64 or int32, got torch.float32"):
            table.find(torch.zeros(2))
    else:
        with pytest.raises(NotImplementedError, match="CUDA engine is not there yet"):
            table.find(torch.zeros(2, dtype=torch.int64, device="meta"))


def test_negative_scores_are_refused():
    table, _ = build(128, 128, "custom", 1)
    with pytest.raises(ValueError, match="scores must not be negative, got -3"):
        table.find_or_insert(torch.tensor([1, 2]), scores=torch.tensor([3, -3]))


def test_scores_are_refused_unless_custom():
    table, _ = build(128, 128, "lru", 1)
    with pytest.raises(ValueError, match="score: custom"):
        table.find_or_insert(torch.tensor([1]), scores=torch.tensor([3]))
