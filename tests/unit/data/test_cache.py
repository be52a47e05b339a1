"""Preparation: order, keys of the cache, atomicity, and the counts of the real data sets."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from genrec.data import DataError, EventStore, SequenceDataModule, prepare
from genrec.data import cache as cache_module
from genrec.data.readers import AmazonSequences, MovieLens
from tests.unit.data.logs import ListReader, random_log, store_of


def columns_by_user(store):
    """raw user -> [(raw item, time)]."""
    keys = store.item_keys if len(store.item_keys) else None
    return {
        int(key): [(int(item if keys is None else keys[item]), int(time)) for item, time in zip(*part, strict=True)]
        for number, key in enumerate(store.user_keys)
        for part in [[c[store.offsets[number] : store.offsets[number + 1]] for c in (store.item, store.timestamp)]]
    }


def test_order_against_a_plain_sort(tmp_path):
    reader = random_log(0, users=300, longest=9)
    store = store_of(reader, tmp_path)
    expected = {}
    for user, item, when in reader.events:
        expected.setdefault(user, []).append((item, when))
    assert columns_by_user(store) == {user: sorted(expected[user], key=lambda e: e[1]) for user in sorted(expected)}
    assert store.num_users == len(expected)
    assert store.schema.num_items == len({item for _, item, _ in reader.events})
    assert store.item_keys.tolist() == sorted({item for _, item, _ in reader.events})


def test_every_column_moves_with_its_event(tmp_path):
    reader = random_log(1, users=100)
    store = store_of(reader, tmp_path)
    found = zip(
        np.repeat(store.user_keys, np.diff(store.offsets)).tolist(),
        store.item_keys[store.item].tolist(),
        store.timestamp.tolist(),
        store.labels.tolist(),
        store.action.tolist(),
        store.value.tolist(),
        strict=True,
    )
    given = zip(reader.events, reader.labels, reader.value, strict=True)
    assert sorted(found) == sorted((*event, bits, bits, value) for event, bits, value in given)


@pytest.mark.parametrize(("tie_break", "items"), [("input", [9, 7, 8, 5]), ("item", [7, 8, 9, 5])])
def test_ties_in_time(tmp_path, tie_break, items):
    reader = ListReader([(1, 5, 20), (1, 9, 10), (1, 7, 10), (2, 1, 10), (1, 8, 10)], chunk=2)
    store = store_of(reader, tmp_path, tie_break=tie_break)
    assert store.item_keys[store.item].tolist() == [*items, 1]


def test_ties_need_times(tmp_path):
    reader = ListReader([(1, 5, None), (1, 3, None)])
    store = store_of(reader, tmp_path)
    assert store.item_keys[store.item].tolist() == [5, 3]
    with pytest.raises(ValueError, match="tie_break='item' needs timestamps"):
        store_of(reader, tmp_path / "b", tie_break="item")
    with pytest.raises(ValueError, match="tie_break must be"):
        store_of(reader, tmp_path / "b", tie_break="time")
    assert not list((tmp_path / "b").iterdir())


def test_negative_and_huge_ids(tmp_path):
    users, items = [-(2**63), 2**63 - 1, -1, 0], [2**63 - 1, -(2**63), 5, -7]
    store = store_of(ListReader([(u, i, 1) for u, i in zip(users, items, strict=True)]), tmp_path)
    assert columns_by_user(store) == {user: [(item, 1)] for user, item in sorted(zip(users, items, strict=True))}


def test_raw_item_ids(tmp_path):
    reader = ListReader([(1, 2**40, 1), (1, 3, 2)], item_features={"kind": {3: 1}}, user_features={"age": {1: 4}})
    store = store_of(reader, tmp_path, remap_items=False)
    assert store.item.tolist() == [2**40, 3]
    assert store.schema.num_items == 2**40 + 1
    assert len(store.item_keys) == 0
    assert store.schema.side_features == {}, "item features are by item id, and there is no room for 2^40"
    assert store.user_features["age"].tolist() == [4]


def test_features_of_unknown_ids_are_0(tmp_path):
    reader = ListReader(
        [(1, 10, 1), (2, 11, 1), (3, 12, 1)],
        item_features={"kind": {12: 2, 99: 3, 10: 1}}, user_features={"age": {3: 5}},
    )  # fmt: skip
    store = store_of(reader, tmp_path)
    assert store.item_features["kind"].tolist() == [1, 0, 2]
    assert store.user_features["age"].tolist() == [0, 0, 5]
    assert store.schema.side_features == {"kind": 4}
    assert store.schema.contextual_features == {"age": 6}


def test_chunks_of_different_columns(tmp_path):
    class Uneven(ListReader):
        def chunks(self):
            first, second = super().chunks()
            second.timestamp = None
            yield from (first, second)

    with pytest.raises(DataError, match="Uneven: the first chunk has the columns"):
        store_of(Uneven([(1, 1, 1), (1, 2, 2), (2, 1, 1)], chunk=2), tmp_path)
    assert not list(tmp_path.iterdir())


def write_ratings(folder, text="1\t2\t3\t4\n1\t3\t3\t5\n"):
    folder.mkdir(exist_ok=True)
    (folder / "u.data").write_text(text)
    return MovieLens(folder)


def test_the_cache_is_used_again(tmp_path, monkeypatch):
    reader = write_ratings(tmp_path / "in")
    first = store_of(reader, tmp_path / "cache")
    # The folder that the data is in doesn't matter, nor when it was written.
    (tmp_path / "in").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "u.data", (time.time() + 100, time.time() + 100))
    monkeypatch.setattr(cache_module, "_Builder", None)
    assert store_of(MovieLens(tmp_path / "moved"), tmp_path / "cache").path == first.path


def test_the_key_changes_with_content_and_options(tmp_path):
    reader = write_ratings(tmp_path / "in")
    made = [store_of(reader, tmp_path / "cache", **options).path for options in (
        {}, {"tie_break": "item"}, {"remap_items": False},
    )]  # fmt: skip
    store = store_of(write_ratings(tmp_path / "in", "1\t2\t3\t4\n1\t3\t3\t6\n"), tmp_path / "cache")
    assert store.timestamp.tolist() == [4, 6]
    (tmp_path / "in" / "u.user").write_text("1|24|M|technician|85711\n")
    with_users = store_of(reader, tmp_path / "cache")
    assert "age" in with_users.user_features
    assert len({*made, store.path, with_users.path}) == 5


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "here"))
    store = prepare(write_ratings(tmp_path / "in"), progress=False)
    assert store.path.parent == tmp_path / "here"


@pytest.mark.parametrize("failing", ["tables", "schema", "chunks"])
def test_a_failure_leaves_nothing_behind(tmp_path, failing):
    reader = random_log(2)

    class Failing(ListReader):
        pass

    def fail(*_):
        raise RuntimeError("no power")

    broken = Failing(**vars(reader))
    setattr(Failing, failing, fail)
    with pytest.raises(RuntimeError, match="no power"):
        store_of(broken, tmp_path)
    assert not list(tmp_path.iterdir())
    delattr(Failing, failing)
    assert store_of(broken, tmp_path).num_events == len(reader.events)


def test_another_process_was_faster(tmp_path, monkeypatch):
    reader = random_log(3)

    class Slow(cache_module._Builder):
        def run(self, source):
            super().run(source)
            with monkeypatch.context() as patch:
                patch.setattr(cache_module, "_Builder", Slow.__base__)
                paths.append(store_of(reader, tmp_path).path)

    paths = []
    monkeypatch.setattr(cache_module, "_Builder", Slow)
    assert [store_of(reader, tmp_path).path] == paths
    assert list(tmp_path.iterdir()) == paths


def test_a_large_file_is_known_by_its_ends(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate((1 << 28) + 1)  # Sparse: takes no room.
    before = cache_module._fingerprint(path)
    assert cache_module._fingerprint(path) == before
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert cache_module._fingerprint(path) != before


def test_opening_checks_the_folder(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        EventStore.open(tmp_path)
    store = store_of(random_log(4), tmp_path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps({**manifest, "version": -1}))
    with pytest.raises(DataError, match="delete the folder"):
        EventStore.open(store.path)


def test_an_opened_store_equals_the_prepared_one(tmp_path):
    store = store_of(random_log(5), tmp_path)
    again = EventStore.open(store.path)
    for field in dataclasses.fields(EventStore):
        np.testing.assert_equal(getattr(again, field.name), getattr(store, field.name))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


def test_movielens_100k(data_root, real):
    store = store_of(MovieLens(data_root / "ml-100k"), real)
    assert (store.num_users, store.schema.num_items, store.num_events) == (943, 1682, 100_000)
    assert np.bincount(store.action).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    assert ((store.labels & 1).sum(), (store.labels >> 1).sum()) == (34174 + 21201, 21201)
    times = np.diff(store.timestamp)
    assert (np.delete(times, store.offsets[1:-1] - 1) >= 0).all()
    assert set(store.schema.contextual_features) == {"gender", "age", "occupation"}
    assert (store.schema.contextual_features["gender"], store.schema.contextual_features["occupation"]) == (3, 22)


def test_amazon_beauty(data_root, real):
    store = store_of(AmazonSequences(data_root / "amazon-beauty"), real)
    assert (store.num_users, store.schema.num_items, store.num_events) == (22_363, 12_101, 198_502)
    assert np.diff(store.offsets).min() == 5


@pytest.mark.parametrize(
    ("make", "tie_break", "expected"),
    [
        (lambda root: MovieLens(root / "ml-100k"), "input", "0dc765516a3b6012"),
        (lambda root: MovieLens(root / "ml-100k"), "item", "55c9d5aa59504802"),
        (lambda root: AmazonSequences(root / "amazon-beauty"), "input", "1dd1ffe2e245ab9d"),
    ],
)
def test_hashes_of_the_real_test_targets(data_root, real, make, tie_break, expected):
    # Expected: users ascending, each one's last item by a plain sort of the file's lines, packed and hashed.
    module = SequenceDataModule(make(data_root), "retrieval", cache_dir=real, tie_break=tie_break, progress=False)
    assert module.test_targets_hash == expected
