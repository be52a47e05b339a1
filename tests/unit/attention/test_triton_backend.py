from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.attention import AttentionMask, AttentionSpec, RelativeBias, hstu_attention
from tests.parity.reference import MaskWords

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from genrec.attention.triton import TritonBackend, configs, launch, launch_backward, launch_stored, ops, tuning  # noqa: E402
from genrec.attention.triton.configs import Shape  # noqa: E402
from genrec.attention.triton.kernels.mask import cut_block, cut_count, key_blocks, query_blocks  # noqa: E402
from genrec.attention.triton.prepared import Prepared, prepared_for  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = AttentionSpec(DEVICE, torch.float32, 2, 16, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"qk_dim": 257}, "256"),
        ({"v_dim": 264}, "256"),
        ({"dense_mask": True}, "dense mask"),
        ({"device": "cuda", "capability": (7, 5)}, "7.5"),
        ({"device": "mps"}, "mps"),
    ],
)
def test_reasons_for_what_it_does_not_do(change: dict, reason: str) -> None:
    assert reason in (TritonBackend().supports(replace(SPEC, **change)) or "")


def test_supports_the_rest() -> None:
    backend = TritonBackend()
    for dim in (1, 8, 25, 50, 96, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            spec = replace(SPEC, qk_dim=dim, v_dim=dim, dtype=dtype, window=3, dropout=0.1, cached_keys=True)
            assert backend.supports(spec) is None


def _inputs(length: int = 40) -> tuple[Tensor, Tensor, RelativeBias]:
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(2 * length, 1, 48, generator=draw).to(DEVICE).requires_grad_()
    offsets = torch.tensor([0, length // 2, 2 * length], device=DEVICE)
    tables = [torch.randn(n, generator=draw).to(DEVICE).requires_grad_() for n in (4 * length - 1, 20)]
    return projection, offsets, RelativeBias(*tables, torch.arange(2 * length, device=DEVICE) * 1000)


def _attention(projection: Tensor, offsets: Tensor, position: Tensor, time: Tensor, times: Tensor) -> Tensor:
    v, q, k = projection.split(16, dim=-1)
    targets = torch.full_like(offsets[1:], 3)
    return hstu_attention(q, k, v, offsets, 60, mask=AttentionMask(num_targets=targets), scale=0.1,
                          bias=RelativeBias(position, time, times), backend="triton")  # fmt: skip


@pytest.mark.parametrize(("dims", "dtype", "width"), [
    ((50, 25), torch.bfloat16, 64), ((100, 8), torch.float16, 64), ((48, 24), torch.bfloat16, 64),
    ((25, 25), torch.bfloat16, 32), ((25, 50), torch.bfloat16, 64), ((32, 8), torch.bfloat16, 32),
    ((50, 25), torch.float32, 32), ((128, 32), torch.bfloat16, 32), ((256, 128), torch.bfloat16, 128),
], ids=str)  # fmt: skip
def test_narrow_tiles_of_v_are_widened(dims: tuple[int, int], dtype: torch.dtype, width: int) -> None:
    """Triton 3.6 gets those wrong on a GPU that it can't read 16 bytes at a time."""
    shape = Shape(dtype.itemsize * 8, launch._width(dims[0]), launch._width(dims[1]), False, True, False)
    v = torch.zeros(3, 2, 2 * dims[0] + dims[1], dtype=dtype)[..., : dims[1]]
    assert launch._width_beside(v, shape) == width
    odd = torch.zeros(3, 2, 2 * dims[0] + dims[1] + 1, dtype=dtype)[..., 1 : dims[1] + 1]
    assert launch._width_beside(odd, shape) == (64 if dims == (128, 32) else width)


STORED: dict[configs.Kind, configs.Config] = {
    "forward": configs.Config(32, 32, tma=False, stored=True),
    "backward": configs.Config(32, 32, tma=False, passes="stored"),
}


@pytest.mark.parametrize("stored", [False, True])
def test_compiles_without_graph_breaks(stored: bool) -> None:
    with tuning.forced_all(STORED if stored else {}):
        _check_compiled()


def _check_compiled() -> None:
    projection, offsets, bias = _inputs()
    leaves = [projection, bias.position_weight, bias.time_weight]
    arguments = projection, offsets, bias.position_weight, bias.time_weight, bias.timestamps
    eager = _attention(*arguments)
    compiled = torch.compile(_attention, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, eager)
    d_out = torch.ones_like(eager)
    for x, y in zip(
        torch.autograd.grad(compiled, leaves, d_out), torch.autograd.grad(eager, leaves, d_out), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_a_graph_is_gone_through_twice_and_beside_another_with_the_stored_form() -> None:
    projection, offsets, bias = _inputs()
    leaves = [projection, bias.position_weight, bias.time_weight]
    arguments = projection, offsets, bias.position_weight, bias.time_weight, bias.timestamps
    d_out = torch.ones_like(projection[..., :16])
    with tuning.forced_all(STORED):
        out, other = _attention(*arguments), _attention(2 * projection, *arguments[1:])
        first = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        torch.autograd.grad(other, leaves, d_out)
        second = torch.autograd.grad(out, leaves, d_out)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y)


def _relative_call(heads: int = 1) -> launch.Call:
    projection, offsets, bias = _inputs()
    v, q, k = projection.detach().expand(-1, heads, -1).split(16, dim=-1)
    return launch.Call(q, k, v, offsets, offsets, None, None, None, bias.position_weight, bias.time_weight,
                       bias.timestamps, None, None, 60, 60, 1, -1, True, 1.0, 0.1, 0.0, 0, False, False)  # fmt: skip


def test_what_is_stored_is_limited_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of 128 x 128 in fp32: here one for each of the two sequences, and one that their offsets may add."""
    assert launch_stored.places(_relative_call(), 128, 128).tiles == 2

    def room(bias: str, scores: str, heads: int = 1) -> tuple[bool, bool]:
        monkeypatch.setenv("GENREC_ATTENTION_BIAS_GIB", bias)
        monkeypatch.setenv("GENREC_ATTENTION_STORED_GIB", scores)
        launch_stored.limit.cache_clear()
        return launch_stored.room(_relative_call(heads))

    exact = str(2 * 128 * 128 * 4 / 2**30)
    try:
        assert room("", "") == (True, True)
        assert room("0", "") == (False, False)
        assert room("", "0") == (True, False)
        assert room(exact, exact) == (True, True)
        assert room(exact, exact, heads=2) == (True, False)
        assert room("1e-5", "") == (False, False)
        for text in ("four", "nan", "4 GiB", "-1"):
            with pytest.raises(ValueError, match=f"GENREC_ATTENTION_BIAS_GIB='{text}'"):
                room(text, "")
            with pytest.raises(ValueError, match=f"GENREC_ATTENTION_STORED_GIB='{text}'"):
                room("", text)
    finally:
        launch_stored.limit.cache_clear()
    assert launch_stored.room(replace(_relative_call(), position=None, time=None)) == (False, False)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counts what the interpreter writes")
@pytest.mark.parametrize("of_keys", [False, True])
def test_a_length_that_is_too_small_writes_to_nobody_else(of_keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 20 and 60 rows that claim to have up to 20."""
    call = replace(_relative_call(), max_q_len=20, max_kv_len=20)
    config = configs.Config(16, 16, tma=False)
    found = launch_stored.places(call, 16, 16)
    frames: list[Tensor] = []

    def framed(*shape: int, **options: Any) -> Tensor:
        frames.append(torch.full((3 * shape[0],), 7, **options))
        return frames[-1][shape[0] : 2 * shape[0]]

    for keys in (False, True):
        call.common(config, keys)  # the rest of what is prepared
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", framed)
        tiles = launch_stored.fill_bias(call, config, of_keys)
    assert [frame.numel() // 3 for frame in frames] == [found.tiles * 256, found.tiles]
    assert tiles.data.isnan().sum() == 0
    assert (tiles.data == 7).sum() < tiles.data.numel()
    for frame in frames:
        assert (frame.chunk(3)[0] == 7).all()
        assert (frame.chunk(3)[2] == 7).all()


@pytest.mark.skipif(not launch.INTERPRETED, reason="reads what the interpreter writes")
def test_spans_hold_all_distances_of_their_tiles() -> None:
    """Random times near and far, some of them decreasing, and buckets by the edges themselves."""
    draw = torch.Generator().manual_seed(5)
    gaps = (10 ** (torch.rand(80, generator=draw, dtype=torch.float64) * 11)).long()
    call = _relative_call()
    call = replace(call, timestamps=torch.where(torch.rand(80, generator=draw) < 0.1, -gaps, gaps).cumsum(0))
    assert call.timestamps is not None
    assert call.time is not None
    edges = launch._edges(call.time.numel(), call.q.device)[0]
    found = replace(launch_stored.places(call, 16, 8), tiles=400)
    spans = call.prepared.spans(found, call.time.numel(), (60, 60))
    several = 0
    for b, (start, end) in enumerate(((0, 20), (20, 80))):
        times = call.timestamps[start:end]
        asked = torch.cat([times[1:], times[-1:]])
        for m in range(triton.cdiv(end - start, 16)):
            for n in range(min(triton.cdiv(end - start, 8), (m + 1) * 2)):
                number = (start // 16 + b) * found.per_row + m * (m + 1) + n
                apart = asked[m * 16 : m * 16 + 16, None] - times[None, n * 8 : n * 8 + 8]
                buckets = torch.searchsorted(edges, apart.abs(), right=True) - 1
                span = int(spans[number])
                first, last, near, ahead = span & 255, span >> 8 & 255, span >> 16 & 1, span >> 17
                assert first <= buckets.min()
                assert buckets.max() <= last
                assert near == (apart.abs().max() < 2**30)
                assert ahead == (near and apart.min() >= 0)
                several += first < last
    assert several > 10


def test_16_bits_are_stored_for_the_layouts_of_hopper_alone() -> None:
    call = _relative_call()
    for bits, generation, stored in ((32, 0, True), (32, 9, False), (16, 8, False), (16, 9, True), (16, 10, False)):
        call.__dict__ |= {"fragments": bits == 16, "generation": generation}
        assert launch_stored.room(call) == (stored, stored)
    for config, of_keys, whole in (
        (configs.Config(128, 64, 4), False, True), (configs.Config(64, 128, 4), True, True),
        (configs.Config(128, 64, 8), True, False), (configs.Config(32, 64, 4), False, False),
        (configs.Config(64, 64, 2), False, False),
    ):  # fmt: skip
        assert launch_stored.loads(call, config, of_keys) == whole
    call.__dict__["fragments"] = False
    assert launch_stored.loads(call, configs.Config(32, 64, 2), False)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return _attention(*arguments)

    projection, offsets, bias = _inputs()
    arguments = (projection.detach(), offsets, bias.position_weight, bias.time_weight, bias.timestamps)
    rows = torch.export.Dim("rows", min=2, max=1000)
    shapes = ({0: rows}, None, None, None, {0: rows})
    program = torch.export.export(Layer(), arguments, dynamic_shapes=(shapes,))
    assert "genrec.attention_triton" in str(program.graph)
    fewer = (projection.detach()[:50], offsets.clamp(max=50), *arguments[2:4], bias.timestamps[:50])
    torch.testing.assert_close(program.module()(*fewer), _attention(*fewer))


def test_the_short_way_gives_what_the_op_gives() -> None:
    """Eager calls pass PyTorch's op by; modes that want to see it do."""
    projection, offsets, bias = _inputs(20)
    leaves = [x.detach().contiguous().requires_grad_() for x in projection.split(16, dim=-1)]
    tables = [bias.position_weight, bias.time_weight]
    arguments = (*leaves, offsets, offsets, None, None, None, *tables, bias.timestamps, None, None, 40, 40, 1, -1, True,
                 1.0, 0.1, 0.0, 0, False, True)  # fmt: skip
    short, whole = ops.attention(*arguments), ops.attention_forward(*arguments)
    assert torch.equal(short, whole)
    assert "attention_triton" not in short.grad_fn.name()
    wanted = [leaves[0], *tables]
    for x, y in zip(torch.autograd.grad(short.sum(), wanted), torch.autograd.grad(whole.sum(), wanted), strict=True):
        torch.testing.assert_close(x, y)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            seen.append(str(function))
            return function(*arguments, **(kwargs or {}))

    with Watch(), torch.no_grad():
        ops.attention(*arguments)
    assert any("attention_triton" in name for name in seen)
    with torch.no_grad():
        assert ops.attention(*arguments).grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    projection, offsets, _ = _inputs(8)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in projection.split(16, dim=-1))
    out = hstu_attention(q, k, v, offsets, 16, backend="triton")
    (d_q,) = torch.autograd.grad(out.sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_triton_backward"):
        torch.autograd.grad(d_q.sum(), [k])


def test_op_keeps_the_rules_of_custom_ops() -> None:
    projection, offsets, bias = _inputs(20)
    v, q, k = (x.detach().contiguous().requires_grad_() for x in projection.split(16, dim=-1))
    arguments = (q, k, v, offsets, offsets, None, None, None, bias.position_weight, bias.time_weight, bias.timestamps,
                 None, None, 40, 40, 1, -1, True, 1.0, 0.1, 0.0, 0, False, True)  # fmt: skip
    torch.library.opcheck(ops.attention_forward, arguments, test_utils=("test_schema", "test_faketensor"))


@triton.jit
def _visited_kernel(
    visits, i0, i1, contexts, history_end, kv_len, q_len, BLOCK: tl.constexpr, OTHER: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, TARGETS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    if KEYS:
        first, low, full_low, full_high, high, target_low, target_high = key_blocks(
            i0, i1, contexts, history_end, BLOCK, GROUP, WINDOW, CAUSAL, TARGETS
        )
    else:
        first, low, full_low, full_high, high, target_low, target_high = query_blocks(
            i0, i1, contexts, history_end, kv_len, q_len, BLOCK, OTHER, GROUP, WINDOW, CAUSAL, TARGETS
        )
    for index in range(0, cut_count(first, low, full_low, full_high, high, target_low, target_high)):
        tl.atomic_add(visits + cut_block(index, first, low, full_low, full_high, high, target_low), 1)
    for n in range(full_low, full_high):
        tl.atomic_add(visits + n, 100)


def test_blocks_are_visited_once_where_seen_and_unmasked_only_where_seen_whole() -> None:
    draw = random.Random(0)
    for _ in range(60):
        kv_len, block, other = draw.randint(1, 60), draw.choice([4, 8]), draw.choice([4, 8])
        q_len = draw.randint(1, kv_len)
        contexts = draw.choice([0, draw.randint(0, kv_len)])
        targets = draw.choice([0, draw.randint(0, kv_len - contexts)])
        window, group = draw.choice([None, draw.randint(0, 20)]), draw.randint(1, 3)
        words = MaskWords(kv_len, contexts, targets, group, window, draw.random() < 0.7)
        shift = kv_len - q_len
        rows, keys = range(shift, kv_len), range(kv_len)
        for of_keys in (True, False):
            mine, theirs = (q_len, kv_len) if of_keys else (kv_len, q_len)
            start = draw.randrange(0, mine, other)
            end = min(start + other, mine)
            visits = torch.zeros(64, dtype=torch.int32, device=DEVICE)
            plus = shift if of_keys else 0
            _visited_kernel[(1,)](
                visits, start + plus, end + plus, contexts, kv_len - targets, kv_len, q_len, BLOCK=block, OTHER=other,
                GROUP=group, WINDOW=-1 if window is None else window, CAUSAL=words.causal, TARGETS=targets > 0,
                KEYS=of_keys,
            )  # fmt: skip
            for n, count in enumerate(visits.tolist()):
                block_of = range(n * block, min(n * block + block, theirs))
                pairs = [
                    (rows[a], keys[b]) if of_keys else (rows[b], keys[a]) for a in range(start, end) for b in block_of
                ]
                seen = [words.sees(i, j) for i, j in pairs]
                assert count in (0, 1, 100), (words, n, count)
                assert count or not any(seen), (words, q_len, of_keys, start, n)
                if count == 100:
                    assert all(seen), (words, q_len, of_keys, start, n)
                    assert len(block_of) == block


def test_work_is_ordered_by_length() -> None:
    offsets = torch.tensor([0, 5, 5, 25, 31], device=DEVICE)
    prepared = Prepared((offsets, offsets), (None, None), (31, 31))
    items, count = prepared.items(False, 8)
    assert count.item() == 5
    assert items[:5].tolist() == [[2, 2], [2, 1], [2, 0], [3, 0], [0, 0]]
    assert prepared.items(True, 8)[0][:3].tolist() == [[2, 0], [2, 1], [2, 2]]


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("of_keys", [False, True])
def test_sequences_of_as_many_blocks_share_the_list(
    of_keys: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genrec.attention.triton.prepared.TOGETHER", (together, together))
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (70,), generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(DEVICE)
    items, count = Prepared((offsets, offsets), (None, None), (int(offsets[-1]),) * 2).items(of_keys, 8)
    blocks = [-(-length // 8) for length in lengths.tolist()]
    wanted = []
    for many in range(max(blocks), 0, -1):
        equal = sorted((b for b, own in enumerate(blocks) if own == many), key=lambda b: -int(lengths[b]))
        for first in range(0, len(equal), together):
            for n in range(many) if of_keys else range(many - 1, -1, -1):
                wanted += [[b, n] for b in equal[first : first + together]]
    assert count.item() == len(wanted)
    assert items[: len(wanted)].tolist() == wanted


def test_plans_are_kept_while_tensors_are_unchanged() -> None:
    offsets = torch.tensor([0, 3, 9], device=DEVICE)
    first = prepared_for((offsets, offsets), (None, None), (9, 9), True)
    assert prepared_for((offsets, offsets), (None, None), (9, 9), True) is first
    assert prepared_for((offsets, offsets), (None, None), (9, 9), False) is not first
    offsets[1] = 4
    assert prepared_for((offsets, offsets), (None, None), (9, 9), True) is not first


def test_a_default_has_the_blocks_that_its_kernel_needs() -> None:
    """The gradient of a position table is summed where a tile has at least as many of its own rows or keys."""
    for bits, width, bias, hopper in product((16, 32), (16, 64, 128, 256), (False, True), (False, True)):
        shape = configs.Shape(bits, width, width, bias, hopper, False)
        for kind in ("backward", "backward_tables"):
            assert all(c.keys >= c.rows for c in configs.candidates(kind, shape)[: None if bias else 1])
        assert all(c.rows >= c.keys for c in configs.candidates("backward_rows", shape))
        found = configs.candidates("backward", shape)
        assert len(set(found)) == len(found)
        roomy = replace(shape, room_for_bias=bias, room_for_scores=bias)
        measured = bits == 16 and hopper and bias
        if measured:
            assert configs.candidates("forward", roomy)[0].stored
            assert (configs.candidates("backward", roomy)[0].passes == "stored") == (width <= 128)
            assert not configs.candidates("forward", replace(roomy, room_for_bias=False))[0].stored
            assert configs.candidates("backward", replace(roomy, room_for_scores=False)) == found
        if width == 256 or not measured:
            assert configs.candidates("backward", roomy) == found
        if bias and bits == 16:
            assert found[0].passes != "one"
            assert {c.passes for c in found} - {"split"} == {"rows", "tables", "one"}


def test_wide_heads_without_a_bias_have_a_kernel_for_each_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a head dim of 256 the backward pass is split; its kernels have one accumulator of 128 keys or rows each."""
    for bias, hopper in product((False, True), (False, True)):
        found = configs.candidates("backward", configs.Shape(16, 256, 256, bias, hopper, False))
        assert found[0].passes == ("rows" if bias else "split")
    assert configs.candidates("backward", configs.Shape(32, 256, 256, False, True, False))[0].passes == "one"

    projection, offsets, _ = _inputs(20)
    v, q, k = projection.detach().split(16, dim=-1)
    rest = (None, None, None, None, None, None, None, None, 40, 40, 1, -1, True, 1.0, 0.1, 0.0, 0, False, True)
    call = launch.Call(q, k, v, offsets, offsets, *rest)
    call.__dict__["shape"] = configs.Shape(16, 256, 256, False, True, False)
    started: list[tuple[str, list[str]]] = []

    def start(kernel: Any, call: Any, config: Any, programs: int, arguments: dict[str, Any]) -> None:
        made = [name for name in ("dq", "dq_sum", "dk", "dv") if arguments.get(name) is not None]
        started.append((f"{config.rows} x {config.keys}", made))

    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_kept", dict)
    monkeypatch.setattr(launch_backward, "start", start)
    monkeypatch.setattr(launch_backward, "descriptor", lambda *_: None)
    launch_backward.run_backward(call, torch.randn_like(v), [False, False, False])
    assert sorted(made for _, made in started) == [["dk"], ["dq"], ["dv"]]
    assert {blocks for blocks, _ in started} == {"32 x 128", "64 x 128", "128 x 32"}


def test_measured_configurations_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._kept.cache_clear()
    projection, offsets, _ = _inputs(20)
    v, q, k = projection.detach().split(16, dim=-1)
    rest = (None, None, None, None, None, None, None, None, 40, 40, 1, -1, True, 1.0, 0.1, 0.0, 0, False, True)
    call = launch.Call(q, k, v, offsets, offsets, *rest)
    used: list[configs.Config] = []
    measured = configs.Config(16, 16, tma=False)
    tuning._keep(tuning.key_of(tuning.facts_of("forward", call)), measured)
    tuning._keep("another", configs.Config(32, 16))
    tuning.run("forward", call, used.append)
    tuning.run("backward", call, used.append)
    with tuning.forced("forward", configs.Config(64, 16)):
        tuning.run("forward", call, used.append)
    assert used == [measured, configs.candidates("backward", call.shape)[0], configs.Config(64, 16)]
    tuning.cache_file().write_text("not json")
    tuning._kept.cache_clear()
    assert tuning._kept() == {}
