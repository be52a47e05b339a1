"""Shapes that nobody thought of: random lengths, counts and options, the torch backend against the plain loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.grid import Case, assert_parity


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    kv_lengths = draw(st.lists(st.integers(0, 40), min_size=0, max_size=6))
    cached = draw(st.booleans())
    lengths = [draw(st.integers(0, n)) for n in kv_lengths] if cached else kv_lengths
    contexts = [draw(st.integers(0, n)) for n in kv_lengths] if draw(st.booleans()) else None
    targets = None
    if draw(st.booleans()):
        targets = [
            draw(st.integers(0, n - c)) for n, c in zip(kv_lengths, contexts or [0] * len(kv_lengths), strict=True)
        ]
    dense = draw(st.booleans())
    return Case(
        "random",
        lengths=tuple(lengths),
        kv_lengths=tuple(kv_lengths) if cached else None,
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, 9)),
        v_dim=draw(st.integers(1, 9)),
        contexts=None if contexts is None else tuple(contexts),
        targets=None if targets is None else tuple(targets),
        group=draw(st.integers(1, 4)),
        window=draw(st.none() | st.integers(0, 20)),
        causal=draw(st.booleans()),
        dense_bias=1 if dense else None,
        position=not dense and draw(st.booleans()),
        time=not dense and draw(st.booleans()),
        times=draw(st.sampled_from(["typical", "ties", "years", "any"])),
        query_times=draw(st.booleans()),
        scale=draw(st.none() | st.just(0.1)),
        slack=draw(st.integers(0, 3)),
        strided=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_cases())
def test_any_case_keeps_the_bound(case: Case) -> None:
    assert_parity("torch", case, torch.float64)
