"""Training and evaluation lookups: gradients, pinning, overflow, threads, admission, tiers."""

import gc
import os
import subprocess
import sys
import warnings

import pytest
import torch

from genrec.embedding.config import InitializerConfig
from genrec.embedding.hkv import DynamicEmbeddingCollection, HkvOverflowError, HkvTable
from genrec.embedding.hkv.ops import hkv_find, hkv_lookup, hkv_pooled_find, hkv_pooled_lookup
from genrec.embedding.hkv.state import export_counters, table_state
from tests.helpers import kjt
from tests.unit.embedding.hkv.tables import config


def train(table: HkvTable, keys: torch.Tensor, anchor: torch.Tensor | None = None) -> torch.Tensor:
    anchor = torch.empty(0, requires_grad=True) if anchor is None else anchor
    return hkv_lookup(keys, anchor, table.id, table.config.dim, None)[0]


def test_evaluation_changes_nothing():
    tables = DynamicEmbeddingCollection([config(score="lfu", admission_threshold=2)], seed=0)
    tables(kjt({"items": [[1, 2, 3], [1, 2], [1]]}))
    tables.eval()
    before, info = table_state(tables.tables["items"]), bytes(tables.tables["items"].info())
    for _ in range(3):
        tables(kjt({"items": [[1, 2, 3, 99, 100], [-5]]}))
    after = table_state(tables.tables["items"])
    assert bytes(tables.tables["items"].info()) == info
    assert before["scalars"] == after["scalars"]
    for name in ("keys", "scores", "steps", "updates", "weights", "optimizer"):
        assert torch.equal(before[name], after[name])
    assert torch.equal(before["counters"]["counts"], after["counters"]["counts"])


def test_rows_of_batches_in_flight_stay_until_their_update():
    table = HkvTable(config(capacity=128, initializer=InitializerConfig("constant", value=0.0)), seed=0)
    first = train(table, torch.arange(100))
    second = train(table, torch.arange(100, 128))
    with pytest.raises(HkvOverflowError, match=r"3 keys of a batch got no row.*Raise the capacity"):
        train(table, torch.tensor([500, 501, 502]))
    first.sum().backward()
    assert torch.equal(table.embed(torch.arange(100)), torch.full((100, 4), -0.1))
    # The first batch may go now, the second may not.
    train(table, torch.arange(600, 700))
    assert table.contains(torch.arange(100, 128)).all()
    second.sum().backward()
    assert torch.equal(table.embed(torch.arange(100, 128)), torch.full((28, 4), -0.1))


def test_a_dropped_graph_lets_its_rows_go():
    table = HkvTable(config(capacity=128), seed=0)
    out = train(table, torch.arange(128))
    assert table._in_flight
    del out
    gc.collect()
    assert not table._in_flight
    train(table, torch.arange(200, 328))


def test_no_gradient_no_pin():
    table = HkvTable(config(capacity=128), seed=0)
    with torch.no_grad():
        train(table, torch.arange(128))
    assert not table._in_flight


@pytest.mark.parametrize("policy", ["warn", "init"])
def test_overflow_looks_initial_rows_up_and_drops_gradients(policy):
    table = HkvTable(config(capacity=128, score="none", on_overflow=policy), seed=0)
    table.find_or_insert(torch.arange(128))
    fresh = torch.tensor([1000, 1001, 1000])
    expected = HkvTable(config(), seed=0).embed(fresh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = train(table, fresh)
    assert len(caught) == (1 if policy == "warn" else 0)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert table.size == 128
    assert table.info().refused == 3
    assert torch.equal(table.embed(fresh), expected)


def test_a_refused_key_gets_its_initial_row_whatever_unknown_ones_get():
    """Never a silent zero: `unknown` is for keys that are not to have a row (yet)."""
    table = HkvTable(config(capacity=128, score="none", on_overflow="init", unknown=0.0), seed=0)
    table.find_or_insert(torch.arange(128))
    fresh = torch.tensor([1000, 1001])
    initial = HkvTable(config(), seed=0).embed(fresh)
    assert torch.equal(train(table, fresh), initial)
    assert torch.equal(table.find_or_insert(fresh)[0], initial)
    pooled = hkv_pooled_lookup(
        fresh, torch.tensor([0, 2]), torch.tensor([0, 0], dtype=torch.int32), None, torch.empty(0), table.id, 4
    )[0]
    torch.testing.assert_close(pooled, initial.sum(0, keepdim=True))
    assert torch.equal(table.embed(fresh), torch.zeros(2, 4))


def test_growth_between_forward_and_backward_updates_the_right_rows():
    table = HkvTable(config(capacity=4096, initial_capacity=128), seed=0)
    keys = torch.arange(90)
    before = table.embed(keys)
    out = train(table, keys)
    for start in range(1000, 3000, 200):
        train(table, torch.arange(start, start + 200)).sum().backward()
    assert table.capacity > 128
    out.sum().backward()
    torch.testing.assert_close(table.embed(keys), before - 0.1)


def test_erased_rows_drop_their_gradient():
    table = HkvTable(config(), seed=0)
    out = train(table, torch.tensor([1, 2]))
    table.erase(torch.tensor([1]))
    train(table, torch.tensor([3]))
    before = table.embed(torch.tensor([1, 2, 3]))
    out.sum().backward()
    torch.testing.assert_close(
        table.embed(torch.tensor([1, 2, 3])), before - torch.tensor([[0.0], [0.1], [0.0]]).expand(-1, 4)
    )


def test_duplicates_are_one_row_with_summed_gradients():
    table = HkvTable(config(), seed=0)
    keys = torch.tensor([5, 6, 5, 5, 6, -1])
    before = table.embed(torch.tensor([5, 6, -1]))
    (train(table, keys) * torch.arange(6.0)[:, None]).sum().backward()
    change = before - table.embed(torch.tensor([5, 6, -1]))
    torch.testing.assert_close(change, torch.tensor([[0.5], [0.5], [0.5]]).expand(-1, 4), rtol=1e-5, atol=1e-6)
    assert table.size == 3


def test_empty_batches_pass():
    table = HkvTable(config(), seed=0)
    out = train(table, torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert table.embed(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


# Admission ------------------------------------------------------------------------------------------------------------


def test_a_key_gets_a_row_after_n_sightings():
    table = HkvTable(config(admission_threshold=3, unknown=0.0), seed=0)
    key = torch.tensor([42])
    for _ in range(2):
        out = train(table, key)
        assert torch.equal(out, torch.zeros(1, 4))
        out.sum().backward()
        assert table.size == 0
    assert export_counters(table)["counts"].tolist() == [2]
    out = train(table, key)
    assert out.abs().sum() > 0
    assert table.size == 1
    assert export_counters(table)["keys"].numel() == 0
    assert table.info().unadmitted == 2


def test_sightings_within_a_batch_count_for_all_of_it():
    table = HkvTable(config(admission_threshold=3, unknown=0.0), seed=0)
    out = train(table, torch.tensor([1, 2, 1, 2, 1]))
    assert (out[[0, 2, 4]].abs().sum(1) > 0).all()
    assert torch.equal(out[[1, 3]], torch.zeros(2, 4))
    assert table.contains(torch.tensor([1, 2])).tolist() == [True, False]


def test_admission_through_growth_counts_each_sighting_once():
    options = config(capacity=8192, initial_capacity=128, admission_threshold=2, admission_capacity=8192)
    table = HkvTable(options, seed=0)
    keys = torch.arange(2000)
    train(table, keys)
    assert table.size == 0
    train(table, keys)
    assert table.size == 2000
    train(table, torch.arange(5000, 6000))
    assert table.size == 2000


def test_counters_are_bounded_and_forget_the_least():
    table = HkvTable(config(capacity=128, admission_threshold=3, admission_capacity=10), seed=0)
    for _ in range(2):
        train(table, torch.tensor([7]))
    train(table, torch.arange(100, 140))
    counters = export_counters(table)
    assert counters["keys"].numel() == 10
    assert 7 in counters["keys"].tolist(), "the most seen stays"


# Tiers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("score", ["lru", "lfu"])
def test_tiers_change_nothing_but_the_place(tmp_path, file, score):
    options = {"fast_capacity": 128}
    if file:
        options |= {"overflow_capacity": 256, "file_directory": str(tmp_path)}
    tiered = HkvTable(config(capacity=1024, optimizer="adam", initial_capacity=256, score=score, **options), seed=0)
    plain = HkvTable(config(capacity=1024, optimizer="adam", initial_capacity=256, score=score), seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        keys = (torch.rand(200, generator=generator) ** 3 * 3000).long()
        gradient = torch.randn(200, 4, generator=generator)
        for table in (tiered, plain):
            out = train(table, keys)
            out.backward(gradient)
    one, other = table_state(tiered), table_state(plain)
    for name in ("keys", "scores", "steps", "updates", "weights", "optimizer"):
        assert torch.equal(one[name], other[name]), name
    info = tiered.info()
    assert info.promoted > 0
    assert info.demoted > 0
    assert sum(info.tier_rows) == tiered.size
    assert (info.tier_rows[2] > 0) == file
    assert info.tier_bytes[0] == 1024 // 8 * 4 * 4 * 3


def test_the_fast_tier_holds_the_last_victims():
    table = HkvTable(config(capacity=128, fast_capacity=32), seed=0)
    train(table, torch.arange(128))
    hot = torch.arange(32) * 3
    train(table, hot)
    assert (table.find(hot) < 32).all()
    assert list(table.info().tier_rows) == [32, 96, 0]


_BEYOND_MEMORY = """
import resource, sys, torch
from genrec.embedding.hkv import HkvTable
from tests.unit.embedding.hkv.tables import config
HkvTable(config(capacity=128)).find_or_insert(torch.arange(5))
# What private memory the process may take from here on, stacks of threads included: half of what the rows need.
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**27, resource.RLIM_INFINITY))
sizes = {"capacity": 2**19, "dim": 128}
growing = HkvTable(config(**sizes, initial_capacity=2**14))
start, _ = growing.find_or_insert(torch.arange(10_000))
try:
    growing.reserve(2**19)
except RuntimeError as error:
    print(error)
assert torch.equal(growing.embed(torch.arange(10_000)), start), "a table that can't grow is as it was"
del growing
table = HkvTable(
    config(**sizes, initial_capacity=2**19, fast_capacity=2**14, overflow_capacity=2**14, file_directory=sys.argv[1])
)
for start in range(0, 40_000, 10_000):
    keys = torch.arange(start, start + 10_000)
    table.insert_or_assign(keys, keys[:, None].float().expand(-1, 128))
keys = torch.arange(40_000)
assert torch.equal(table.embed(keys)[:, 7], keys.float())
info = table.info()
assert info.tier_rows[2] > 0, list(info.tier_rows)
print(sum(info.tier_bytes))
"""


def test_the_file_tier_holds_what_memory_can_not(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    output = subprocess.run(
        [sys.executable, "-c", _BEYOND_MEMORY, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    refused, size = output.stdout.splitlines()
    assert refused.startswith("can't map ")
    assert int(size) == 2**28
    assert list(tmp_path.iterdir()) == [], "the file goes with the table"


def test_tiers_that_do_not_add_up_are_explained():
    with pytest.raises(ValueError, match=r"hold 200 of 1,024 rows. Raise overflow_capacity, or name a file_directory"):
        HkvTable(config(capacity=1024, fast_capacity=100, overflow_capacity=100))
    with pytest.raises(RuntimeError, match="can't create a file for table rows in /nowhere"):
        HkvTable(config(capacity=1024, fast_capacity=100, overflow_capacity=100, file_directory="/nowhere"))


# Options --------------------------------------------------------------------------------------------------------------


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"Table 'items': unknown hkv options \['scores'\]. Known ones are score,"):
        HkvTable(config(scores="lru"))
    with pytest.raises(ValueError, match="Table 'items': score must be one of lru"):
        HkvTable(config(score="fifo"))
    with pytest.raises(ValueError, match="Table 'items': overflow_capacity needs fast_capacity"):
        HkvTable(config(overflow_capacity=128))


# Determinism ----------------------------------------------------------------------------------------------------------

_RUN = """
import hashlib, sys, torch
from tests.unit.embedding.hkv.test_lookup import digest_of_a_run
for threads in sys.argv[1].split(","):
    torch.set_num_threads(int(threads))
    print(digest_of_a_run())
"""


def digest_of_a_run() -> str:
    """A digest of everything that a mixed run leaves in tables and returns."""
    import hashlib

    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(7)
    shapes: list[dict] = [
        {"score": "lru"},
        {"score": "lfu", "num_choices": 2, "admission_threshold": 2},
        {"score": "epoch_lfu", "fast_capacity": 512, "on_overflow": "init"},
        {"score": "lru", "fast_capacity": 512, "admission_threshold": 2, "admission_capacity": 500},
    ]
    for options in shapes:
        table = HkvTable(
            config(dim=20, capacity=6000, initial_capacity=300, optimizer="adam", record_evicted=True, **options),
            seed=3,
        )
        for step in range(8):
            table.epoch = step // 3
            keys = (torch.rand(6000, generator=generator) ** 4 * 40_000).long() * 2**30
            out = train(table, keys)
            out.backward(torch.randn(6000, 20, generator=generator))
            digest.update(out.detach().numpy().tobytes())
        state = table_state(table)
        for name in ("keys", "scores", "steps", "updates", "weights", "optimizer"):
            digest.update(state[name].numpy().tobytes())
        for column in table.pop_evicted().values():
            digest.update(column.numpy().tobytes())
        digest.update(bytes(table.info()))
    return digest.hexdigest()


def test_bit_equal_for_any_threads_instruction_set_and_repetition():
    runs = [("1,2,2", ""), ("5", "avx2"), ("2", "generic")]
    results = []
    for threads, isa in runs:
        environment = {**os.environ, "GENREC_HKV_ISA": isa, "PYTHONPATH": os.getcwd()}
        output = subprocess.run(
            [sys.executable, "-c", _RUN, threads], env=environment, capture_output=True, text=True, check=True
        )
        results += output.stdout.split()
    assert len(results) == 5
    assert len(set(results)) == 1, results


def test_a_forked_process_can_look_up():
    """A data loader's worker is forked while the parent's threads exist."""
    table = HkvTable(config(), seed=0)
    keys = torch.arange(5000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = table.embed(keys)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(table.embed(keys), expected) else 1)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(threads)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(table.embed(keys), expected)


def test_ops_pass_torchs_own_checks():
    table = HkvTable(config(), seed=0)
    keys = torch.tensor([1, 2, 2])
    table.find_or_insert(keys)
    torch.library.opcheck(hkv_find, (keys, table.id, 4))
    torch.library.opcheck(hkv_pooled_find, (keys, torch.tensor([0, 2, 3]), None, table.id, 4))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(hkv_lookup, (keys, torch.empty(0, requires_grad=True), table.id, 4, None), test_utils=checks)


def test_a_missing_table_is_explained():
    with pytest.raises(RuntimeError, match="number 123456 no longer exists: keep the module that owns it alive"):
        hkv_find(torch.tensor([1]), 123456, 4)
