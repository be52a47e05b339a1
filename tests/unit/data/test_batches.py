"""Splits, collation, plans and loaders, by hand-made cases."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from genrec.data import EventStore, SequenceDataModule, prepare
from genrec.data.collate import SEEN, Collator
from genrec.data.loader import BatchPlan, SequenceLoader
from genrec.data.readers import MovieLens, ParquetTable, Synthetic
from genrec.data.splits import Cases, Split, ranking_cases, retrieval_cases, target_hash
from genrec.data.stochastic_length import StochasticLength


def make_store(folder: Path, lengths: list[int], times: list[list[int]] | None = None) -> EventStore:
    """Users 1, 2, ... with events whose items are all different: user u has items 100 u, 100 u + 1, ..."""
    rows = [
        {
            "user": user,
            "item": 100 * user + n,
            "timestamp": times[user - 1][n] if times else 10 * n + user,
            "like": n % 2,
        }
        for user, length in enumerate(lengths, start=1)
        for n in range(length)
    ]
    folder.mkdir(exist_ok=True)
    pl.DataFrame(rows).write_parquet(folder / "t.parquet")
    return prepare(ParquetTable(folder / "t.parquet", labels=["like"]), folder / "cache", progress=False)


def labelled(store: EventStore, cases: Cases, kind: str) -> list[int]:
    """Raw ids of all that is to be predicted."""
    shift = 1 if kind == "retrieval" else 0
    rows = [row + shift for a, b in zip(cases.first_label, cases.stop, strict=True) for row in range(a, b)]
    return store.item_keys[store.item[rows]].tolist()


def read(store: EventStore, cases: Cases) -> list[list[int]]:
    """Raw ids of what each case reads."""
    return [store.item_keys[store.item[a:b]].tolist() for a, b in zip(cases.start, cases.stop, strict=True)]


def test_leave_one_out_for_retrieval(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 2, 3, 1])
    split = Split("leave_one_out")
    train, val, test = (retrieval_cases(store, split, stage, 10) for stage in ("train", "val", "test"))
    # User 2 is too short for the split and only trains; user 4 has nothing to predict.
    assert (labelled(store, train, "retrieval"), read(store, train)) == ([101, 102, 201], [[100, 101], [200]])
    assert (labelled(store, val, "retrieval"), read(store, val)) == ([103, 301], [[100, 101, 102], [300]])
    assert labelled(store, test, "retrieval") == [104, 302]
    assert read(store, test) == [[100, 101, 102, 103], [300, 301]]


def test_truncation_keeps_the_newest(tmp_path: Path) -> None:
    store = make_store(tmp_path, [6])
    split = Split("leave_one_out")
    assert read(store, retrieval_cases(store, split, "test", 2)) == [[103, 104]]
    train = retrieval_cases(store, split, "train", 2)
    assert (read(store, train), labelled(store, train, "retrieval")) == ([[101, 102]], [102, 103])
    ranking = ranking_cases(store, Split("leave_one_out"), "test", max_seqlen=1, num_candidates=2)
    assert read(store, ranking) == [[103, 104, 105]]


@pytest.mark.parametrize("max_seqlen", [1, 2, 3, 7, 50])
def test_all_windows_make_every_event_a_label_once(tmp_path: Path, max_seqlen: int) -> None:
    store = make_store(tmp_path, [23, 4, 9])
    cases = retrieval_cases(store, Split("leave_one_out"), "train", max_seqlen, all_windows=True)
    expected = [100 * user + n for user, length in ((1, 23), (2, 4), (3, 9)) for n in range(1, length - 2)]
    assert sorted(labelled(store, cases, "retrieval")) == expected
    assert cases.lengths.max() <= max_seqlen


def test_split_by_time(tmp_path: Path) -> None:
    times = [[0, 1, 2, 3, 8, 9], [0, 5, 7, 9]]
    store = make_store(tmp_path, [6, 4], times)
    split = Split("time", val_share=0.3, test_share=0.2)  # Of 0 0 1 2 3 5 7 8 9 9: cuts at 5 and 9.
    for kind, cut in (("retrieval", retrieval_cases), ("ranking", ranking_cases)):
        extra = {"max_seqlen": 10} if kind == "retrieval" else {"max_seqlen": 10, "num_candidates": 2}
        parts = [sorted(labelled(store, cut(store, split, stage, **extra), kind)) for stage in ("train", "val", "test")]
        assert parts == ([[101, 102, 103], [104, 201, 202], [105, 203]] if kind == "retrieval" else parts)
        assert max(parts[0]) < 104 or kind == "ranking"
    ranking = [labelled(store, ranking_cases(store, split, s, 10, 2), "ranking") for s in ("train", "val", "test")]
    # The first block of each user has no history; blocks of two are cut where the split cuts them.
    assert ranking == [[102, 103], [104, 201, 202], [105, 203]]


def test_evaluation_windows_label_every_event_once(tmp_path: Path) -> None:
    store = make_store(tmp_path, [40, 3], [[*range(40)], [0, 38, 39]])
    split = Split("time", val_share=0.1, test_share=0.5)
    cases = retrieval_cases(store, split, "test", 6)
    first, last = split.ranges(store, "test")
    expected = [
        100 * (user + 1) + n - start for user, start in ((0, 0), (1, 40)) for n in range(first[user], last[user])
    ]
    assert sorted(labelled(store, cases, "retrieval")) == expected
    assert cases.lengths.max() <= 6
    # Labels of a window's older half have history in it, unless the user has none.
    assert all(first - start >= 3 or start in store.offsets for start, first in zip(cases.start, cases.first_label))  # noqa: B905


def test_split_by_user(tmp_path: Path) -> None:
    store = make_store(tmp_path, [4] * 20)
    split = Split("user", val_share=0.2, test_share=0.3, seed=3)
    users = [set(retrieval_cases(store, split, stage, 9).user) for stage in ("train", "val", "test")]
    assert [len(part) for part in users] == [10, 4, 6]
    assert not (users[0] & users[1])
    assert not (users[0] & users[2])
    assert not (users[1] & users[2])
    test = retrieval_cases(store, split, "test", 9)
    assert sorted(labelled(store, test, "retrieval")) == [100 * (user + 1) + 3 for user in sorted(users[2])]
    blocks = ranking_cases(store, split, "test", 9, num_candidates=3)
    assert sorted(labelled(store, blocks, "ranking")) == [100 * (user + 1) + 3 for user in sorted(users[2])]


def test_leave_one_out_for_ranking_holds_out_blocks(tmp_path: Path) -> None:
    store = make_store(tmp_path, [7, 4])
    parts = [ranking_cases(store, Split(), stage, 10, num_candidates=2) for stage in ("train", "val", "test")]
    # User 1: blocks 0 1 | 2 3 | 4 5 | 6; user 2 has two blocks and only trains.
    assert [labelled(store, part, "ranking") for part in parts] == [[102, 103, 202, 203], [104, 105], [106]]


def test_split_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave_one_out"):
        Split("last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="less than 1"):
        Split("time", 0.5, 0.5)
    frame = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3]})
    frame.write_parquet(tmp_path / "t.parquet")
    store = prepare(ParquetTable(tmp_path / "t.parquet", timestamp=None), tmp_path, progress=False)
    with pytest.raises(ValueError, match="needs timestamps"):
        retrieval_cases(store, Split("time"), "train", 10)


def test_target_hash(tmp_path: Path) -> None:
    store, other = make_store(tmp_path / "a", [5, 4]), make_store(tmp_path / "b", [5, 5])
    hashes = [target_hash(s, retrieval_cases(s, Split(), "test", 9), "retrieval") for s in (store, store, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    # The history's length is not part of the task.
    assert target_hash(store, retrieval_cases(store, Split(), "test", 2), "retrieval") == hashes[0]


def test_hash_of_the_real_test_targets(data_root: Path, tmp_path: Path) -> None:
    data = SequenceDataModule(MovieLens(data_root / "ml-100k"), "retrieval", cache_dir=tmp_path, progress=False)
    assert data.test_targets_hash == "0dc765516a3b6012"


def test_retrieval_batch(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 4], [[1, 2, 4, 8, 16], [1, 3, 9, 27]])
    cases = retrieval_cases(store, Split(), "test", 2)
    batch = Collator(store, "retrieval", seen=True)(cases)
    raw = torch.from_numpy(store.item_keys)
    assert raw[batch.features["item"].values()].tolist() == [102, 103, 201, 202]
    assert batch.labels is not None
    assert batch.labels.tolist()[::2] == [-1, -1]
    assert raw[batch.labels[1::2]].tolist() == [104, 203]
    assert batch.seq_offsets.tolist() == [0, 2, 4]
    assert batch.max_seqlen == 2
    assert batch.timestamps is not None
    assert batch.timestamps.tolist() == [4, 8, 3, 9]
    assert batch.query_timestamps is not None
    assert batch.query_timestamps.tolist() == [8, 16, 9, 27]
    assert batch.user_ids is not None
    assert batch.user_ids.tolist() == [1, 2]
    # What truncation cut off is still known to be seen.
    assert raw[batch.features[SEEN].values()].tolist() == [100, 101, 200]
    assert batch.features[SEEN].lengths().tolist() == [2, 1]
    own = Collator(store, "retrieval", query_time="own")(cases)
    assert own.query_timestamps is not None
    assert own.query_timestamps.tolist() == [4, 8, 3, 9]


def test_ranking_batch(tmp_path: Path) -> None:
    store = make_store(tmp_path, [5, 3], [[1, 2, 4, 8, 16], [1, 3, 9]])
    cases = ranking_cases(store, Split("user", 0.0, 0.99), "test", 9, num_candidates=2)
    batch = Collator(store, "ranking", actions=True, tasks=["like"])(cases)
    raw = torch.from_numpy(store.item_keys)
    assert raw[batch.features["item"].values()].tolist() == [100, 101, 102, 103, 104, 200, 201, 202]
    assert batch.features["action"].values().tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert batch.num_targets is not None
    assert batch.num_targets.tolist() == [1, 1]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[0.0], [0.0]]
    # Candidates, and the row before them, have their own time.
    assert batch.query_timestamps is not None
    assert batch.query_timestamps.tolist() == [2, 4, 8, 8, 16, 3, 3, 9]


def plan(lengths: list[int], **options: object) -> BatchPlan:
    return BatchPlan(np.array(lengths), **{"batch_size": 3, **options})  # type: ignore[arg-type]


def test_plans_shuffle_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        one = plan([1] * 50, shuffle=True, seed=seed, training=True)
        one.set_epoch(epoch)
        return np.concatenate(one.batches()).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)
    assert sorted(order(1, 3)) == list(range(50))
    assert np.concatenate(plan([1] * 50).batches()).tolist() == list(range(50))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [None, 12])
def test_plans_part_cases_over_ranks(world_size: int, budget: int | None) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 50).tolist()

    def ranks(training: bool) -> list[list[np.ndarray]]:
        options = {"world_size": world_size, "training": training, "shuffle": training, "token_budget": budget}
        return [plan(lengths, rank=rank, **options).batches() for rank in range(world_size)]

    evaluated = np.concatenate([batch for batches in ranks(False) for batch in batches])
    assert sorted(evaluated) == list(range(50))
    trained = ranks(True)
    assert len({len(batches) for batches in trained}) == 1
    assert all(len({len(batches[n]) for batches in trained}) == 1 for n in range(len(trained[0])))
    seen = np.concatenate([batch for batches in trained for batch in batches])
    assert len(seen) == len(set(seen)) == 50 - 50 % world_size
    if budget is not None:
        assert all(np.array(lengths)[batch].sum() <= budget for batches in trained for batch in batches)


def test_the_global_batch_is_the_same_for_any_world_size() -> None:
    def global_batches(world_size: int) -> list[list[int]]:
        options = {
            "world_size": world_size,
            "training": True,
            "shuffle": True,
            "seed": 5,
            "batch_size": 12 // world_size,
        }
        ranks = [plan([1] * 48, rank=rank, **options).batches() for rank in range(world_size)]
        return [sorted(np.concatenate(parts).tolist()) for parts in zip(*ranks, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(4)


def test_plan_arguments() -> None:
    with pytest.raises(ValueError, match="token_budget is 5"):
        plan([6, 2], token_budget=5)
    with pytest.raises(ValueError, match="rank"):
        plan([1], rank=2, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_in_mid_epoch(tmp_path: Path, workers: int) -> None:
    store = make_store(tmp_path, [7] * 20)
    cases = retrieval_cases(store, Split(), "train", 4)
    thinner = StochasticLength(1.2, 4)

    def loader() -> SequenceLoader:
        options = {"shuffle": True, "training": True, "seed": 3}
        collator = Collator(store, "retrieval", stochastic_length=thinner)
        return SequenceLoader(cases, plan(cases.lengths.tolist(), **options), collator, workers)

    whole = loader()
    whole.sampler.set_epoch(2)
    everything = [batch.features["item"].values().tolist() for batch in whole]
    assert len(everything) == len(whole) == 7
    half = loader()
    half.sampler.set_epoch(2)
    batches = iter(half)
    for _ in range(3):
        next(batches)
    state = half.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert [batch.features["item"].values().tolist() for batch in resumed] == everything[3:]
    # The epoch after that is whole again.
    assert len(list(resumed)) == 7
    resumed.load_state_dict(whole.state_dict())
    assert len(list(resumed)) == 7


def _ranks(tmp_path: Path, world_size: int, global_batch: int = 8, **options: object) -> list[SequenceLoader]:
    """The loaders of all ranks, with histories thinned out."""
    store = make_store(tmp_path, [9] * 45)
    cases = retrieval_cases(store, Split(), "train", 6)
    collator = Collator(store, "retrieval", stochastic_length=StochasticLength(1.2, 4))
    options = {"shuffle": True, "training": True, "seed": 3, "batch_size": global_batch // world_size, **options}
    lengths = cases.lengths.tolist()
    return [
        SequenceLoader(cases, plan(lengths, rank=rank, world_size=world_size, epoch=1, **options), collator)
        for rank in range(world_size)
    ]


def _global_batches(loaders: list[SequenceLoader]) -> list[list[tuple[int, ...]]]:
    """User and items of each case of each global batch, of all ranks together."""
    batches = []
    for parts in zip(*loaders, strict=True):
        rows: list[tuple[int, ...]] = []
        for part in parts:
            assert part.user_ids is not None
            items = part.features["item"].to_dense()
            rows += [(int(user), *row.tolist()) for user, row in zip(part.user_ids, items, strict=True)]
        batches.append(sorted(rows))
    return batches


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1), (2, 1)])
def test_other_ranks_go_on_with_the_same_global_batches(tmp_path: Path, before: int, after: int) -> None:
    saving = _ranks(tmp_path, before)
    everything = _global_batches(saving)
    assert len(everything) == 6
    lengths = [len(row) for rows in everything for row in rows]
    assert min(lengths) < max(lengths), "some histories are thinned out"
    for loader in saving:
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
    resumed = _ranks(tmp_path, after)
    for loader in resumed:
        loader.load_state_dict(saving[0].state_dict())
    left = _global_batches(resumed)
    assert left[:2] == everything[3:5]
    # Of the last batch, ranks that are many drop what they can't share evenly.
    shorter, longer = sorted([left[2], everything[5]], key=len)
    assert len(longer) - len(shorter) < 4
    assert set(shorter) <= set(longer)


def test_resuming_in_mid_epoch_on_other_ranks_has_its_bounds(tmp_path: Path) -> None:
    loader = _ranks(tmp_path, 2)[0]
    list(zip(range(3), loader, strict=False))
    state = loader.state_dict()
    with pytest.raises(
        ValueError, match=r"2 ranks, now there are 1, and a global batch has 4 .* set data.batch_size=8"
    ):
        _ranks(tmp_path, 1, global_batch=4)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="its batches depend on that"):
        _ranks(tmp_path, 1, token_budget=40)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="its batches depend on that"):
        _ranks(tmp_path, 1)[0].load_state_dict({"epoch": 0, "position": 3, "world_size": 2})
    with pytest.raises(ValueError, match="with 40 cases an epoch instead of 45"):
        _ranks(tmp_path, 1)[0].load_state_dict({**state, "cases": 40})


def test_stochastic_length_follows_its_law() -> None:
    law = StochasticLength(1.6, 100)
    assert law.short_length == 39  # 100^0.8 = 39.8
    lengths = np.array([10, 39, 40, 60, 100])
    chance = law.thinning_probability(lengths)
    assert chance.tolist() == pytest.approx([0, 0, 1 - 100**1.6 / 1600, 1 - 100**1.6 / 3600, 1 - 100**1.6 / 10000])
    n = 4000
    cases = Cases(np.zeros(n, int), np.zeros(n, int), np.full(n, 90), np.full(n, 100))
    rng = np.random.default_rng(0)
    rows, kept, first = law.rows(cases, ranking=False, times=None, rng=rng)
    thinned = kept == 39
    assert set(kept) == {39, 100}
    assert thinned.mean() == pytest.approx(chance[-1], abs=3 * (chance[-1] * (1 - chance[-1]) / n) ** 0.5)
    ends = np.cumsum(kept) - 1
    assert (rows[ends] == 99).all()  # the newest row always stays
    assert all((np.diff(part) > 0).all() for part in np.split(rows, ends[:-1] + 1)[:50])
    # Ranking: the ten candidates stay, in a place of their own.
    rows, kept, first = law.rows(cases, ranking=True, times=None, rng=rng)
    assert set(kept) == {49, 100}
    assert set(kept - first) == {10}


def test_recent_selection_weighs_rows_by_age() -> None:
    # One of three older rows is drawn; their ages 100, 10 and 5 give weights 15, 105 and 110 of 230.
    law = StochasticLength(1.1, 4, "recent")
    assert law.short_length == 2
    n = 6000
    cases = Cases(np.zeros(n, int), np.zeros(n, int), np.full(n, 4), np.full(n, 4))
    rows, kept, _ = law.rows(cases, False, np.array([0, 90, 95, 100]), np.random.default_rng(0))
    drawn = rows[(np.cumsum(kept) - kept)[kept == 2]]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, np.array([15, 105, 110]) / 230, atol=0.03)
    with pytest.raises(ValueError, match="alpha"):
        StochasticLength(1.0, 10)


def test_synthetic_chances_are_exact_and_calibrated(tmp_path: Path) -> None:
    reader = Synthetic(num_users=3000, num_items=30, events_per_user=12, session_length=3, drift=0.3)
    data = prepare(reader, tmp_path, progress=False)
    assert data.known is not None
    assert data.labels is not None
    for bit in range(3):
        drawn = (data.labels >> bit) & 1
        for low in (0.0, 0.2, 0.4, 0.6):
            inside = (data.known[:, bit] >= low) & (data.known[:, bit] < low + 0.2)
            if inside.sum() > 500:
                error = 4 * (0.25 / inside.sum()) ** 0.5
                assert drawn[inside].mean() == pytest.approx(data.known[inside, bit].mean(), abs=error)


def test_filtered_chances_equal_a_sum_over_all_paths_of_interest() -> None:
    reader = Synthetic(num_users=1, num_items=7, events_per_user=9, session_length=3, num_interests=3, drift=0.2)
    rng = np.random.default_rng(0)
    item, click = rng.integers(0, 7, (1, 3, 3)), rng.random((1, 3, 3)) < 0.5
    total, weighted = 0.0, np.zeros(3)
    for path in np.ndindex(3, 3, 3):
        chance = 1 / 3
        for before, after in itertools.pairwise(path):
            chance *= (0.8 if before == after else 0.0) + 0.2 / 3
        for session in range(2):
            p = reader.click_probability(np.asarray(path[session]), item[0, session])
            chance *= np.where(click[0, session], p, 1 - p).prod()
        total += chance
        weighted += chance * reader.click_probability(np.asarray(path[2]), item[0, 2])
    filtered = reader.filtered_click_probability(item, click)
    np.testing.assert_allclose(filtered[0, 2], weighted / total, rtol=1e-10)


def test_retrieval_best_ten_is_reached_by_the_best_list(tmp_path: Path) -> None:
    reader = Synthetic("retrieval", num_users=400, num_items=50, events_per_user=30)
    data = prepare(reader, tmp_path, progress=False)
    module = SequenceDataModule(reader, "retrieval", cache_dir=tmp_path, progress=False)
    best = module.best_reachable["hr@10"]
    pairs = np.stack([data.item[:-1], data.item[1:]])[:, np.diff(np.repeat(np.arange(400), 30)) == 0]
    counts = np.zeros((50, 50))
    np.add.at(counts, (pairs[0], pairs[1]), 1)
    top = np.sort(counts, axis=1)[:, -10:].sum() / counts.sum()
    assert 0.7 < best < 1.0
    assert best == pytest.approx(top, abs=0.05)


def test_arriving_items_are_new_and_leave() -> None:
    reader = Synthetic(num_users=50, num_items=20, events_per_user=60, session_length=10, arriving=0.5)
    chunk = next(reader.chunks())
    sessions = chunk.item.reshape(50, 6, 10)
    assert sessions.min() >= 2**40
    first, last = set(sessions[:, 0].ravel()), set(sessions[:, -1].ravel())
    assert len(first) <= 20
    assert not first & last


def test_data_module_errors(tmp_path: Path) -> None:
    reader = Synthetic("retrieval", num_users=5, num_items=9, events_per_user=5)
    with pytest.raises(ValueError, match="no labels to rank by"):
        SequenceDataModule(reader, "ranking", cache_dir=tmp_path, progress=False).setup()
    with pytest.raises(ValueError, match="no side feature genre"):
        SequenceDataModule(reader, "retrieval", side_features=["genre"], cache_dir=tmp_path, progress=False).setup()
    with pytest.raises(ValueError, match="kind"):
        SequenceDataModule(reader, "both", cache_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one session"):
        Synthetic(events_per_user=3)


def test_data_module_schema_and_counts(tmp_path: Path) -> None:
    reader = Synthetic(num_users=60, num_items=20, events_per_user=40)
    data = SequenceDataModule(reader, "ranking", cache_dir=tmp_path, tasks=["like"], progress=False, batch_size=7)
    assert data.schema.tasks == ["like"]
    assert data.schema.side_features == {"topic": 4}
    batch = next(iter(data.train_dataloader()))
    assert batch.features.keys() == ["item", "action", "topic"]
    assert batch.labels is not None
    assert batch.labels.shape[1] == 1
    # Blocks 0 and 1 of each user train; the first block only as history.
    assert int(data.item_counts.sum()) == 60 * 20
    assert sum(b.labels.shape[0] for b in data.test_dataloader()) == 600  # type: ignore[union-attr]


def test_a_batch_moves_with_the_parts_of_its_features(tmp_path: Path) -> None:
    """TorchRec's own `to` leaves the parts into which features were taken before."""
    store = make_store(tmp_path, [5, 4], [[1, 2, 4, 8, 16], [1, 3, 9, 27]])
    batch = Collator(store, "retrieval", seen=True)(retrieval_cases(store, Split(), "test", 2))
    assert batch.features.to_dict()["item"].values().device.type == "cpu"
    moved = batch.to("meta").features
    assert moved.values().device.type == "meta"
    assert moved.to_dict()["item"].values().device.type == "meta"
