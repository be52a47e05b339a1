"""Each reader on files of a few lines; malformed input names its place and leaves nothing behind."""

import datetime as dt

import numpy as np
import polars as pl
import pytest

from genrec.data import DataError, prepare
from genrec.data.readers import AmazonRatings, AmazonSequences, KuaiRand, MovieLens, ParquetTable
from genrec.data.readers.amazon import k_core
from genrec.data.readers.kuairand import ACTIONS


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def fails(reader, cache, *words):
    """Preparing raises a DataError that has all the words, and leaves the cache empty."""
    with pytest.raises(DataError) as caught:
        prepare(reader, cache, progress=False)
    for word in words:
        assert word in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def raw_events(store):
    """(raw user, raw item) in the store's order."""
    users = np.repeat(store.user_keys, np.diff(store.offsets))
    return list(zip(users.tolist(), store.item_keys[store.item].tolist(), strict=True))


class TestMovieLens:
    def test_100k(self, tmp_path, cache):
        (tmp_path / "u.data").write_text("2\t7\t4\t30\n1\t9\t5\t20\n1\t7\t3\t10\n2\t9\t1\t5\n")
        (tmp_path / "u.user").write_bytes(b"1|24|M|technician|85711\n2|53|F|other|94043\n")
        genres = "|".join("0" * 19)
        (tmp_path / "u.item").write_bytes(
            f"7|Amélie (1995)|01-Jan-1995||url|{genres}\n9|B|01-Jan-1996||u|{genres[:-1]}1\n".encode("latin-1")
        )
        store = prepare(MovieLens(tmp_path), cache, progress=False)
        assert raw_events(store) == [(1, 7), (1, 9), (2, 9), (2, 7)]
        assert store.timestamp.tolist() == [10, 20, 5, 30]
        assert store.action.tolist() == [3, 5, 1, 4]
        assert store.labels.tolist() == [0, 3, 0, 1]
        assert store.value.tolist() == [3, 5, 1, 4]
        assert store.schema.tasks == ["like", "love"]
        assert {name: ids.tolist() for name, ids in store.item_features.items()} == {"genres": [1, 2], "year": [1, 2]}
        assert {name: ids.tolist() for name, ids in store.user_features.items()} == {
            "age": [1, 2], "gender": [2, 1], "occupation": [2, 1],
        }  # fmt: skip

    def test_1m(self, tmp_path, cache):
        (tmp_path / "ratings.dat").write_text("1::10::5::3\n2::11::3::2\n1::12::4::1\n")
        (tmp_path / "movies.dat").write_bytes(
            "10::Café\x85 (1999)::Drama\n11::X (2000)::Comedy|Drama\n12::Y::Drama\n".encode("latin-1")
        )
        (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::25::3::x\n")
        store = prepare(MovieLens(tmp_path), cache, progress=False)
        assert raw_events(store) == [(1, 12), (1, 10), (2, 11)]
        assert store.labels.tolist() == [1, 3, 0]
        assert store.item_features["genres"].tolist() == [2, 1, 2]
        assert store.item_features["year"].tolist() == [2, 3, 1]
        assert store.user_features["age"].tolist() == [1, 2]
        assert store.schema.side_features == {"genres": 3, "year": 4}

    def test_20m(self, tmp_path, cache):
        (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3.5,9\n1,3,0.5,8\n")
        (tmp_path / "movies.csv").write_text(
            'movieId,title,genres\n2,"President, The (1995)",Comedy|Drama\n3,É (1996),War\n', encoding="utf8"
        )
        store = prepare(MovieLens(tmp_path), cache, progress=False)
        assert raw_events(store) == [(1, 3), (1, 2)]
        assert store.action.tolist() == [1, 4]
        assert store.value.tolist() == [0.5, 3.5]
        assert store.labels.tolist() == [0, 0]
        assert store.item_features["year"].tolist() == [1, 2]

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("u.data", "1\t2\t3\t4\n1\tx\t3\t4\n", ["line 2", "column item", "'x'"]),
            ("u.data", "1\t2\t3\t4\n1\t2\t3\n", ["line 2", "column time"]),
            ("u.data", "1\t2\t3\t4\n1\t2\t3\t4\n1\t2\t3\t4\t5\n", ["line 3"]),
            ("u.data", "1\t2\t3\n", ["line 1", "expected 4 columns"]),
            ("u.data", "1\t2\t3\t4\n1\t2\t9\t4\n", ["line 2", "rating 9"]),
            ("u.data", "", ["empty"]),
            ("ratings.dat", "1::2::3::4\n1::2::3::later\n", ["line 2", "column time", "'later'"]),
            ("ratings.csv", "userId,movieId,rating\n1,2,3\n", ["no column timestamp"]),
            ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,3,4\n1,2,nan,4\n", ["line 3", "rating nan"]),
            ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,3,4\n1,2,3,4,5\n", ["line 3"]),
            ("ratings.csv", "userId,movieId,rating,timestamp\n", ["no events"]),
        ],
    )
    def test_malformed_ratings(self, tmp_path, cache, name, text, words):
        (tmp_path / name).write_text(text)
        fails(MovieLens(tmp_path), cache, *words)

    def test_malformed_side_file(self, tmp_path, cache):
        (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
        (tmp_path / "u.user").write_text("1|24|M|technician|85711\n2|old|F|other|94043\n")
        fails(MovieLens(tmp_path), cache, "u.user, line 2")

    def test_missing(self, tmp_path, cache):
        fails(MovieLens(tmp_path / "nowhere"), cache, "nowhere", "not a folder")
        fails(MovieLens(tmp_path), cache, "holds none of u.data")


class TestAmazon:
    def test_sequences(self, tmp_path, cache):
        (tmp_path / "b.txt").write_text("5 30 10 20\n\n3 20 20\n")
        store = prepare(AmazonSequences(tmp_path), cache, progress=False)
        assert raw_events(store) == [(3, 20), (3, 20), (5, 30), (5, 10), (5, 20)]
        assert store.timestamp is None
        assert not store.schema.has_timestamps

    def test_sequences_longer_than_a_chunk(self, tmp_path, cache, monkeypatch):
        monkeypatch.setattr("genrec.data.readers.amazon._CHUNK_EVENTS", 3)
        (tmp_path / "b.txt").write_text("1 1 2\n2 1 2\n3 1 2\n")
        reader = AmazonSequences(tmp_path)
        assert [len(chunk.user) for chunk in reader.chunks()] == [4, 2]
        assert prepare(reader, cache, progress=False).num_events == 6

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("1 2 3\n1 b 2\n", ["b.txt, line 2", "integers"]),
            ("1 2 3\n\n7\n", ["line 3", "without items"]),
            ("1 99999999999999999999\n", ["line 1", "integers"]),
            ("\n", ["no events"]),
        ],
    )
    def test_malformed_sequences(self, tmp_path, cache, text, words):
        (tmp_path / "b.txt").write_text(text)
        fails(AmazonSequences(tmp_path), cache, *words)

    def test_which_file(self, tmp_path, cache):
        fails(AmazonSequences(tmp_path / "no.txt"), cache, "does not exist")
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("1 2\n")
        fails(AmazonSequences(tmp_path), cache, "holds 2 files")

    # u1: a, b; u2: a, b; u3: a, c. With k = 2: c goes, then u3 has one rating and goes.
    RATINGS = "u1,a,5.0,1\nu1,b,4.0,2\nu3,a,3.0,3\nu3,c,1.0,4\nu2,b,2.0,6\nu2,a,2.0,5\n"

    def test_ratings(self, tmp_path, cache):
        (tmp_path / "r.csv").write_text(self.RATINGS)
        store = prepare(AmazonRatings(tmp_path, min_count=2), cache, progress=False)
        users, items = store.names("user"), store.names("item")
        assert [(users[u], items[i]) for u, i in raw_events(store)] == [
            ("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"),
        ]  # fmt: skip
        assert store.value.tolist() == [5, 4, 2, 2]
        assert store.timestamp.tolist() == [1, 2, 5, 6]

    def test_cores_differ(self):
        # Items 0 and 1 are in a chain: item 1 has two ratings, of which one is user 1's, who has one left after item 2.
        user = np.array([0, 0, 1, 1, 2, 2])
        item = np.array([0, 1, 1, 2, 0, 0])
        assert k_core(user, item, 2, "iterative").tolist() == [False, False, False, False, True, True]
        assert k_core(user, item, 2, "once").tolist() == [True, True, False, False, True, True]

    def test_k_core_by_force(self):
        rng = np.random.default_rng(0)
        # Dense enough for a core to be left, thin enough that dropping takes several rounds.
        user, item = rng.integers(30, size=160), rng.integers(30, size=160)
        left = list(zip(user.tolist(), item.tolist(), range(160), strict=True))
        while True:
            users, items = [u for u, _, _ in left], [i for _, i, _ in left]
            fewer = [e for e in left if users.count(e[0]) >= 4 and items.count(e[1]) >= 4]
            if len(fewer) == len(left):
                break
            left = fewer
        assert 0 < len(left) < 160
        assert np.flatnonzero(k_core(user, item, 4)).tolist() == [number for _, _, number in left]

    def test_options_are_part_of_the_key(self, tmp_path, cache):
        (tmp_path / "r.csv").write_text(self.RATINGS)
        every = prepare(AmazonRatings(tmp_path, min_count=1), cache, progress=False)
        some = prepare(AmazonRatings(tmp_path, min_count=2), cache, progress=False)
        assert (every.num_events, some.num_events) == (6, 4)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("u,a,5,1\nu,a,5,then\n", ["r.csv, line 2", "column timestamp"]),
            ("u,a,5\n", ["line 1", "expected 4 columns"]),
            ("u,a,5,1\n", ["no events"]),
        ],
    )
    def test_malformed_ratings(self, tmp_path, cache, text, words):
        (tmp_path / "r.csv").write_text(text)
        fails(AmazonRatings(tmp_path), cache, *words)


class TestKuaiRand:
    HEADER = "user_id,video_id,date,time_ms," + ",".join(ACTIONS[:6]) + ",long_view,play_time_ms,is_profile_enter\n"

    def write(self, folder):
        (folder / "log_standard_1.csv").write_text(
            self.HEADER + "1,10,20220408,5000,1,0,0,0,0,0,1,700,0\n1,11,20220408,3999,0,0,0,0,0,1,0,20,1\n"
        )
        (folder / "log_standard_2.csv").write_text(self.HEADER + "0,10,20220408,7000,1,1,1,1,1,1,1,9,1\n")
        (folder / "log_random_1.csv").write_text(self.HEADER + "0,12,20220408,1000,0,1,0,0,0,0,0,5,0\n")

    def test_bits(self, tmp_path, cache):
        self.write(tmp_path)
        store = prepare(KuaiRand(tmp_path), cache, progress=False)
        assert raw_events(store) == [(0, 10), (1, 11), (1, 10)]
        assert store.labels.tolist() == [255, 32 + 128, 1 + 64]
        assert store.action.tolist() == store.labels.tolist()
        assert store.timestamp.tolist() == [7, 3, 5]
        assert store.value.tolist() == [9, 20, 700]
        assert store.schema.tasks == ACTIONS
        assert store.schema.num_actions == 256
        assert not store.item_features

    def test_random_log(self, tmp_path, cache):
        self.write(tmp_path)
        store = prepare(KuaiRand(tmp_path, random_log=True), cache, progress=False)
        assert raw_events(store) == [(0, 12), (0, 10), (1, 11), (1, 10)]

    def test_features(self, tmp_path, cache):
        self.write(tmp_path)
        (tmp_path / "user_features_1.csv").write_text(
            "user_id,user_active_degree,follow_user_num_range,fans_user_num_range,friend_user_num_range,"
            "register_days_range,more\n0,full,0,0,0,8-14,x\n"
        )
        (tmp_path / "video_features_basic_1.csv").write_text(
            'video_id,author_id,video_type,upload_type,tag\n10,5,NORMAL,Short,"12,65"\n11,5,AD,Long,\n'
        )
        store = prepare(KuaiRand(tmp_path), cache, progress=False)
        assert store.user_features["user_active_degree"].tolist() == [1, 0], "user 1 has no line: unknown"
        assert store.item_features["video_type"].tolist() == [2, 1]
        assert store.item_features["tag"].tolist() == [1, 0], "an empty tag is unknown"
        assert store.schema.side_features["tag"] == 2

    def test_malformed(self, tmp_path, cache):
        fails(KuaiRand(tmp_path / "no"), cache, "not a folder")
        fails(KuaiRand(tmp_path), cache, "no log_standard")
        self.write(tmp_path)
        (tmp_path / "log_standard_2.csv").write_text(self.HEADER + "0,10,20220408,7000,yes,1,1,1,1,1,1,9,1\n")
        fails(KuaiRand(tmp_path), cache, "log_standard_2.csv, line 2, column is_click", "'yes'")
        (tmp_path / "log_standard_2.csv").write_text("user_id,video_id\n")
        fails(KuaiRand(tmp_path), cache, "log_standard_2.csv has no column", "is_click")


class TestParquet:
    def test_events_with_integers(self, tmp_path, cache):
        for name, users in (("b", [1, -5]), ("a", [1, 2**62])):
            frame = {"who": users, "what": [4, 3], "when": [20, 10], "click": [True, False], "like": [1, 1]}
            pl.DataFrame(frame).write_parquet(tmp_path / f"{name}.parquet")
        reader = ParquetTable(tmp_path, user="who", item="what", timestamp="when", labels=["click", "like"])
        store = prepare(reader, cache, progress=False)
        assert raw_events(store) == [(-5, 3), (1, 4), (1, 4), (2**62, 3)]
        assert store.labels.tolist() == [2, 3, 3, 2]
        assert store.schema.tasks == ["click", "like"]
        assert store.schema.num_actions == 4
        assert store.names("user") is None

    @pytest.mark.parametrize("ids", ["integer", "string"])
    def test_sequences_are_the_same_as_events(self, tmp_path, cache, ids):
        def name(number):
            return number if ids == "integer" else f"n{number}"

        rows = [(7, [3, 1], [5, 6], [0, 1], [0.5, 1.5]), (2, [1], [9], [1], [2.5]), (4, [], [], [], [])]
        kinds = {
            "user": pl.Int64 if ids == "integer" else pl.String,
            "item": pl.List(pl.Int64 if ids == "integer" else pl.String),
            "timestamp": pl.List(pl.Int64), "like": pl.List(pl.Int64), "watched": pl.List(pl.Float64),
        }  # fmt: skip
        named = [(name(user), [name(i) for i in items], *others) for user, items, *others in rows]
        frame = pl.DataFrame(named, schema=kinds, orient="row")
        frame.write_parquet(tmp_path / "s.parquet")
        lists = ["item", "timestamp", "like", "watched"]
        frame.filter(pl.col("item").list.len() > 0).explode(lists).write_parquet(tmp_path / "e.parquet")
        options = {"labels": ["like"], "value": "watched"}
        made = [
            prepare(ParquetTable(tmp_path / f"{layout[0]}.parquet", layout, **options), cache, progress=False)
            for layout in ("sequences", "events")
        ]
        for store in made:
            users, items = store.names("user"), store.names("item")
            found = [(users[u], items[i]) if users else (name(u), name(i)) for u, i in raw_events(store)]
            expected = [(name(7), name(3)), (name(7), name(1)), (name(2), name(1))]
            assert sorted(found) == sorted(expected)
            by_user = dict(zip(found, zip(store.timestamp.tolist(), store.value.tolist(), strict=True), strict=True))
            assert by_user == {expected[0]: (5, 0.5), expected[1]: (6, 1.5), expected[2]: (9, 2.5)}
        assert made[0].labels.tolist() == made[1].labels.tolist()

    def test_times_of_any_unit_become_seconds(self, tmp_path, cache):
        when = [dt.datetime(2020, 1, 1, second=second) for second in (9, 3)]
        for unit in ("ms", "us", "ns"):
            frame = pl.DataFrame({"user": [1, 1], "item": [1, 2], "timestamp": when})
            frame = frame.with_columns(pl.col("timestamp").cast(pl.Datetime(unit)))
            frame.write_parquet(tmp_path / "t.parquet")
            store = prepare(ParquetTable(tmp_path / "t.parquet"), cache, progress=False)
            assert store.timestamp.tolist() == [1577836803, 1577836809]

    def test_without_times(self, tmp_path, cache):
        pl.DataFrame({"user": [1, 1], "item": [9, 8]}).write_parquet(tmp_path / "t.parquet")
        store = prepare(ParquetTable(tmp_path, timestamp=None), cache, progress=False)
        assert raw_events(store) == [(1, 9), (1, 8)]
        assert not store.schema.has_timestamps

    @pytest.mark.parametrize(
        ("frame", "options", "words"),
        [
            ({"user": [1], "item": [2]}, {}, ["no column timestamp"]),
            ({"user": [1], "item": [None], "timestamp": [1]}, {}, ["column item"]),
            ({"user": [1], "item": [1.5], "timestamp": [1]}, {}, ["column item", "integers or strings"]),
            ({"user": [1, 2], "item": [1, None], "timestamp": [1, 1]}, {}, ["column item", "1 missing"]),
            ({"user": [1], "item": [1], "timestamp": ["soon"]}, {}, ["column timestamp", "times must be"]),
            ({"user": [1], "item": [1], "timestamp": [1], "a": ["x"]}, {"labels": ["a"]}, ["column a", "numbers"]),
            ({"user": [1], "item": [1], "timestamp": [[1]]}, {"layout": "sequences"}, ["column item", "needs lists"]),
            ({"user": [1], "item": [[1]], "timestamp": [[1, 2]]}, {"layout": "sequences"}, ["column timestamp"]),
            (
                {"user": [1, 2], "item": [[1], None], "timestamp": [[1], None]},
                {"layout": "sequences"},
                ["column item", "1 missing"],
            ),
        ],
    )
    def test_malformed(self, tmp_path, cache, frame, options, words):
        pl.DataFrame(frame).write_parquet(tmp_path / "t.parquet")
        fails(ParquetTable(tmp_path / "t.parquet", **options), cache, "t.parquet", *words)

    def test_files_of_different_kinds(self, tmp_path, cache):
        for name, user in (("a", 1), ("b", "one")):
            pl.DataFrame({"user": [user], "item": [1], "timestamp": [1]}).write_parquet(tmp_path / f"{name}.parquet")
        fails(ParquetTable(tmp_path), cache, "b.parquet", "column user")

    def test_not_parquet(self, tmp_path, cache):
        fails(ParquetTable(tmp_path), cache, "no *.parquet")
        (tmp_path / "t.parquet").write_text("hello")
        fails(ParquetTable(tmp_path), cache, "t.parquet is not a Parquet file")

    def test_layout_is_checked(self, tmp_path, cache):
        pl.DataFrame({"user": [1], "item": [1], "timestamp": [1]}).write_parquet(tmp_path / "t.parquet")
        with pytest.raises(ValueError, match="layout must be"):
            prepare(ParquetTable(tmp_path, layout="rows"), cache, progress=False)
