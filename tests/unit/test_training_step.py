"""benchmarks/training_step.py: its FLOP formulas, what it counts kernels as, and a run of it on a CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SMALL = [
    "--device", "cpu", "--precision", "32-true", "--layers", "2", "--hidden", "32", "--heads", "2", "--head-dim", "8",
    "--length", "27", "--candidates", "4", "--batch", "3", "--head", "16", "2", "--items", "50", "--steps", "2",
    "--warmup", "1", "--profiled", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "training_step", Path(__file__).parents[2] / "benchmarks" / "training_step.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_step"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["gated", "production"])
def test_flop_of_linear_layers_are_those_that_torch_counts(form, script):
    options = script.parse([*SMALL, "--form", form, "--dropout", "0"])
    model = script.make_model(options)
    batch = model.prepare_batch(script.make_batches(options, 1)[0])
    counter = FlopCounterMode(display=False)
    with counter:
        total, _ = model.total_loss(model.loss(model(batch), batch))
        total.backward()
    counted = {str(name): flop for name, flop in counter.get_flop_counts()["Global"].items()}
    # Attention in torch is batched products.
    linear = counted.pop("aten.mm", 0) + counted.pop("aten.addmm", 0)
    assert set(counted) <= {"aten.bmm", "aten.baddbmm"}
    assert linear == script.dense_flop(model, options)


def test_flop_of_the_published_shape(script):
    """63.89 TFLOP a step are reported for it, with 30.8 of them in attention."""
    options = script.parse(["--device", "cpu", "--items", "10", "--layers", "1"])
    layer = script.linear_flop([script.make_model(options).body.encoder], options.batch * options.length)
    options.layers = 8
    attention = script.attention_flop(options)
    assert attention == 3.5 * 4 * 4099**2 * 512 * 32 * 8
    assert (8 * layer + attention) / 1e12 == pytest.approx(63.89, abs=0.05)


def test_lengths_that_no_history_makes_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--length", "4098"])
    assert "--length must be 3 + 2 x history + candidates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void genrec::forward_kernel<genrec::Shape<cutlass::bfloat16_t, 256> >(ForwardParams)", "attention"),
        ("void genrec::attention::queries_kernel<genrec::attention::Queries<cutlass::bfloat16_t> >", "attention"),
        ("genrec::attention::(anonymous namespace)::plan_kernel(genrec::attention::PlanParams)", "attention"),
        ("backward_rows_kernel", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NTN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "GEMM"),
        ("void split_embedding_codegen_forward_unweighted_kernel<float, float, float, long>", "tables"),
        ("split_embedding_backward_codegen_rowwise_adagrad_unweighted_kernel_warp_per_row_1", "tables"),
        ("void cub::DeviceRadixSortOnesweepKernel<cub::DeviceRadixSortPolicy>", "tables"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4> >", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("void at::native::GammaBetaBackwardCUDAKernel<float, float>", "elementwise"),
        ("_activate", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something else", "other"),
    ],
)
def test_kinds_of_kernels(name, kind, script):
    assert script.kind_of(name) == kind


def test_shares_add_up_to_the_step(script):
    from types import SimpleNamespace

    from torch.autograd import DeviceType

    def event(key: str, microseconds: float, device: Any = DeviceType.CUDA) -> Any:
        return SimpleNamespace(
            key=key, device_type=device, self_device_time_total=microseconds, self_cpu_time_total=1e9
        )

    events = [event("forward_kernel", 8000), event("sm90_gemm", 6000), event("launch", 9000, DeviceType.CPU)]
    lines = [line.split() for line in script.where(events, steps=2, step_ms=10.0, cuda=True)]
    found = {line[0]: line[1:3] for line in lines}
    assert found["attention"] == ["4.00", "40.0%"]
    assert found["GEMM"] == ["3.00", "30.0%"]
    assert found["idle"] == ["3.00", "30.0%"]
    assert found["other"] == ["0.00", "0.0%"]


def test_a_run_prints_its_table(script, capsys):
    torch.manual_seed(0)
    assert script.main([*SMALL, "--strategy", "auto", "--profile"]) == 0
    printed = capsys.readouterr().out
    for part in ("ms a step", "tokens/s", "linear", "attention", "MFU", "losses", "GEMM", "optimizer"):
        assert part in printed
