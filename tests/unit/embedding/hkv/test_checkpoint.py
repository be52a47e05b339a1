"""Saves of one process: exact, incremental, atomic; Parquet; evicted rows. More ranks: tests/distributed."""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.embedding.hkv import (
    DynamicEmbeddingCollection,
    HkvTable,
    dump_increment,
    export_parquet,
    import_parquet,
    load_increment,
    load_tables,
    save_tables,
)
from genrec.embedding.hkv.state import load_table_state, table_state
from tests.helpers import kjt
from tests.unit.embedding.hkv.tables import config

COLUMNS = ("keys", "scores", "steps", "updates", "weights", "optimizer")


def make(**changes) -> DynamicEmbeddingCollection:
    options = {"capacity": 2048, "initial_capacity": 128, "optimizer": "adam", "score": "lfu", **changes}
    return DynamicEmbeddingCollection(
        [config("items", 4, **options), config("users", 6, optimizer="rowwise_adagrad", admission_threshold=2)], seed=1
    )


def train(module: DynamicEmbeddingCollection, steps: int, seed: int, keys: int = 900) -> list[float]:
    """Losses of some steps on ids of which most repeat."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(-keys // 2, keys // 2, (2, 150), generator=generator) * 2**33
        out = module(kjt({"items": [ids[0].tolist()], "users": [ids[1].tolist()]}))
        loss = sum((value.values() - 1).square().mean() for value in out.values())
        loss.backward()
        losses.append(float(loss))
    return losses


def assert_equal(one: DynamicEmbeddingCollection, other: DynamicEmbeddingCollection) -> None:
    for name in one.tables:
        first, second = table_state(one.tables[name]), table_state(other.tables[name])
        for column in COLUMNS:
            assert torch.equal(first[column], second[column]), (name, column)
        for column in ("keys", "counts", "steps"):
            order, again = first["counters"]["keys"].argsort(), second["counters"]["keys"].argsort()
            assert torch.equal(first["counters"][column][order], second["counters"][column][again])
        ignored = ("slots", "clock")  # the clock ticks while two tables train in turn
        scalars = {key: value for key, value in first["scalars"].items() if key not in ignored}
        assert scalars == {key: value for key, value in second["scalars"].items() if key not in ignored}


def test_state_dict_is_complete_and_training_goes_on_exactly(tmp_path):
    module = make(capacity=512)
    train(module, 6, seed=0)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    copy = make(capacity=512)
    copy.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_equal(module, copy)
    assert module.tables["items"].info().evicted > 0, "eviction must go on alike too"
    assert train(module, 6, seed=1) == train(copy, 6, seed=1)
    assert_equal(module, copy)


def test_save_and_load_are_exact_and_training_goes_on_exactly(tmp_path):
    module = make(capacity=512)
    train(module, 6, seed=0)
    save_tables(module, tmp_path)
    copy = make(capacity=512)
    train(copy, 2, seed=5)
    load_tables(copy, tmp_path)
    assert_equal(module, copy)
    assert copy.tables["items"]._clock == module.tables["items"]._clock
    assert train(module, 6, seed=1) == train(copy, 6, seed=1)
    assert_equal(module, copy)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_rows_are_saved_exactly(tmp_path, dtype):
    module = make(dtype=dtype)
    train(module, 3, seed=0)
    save_tables(module, tmp_path)
    copy = make(dtype=dtype)
    load_tables(copy, tmp_path)
    assert_equal(module, copy)


def test_another_optimizer_keeps_the_rows_and_starts_its_own_state(tmp_path):
    module = make()
    train(module, 3, seed=0)
    save_tables(module, tmp_path)
    copy = make(optimizer="adagrad")
    load_tables(copy, tmp_path)
    first, second = table_state(module.tables["items"]), table_state(copy.tables["items"])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(second["optimizer"], torch.zeros(first["keys"].numel(), 4))


@given(seed=st.integers(0, 1000), steps=st.integers(0, 3), later=st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_base_and_increment_are_the_whole(tmp_path_factory, seed, steps, later):
    folder = tmp_path_factory.mktemp("increment")
    module = make(capacity=512)
    train(module, steps, seed)
    base = {name: table.step for name, table in module.tables.items()}
    save_tables(module, folder / "base")
    train(module, later, seed + 1)
    module.tables["items"].erase(table_state(module.tables["items"])["keys"][:5])
    dump_increment(module, folder / "more", since_step=base)
    copy = make(capacity=512)
    load_tables(copy, folder / "base")
    load_increment(copy, folder / "more")
    assert_equal(module, copy)


def test_increment_holds_only_updated_rows_and_knows_times(tmp_path):
    module = make()
    train(module, 3, seed=0)
    table = module.tables["items"]
    table._clock = [(1000.0, 1), (2000.0, 3)]
    assert [table.step_at(moment) for moment in (500.0, 1000.0, 1999.0, 2000.0)] == [0, 0, 0, 2]
    module(kjt({"items": [[5]], "users": [[5, 5]]}))
    dump_increment(module, tmp_path, since_step=3)
    folder = next(tmp_path.glob("data-*"))
    sizes = {path.name: torch.from_numpy(__import__("numpy").load(path)).shape[0] for path in folder.iterdir()}
    assert sizes["items.0.weights.npy"] == 1
    assert sizes["items.0.keys.npy"] == table.size
    module.tables["users"]._clock = table._clock
    dump_increment(module, tmp_path, since_time=2000.0)
    assert json.loads((tmp_path / "manifest.json").read_text())["since"] == {"items": 2, "users": 2}


def test_rows_written_between_two_batches_are_in_the_increment(tmp_path):
    module = make()
    train(module, 3, seed=0)
    table = module.tables["items"]
    keys = table.export()["keys"]
    save_tables(module, tmp_path / "base")
    table.assign(keys[:3], torch.full((3, 4), 7.0))
    table.accum(keys[3:5], torch.ones(2, 4))
    dump_increment(module, tmp_path / "more", since_step={name: one.step for name, one in module.tables.items()})
    copy = make()
    load_tables(copy, tmp_path / "base")
    load_increment(copy, tmp_path / "more")
    assert_equal(module, copy)
    assert torch.equal(copy.tables["items"].embed(keys[:3]), torch.full((3, 4), 7.0))


def test_a_loaded_table_goes_on_with_the_seed_that_it_was_saved_with(tmp_path):
    module = make()
    train(module, 2, seed=0)
    save_tables(module, tmp_path)
    strangers = torch.arange(10**6, 10**6 + 20)
    expected = module.tables["items"].embed(strangers)
    for how in ("files", "state_dict"):
        other = DynamicEmbeddingCollection(module.table_configs(), seed=99)
        assert not torch.equal(other.tables["items"].embed(strangers), expected)
        if how == "files":
            load_tables(other, tmp_path)
        else:
            other.load_state_dict(module.state_dict())
        assert torch.equal(other.tables["items"].embed(strangers), expected)
        assert torch.equal(deepcopy(other).tables["items"].embed(strangers), expected)


def test_the_clock_stays_small(monkeypatch):
    table = make().tables["items"]
    moments = iter(range(0, 400_000))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    for _ in range(400_000):
        table._advance()
    assert len(table._clock) < 9000
    for moment in (0, 500, 5000, 123_456, 399_999):
        assert 0 <= moment - table.step_at(moment) <= 1 + max(1, moment // 1000)


def test_misuse_is_explained(tmp_path):
    module = make()
    train(module, 2, seed=0)
    with pytest.raises(FileNotFoundError, match="holds no finished save"):
        load_tables(module, tmp_path)
    with pytest.raises(ValueError, match="since_step or since_time"):
        dump_increment(module, tmp_path)
    dump_increment(module, tmp_path / "more", since_step=1)
    with pytest.raises(ValueError, match="is an increment: load its base"):
        load_tables(module, tmp_path / "more")
    with pytest.raises(ValueError, match="is at step 0, the increment extends step 1"):
        load_increment(make(), tmp_path / "more")
    save_tables(module, tmp_path / "all")
    with pytest.raises(ValueError, match="is a whole save"):
        load_increment(module, tmp_path / "all")
    other = DynamicEmbeddingCollection([config("movies")], seed=0)
    with pytest.raises(ValueError, match=r"has no dynamic table 'movies'; it has \['items', 'users'\]"):
        load_tables(other, tmp_path / "all")
    wide = DynamicEmbeddingCollection([config("items", 8)], seed=0)
    with pytest.raises(ValueError, match="rows of width 8, the saved ones have 4"):
        load_tables(wide, tmp_path / "all")
    with pytest.raises(ValueError, match="holds no dynamic tables"):
        other.load_state_dict(module.state_dict())


def test_a_smaller_table_keeps_the_last_victims(tmp_path):
    big = HkvTable(config(capacity=1024, score="lfu"), seed=0)
    for key in range(300):
        big.find_or_insert(torch.full((1 + key % 7,), key))
    small = HkvTable(config(capacity=128, score="lfu"), seed=0)
    with pytest.warns(UserWarning, match="172 of 300 saved keys don't fit"):
        load_table_state(small, table_state(big))
    scores = table_state(small)["scores"]
    assert small.size == 128
    assert scores.min() >= 5
    with pytest.raises(RuntimeError, match="score 'none' may drop none"):
        load_table_state(HkvTable(config(capacity=128, score="none"), seed=0), table_state(big))


_KILLED = """
import sys, time
import numpy as np
import genrec.embedding.hkv.checkpoint as checkpoint
from tests.unit.embedding.hkv.test_checkpoint import make, train
module = make()
checkpoint.load_tables(module, sys.argv[1])
train(module, 3, seed=9)
left = int(sys.argv[2])
real = checkpoint._write_array if left < 100 else checkpoint._replace_manifest
def wait(*arguments):
    global left
    if left in (0, 100):
        print("now", flush=True)
        time.sleep(60)
    left -= 1
    real(*arguments)
checkpoint._write_array = wait if left < 100 else checkpoint._write_array
checkpoint._replace_manifest = wait if left >= 100 else checkpoint._replace_manifest
checkpoint.save_tables(module, sys.argv[1])
"""


@pytest.mark.parametrize("moment", [0, 5, 100], ids=["first file", "amid files", "before the manifest"])
def test_killed_save_leaves_the_previous_one(tmp_path, moment):
    module = make()
    train(module, 3, seed=0)
    save_tables(module, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(moment)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "now"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    copy = make()
    load_tables(copy, tmp_path)
    assert_equal(module, copy)
    # The next save clears away what the killed one left.
    save_tables(module, tmp_path)
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_parquet_round_trip(tmp_path):
    import pyarrow.parquet as pq

    module = make()
    train(module, 3, seed=0)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part-00003.parquet").write_text("of an earlier export by four ranks")
    export_parquet(module, "items", tmp_path / "rows")
    written = pq.read_table(tmp_path / "rows")
    assert written.column_names == ["key", "row"]
    assert written.num_rows == module.tables["items"].size
    other = make(optimizer="sgd")
    assert import_parquet(other, "items", tmp_path / "rows") == written.num_rows
    keys = torch.from_numpy(written["key"].to_numpy().copy())
    assert torch.equal(other.tables["items"].embed(keys), module.tables["items"].embed(keys))
    with pytest.raises(ValueError, match="no dynamic table 'movies'"):
        export_parquet(module, "movies", tmp_path)
    with pytest.raises(ValueError, match="rows are not 6 wide"):
        import_parquet(other, "users", tmp_path / "rows")


def test_evicted_rows_can_be_fetched_once():
    table = HkvTable(config(capacity=128, optimizer="adagrad", record_evicted=True), seed=0)
    table.find_or_insert(torch.arange(128))
    table.update(table.lookup(torch.arange(128)), torch.ones(128, 4), 0.1)
    rows = table.embed(torch.arange(128))
    table.find_or_insert(torch.arange(1000, 1050))
    gone = table.pop_evicted()
    assert gone["keys"].numel() == 50
    assert torch.equal(gone["weights"], rows[gone["keys"]])
    assert torch.equal(gone["state"], torch.ones(50, 4))
    assert gone["scores"].tolist() == [2] * 50
    assert table.pop_evicted()["keys"].numel() == 0
    with pytest.raises(ValueError, match="set record_evicted: true"):
        HkvTable(config(), seed=0).pop_evicted()
