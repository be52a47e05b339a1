from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from genrec import backends
from genrec.attention import AttentionSpec, UnsupportedAttentionError, hstu_attention, registry
from genrec.attention.registry import AttentionBackend, BackendRegistry


class _Picky:
    name = "picky"

    def available(self) -> str | None:
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        return None if spec.qk_dim == 64 else f"qk_dim {spec.qk_dim} is not 64"

    def __call__(self, *args: Any) -> torch.Tensor:
        return torch.full((args[0].shape[0], args[0].shape[1], args[2].shape[2]), 42.0)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> BackendRegistry:
    """The built-in backends, and one of a third party before them."""
    monkeypatch.setattr(registry, "_loaders", dict(registry._loaders))
    monkeypatch.setattr(registry, "_instances", dict(registry._instances))
    registry.register("picky", _Picky, first=True)
    return registry


def test_module_prints_every_backend() -> None:
    done = subprocess.run([sys.executable, "-m", "genrec.backends"], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for name in ("torch", "triton", "cutlass"):
        assert any(line.startswith(name) for line in done.stdout.splitlines())
    attention, layers = done.stdout.split("\nlayer ")
    for part in (attention, layers):
        assert any(line.split()[:2] == ["torch", "yes"] for line in part.splitlines())
    assert any(line.startswith("triton") for line in layers.splitlines())


def test_options_ask_about_a_call(picky: BackendRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--dtype", "fp32", "--qk-dim", "25", "--v-dim", "50", "--bias", "relative",
               "--targets", "--target-group-size", "2", "--window", "7", "--dropout", "0.1", "--grad"]  # fmt: skip
    spec = backends.asked_spec(backends.parser().parse_args(options))
    assert spec == AttentionSpec("cpu", torch.float32, 2, 25, 50, bias="relative", targets=True, target_group_size=2,
                                 window=7, dropout=0.1, needs_grad=True)  # fmt: skip
    assert backends.main(options) == 0
    shown = capsys.readouterr().out
    assert "qk_dim 25 is not 64" in shown
    assert "'auto' would choose: " in shown
    assert backends.asked_spec(backends.parser().parse_args([])) is None


def test_named_backend_that_cannot_serve_raises_with_its_reason(picky: BackendRegistry) -> None:
    x = torch.zeros(3, 1, 8)
    with pytest.raises(UnsupportedAttentionError, match=r"'picky' can't serve this call: qk_dim 8 is not 64.*torch"):
        hstu_attention(x, x, x, torch.tensor([0, 3]), 3, backend="picky")
    with pytest.raises(UnsupportedAttentionError, match="Unknown attention backend 'piky'"):
        hstu_attention(x, x, x, torch.tensor([0, 3]), 3, backend="piky")


def test_auto_takes_the_first_that_can(picky: BackendRegistry) -> None:
    offsets = torch.tensor([0, 3])
    wide = torch.zeros(3, 1, 64)
    assert (hstu_attention(wide, wide, wide, offsets, 3) == 42).all()
    narrow = torch.zeros(3, 1, 8)
    assert (hstu_attention(narrow, narrow, narrow, offsets, 3) == 0).all()


def test_auto_passes_over_a_backend_that_says_so(
    picky: BackendRegistry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_Picky, "not_in_auto", lambda self, spec: "it is too new", raising=False)
    wide, offsets = torch.zeros(3, 1, 64), torch.tensor([0, 3])
    assert (hstu_attention(wide, wide, wide, offsets, 3) == 0).all()
    assert (hstu_attention(wide, wide, wide, offsets, 3, backend="picky") == 42).all()
    assert backends.main(["--qk-dim", "64", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert any(
        line.split()[:2] == ["picky", "yes"] and "passes it over: it is too new" in line for line in shown.splitlines()
    )
    assert "'auto' would choose: torch" in shown


def test_built_in_backends_fit_the_protocol() -> None:
    assert isinstance(registry.get("torch"), AttentionBackend)


def test_broken_import_is_a_reason_not_a_crash() -> None:
    own = BackendRegistry({"gone": "genrec.no_such_module:Backend"})
    assert "can't be loaded" in (own.why_not("gone") or "")
    assert [line.name for line in own.report()] == ["gone"]
