"""A whole training step of a ranking model on one device: time, model FLOP/s utilisation, memory, where time goes.

    python benchmarks/training_step.py --profile    # the published shape, on a GPU
    python benchmarks/training_step.py --compare    # does HybridParallelStrategy train here as one process does?
    python benchmarks/training_step.py --device cpu --precision 32-true --layers 2 --hidden 64 --heads 2 \\
        --head-dim 32 --length 131 --candidates 16 --batch 4 --head 32 4 --items 1000 --steps 5 --profile

The shape is that of published figures for such models: 8 layers, hidden 1024, 4 heads of 256, B = 32 sequences of 4099
tokens (3 of the user, then items and actions in turn, the candidates' items last), a head of 512 hidden units and 8
tasks, tables on the same device, bf16, as there also for what layers add to (`--fp32-residual` keeps that in fp32, as
is the library's default). It trains under Lightning's Trainer on batches that lie ready in host memory; with
`--strategy hybrid_parallel` one rank has its tables sharded by TorchRec (over NCCL on a GPU, with FBGEMM's CUDA tables
and fused row-wise Adagrad), with "auto" they are plain modules with dense gradients.

FLOP are counted by formula, whatever is really computed: attention as in benchmarks/attention.py, causal,
S^2 (Dqk + Dv) a head and sequence forward and 2.5 times that backward; linear layers 6 x parameters of their matrices x
rows. Nothing else counts, and nothing for what is recomputed: 63.9 TFLOP a step for the published shape. Times are
those between the ends of consecutive steps, by CUDA events.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genrec.attention.registry import registry
from genrec.data.batch import SequenceBatch
from genrec.environment import headline
from genrec.layers.ops import layer_backends_used
from genrec.models import HSTURanking, Task

CONTEXTS = ("gender", "age", "country")
ACTIONS = 8

KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d|gloo"),
    ("optimizer", r"adam|multi_tensor|Optimizer\.|clip_grad"),
    ("tables", r"embedding|fbgemm|tbe|jagged|bucketize|linearize|cumsum|permute_|RadixSort|DeviceSegment"
               r"|CppNode<Split"),
    ("attention", r"genrec::attention|\b(forward|backward|backward_rows|backward_tables|extrema|plan)_kernel|hstu"
                  r"|aten::b(add)?b?mm|_Attention"),
    ("GEMM", r"gemm|nvjet|cublas|xmma|cutlass|matmul|splitk|aten::(add)?mm\b|aten::linear"),
    ("copies", r"memcpy|memset|aten::(copy_|_to_copy|pin_memory)"),
    ("elementwise", r"elementwise|vectorized|reduce|norm|GammaBeta|silu|sigmoid|dropout|cat|index|gather|scatter"
                    r"|_forward|_backward|_encode|_move|_merge|_activate|_dropped|_sum_|triton|fill|aten::"),
)  # fmt: skip
"""What a kernel (on a CPU: an operator) is counted as: the first whose pattern its name contains."""

FORMS: dict[str, dict[str, Any]] = {
    "gated": {"form": "production", "hstu_options": {"silu_all": True, "concat": False}},
    "production": {"form": "production"},
    "paper": {"form": "paper"},
}
"""gated: that of the published figures, as in benchmarks/layer.py."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: A length that no history makes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=256, help="Dqk and Dv of an attention head")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=4099, help="tokens of each sequence")
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument(
        "--head", type=int, nargs="+", default=[512, 8], help="hidden widths of the head, then its tasks"
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--form", choices=sorted(FORMS), default="gated")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--fp32-residual", action="store_true", help="keep the state between layers in fp32")
    parser.add_argument("--recompute", nargs="*", default=[], help="layer_recompute: norm, silu, gate")
    parser.add_argument("--attention", default="auto", help="attention backend")
    parser.add_argument("--layer", help="layer backend; default: triton on a GPU, torch on a CPU")
    parser.add_argument("--embedding", choices=("fbgemm", "hkv"), default="fbgemm")
    parser.add_argument("--table-dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--strategy", choices=("hybrid_parallel", "auto"), default="hybrid_parallel")
    parser.add_argument("--pipeline", choices=("none", "base", "sparse_dist"), default="none")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--profiled", type=int, default=3, help="steps after them that --profile looks at")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--kernels", type=int, default=3, help="longest kernels of each kind that --profile names")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the GPU, for the MFU")
    parser.add_argument("--compare", action="store_true", help="a small model in fp32, one process beside the strategy")
    options = parser.parse_args(arguments)
    options.layer = options.layer or ("triton" if options.device == "cuda" else "torch")
    history, odd = divmod(options.length - len(CONTEXTS) - options.candidates, 2)
    if history < 1 or odd:
        parser.error(f"--length must be {len(CONTEXTS)} + 2 x history + candidates")
    options.history = history
    return options


def make_model(options: argparse.Namespace) -> HSTURanking:
    """The same start with each call."""
    torch.manual_seed(0)
    return HSTURanking(
        options.items, [Task(f"task{number}") for number in range(options.head[-1])],
        max_seqlen=options.history + options.candidates, hidden_dim=options.hidden, num_layers=options.layers,
        num_heads=options.heads, qk_dim=options.head_dim, v_dim=options.head_dim, **FORMS[options.form],
        dropout=options.dropout, input_dropout=options.dropout, fp32_residual=options.fp32_residual,
        head_hidden_dims=options.head[:-1],
        action_feature="action", num_actions=ACTIONS, contextual_features=dict.fromkeys(CONTEXTS, 100),
        attention_backend=options.attention, layer_backend=options.layer, layer_recompute=options.recompute,
        embedding_backend=options.embedding, embedding_dtype=options.table_dtype, table_optimizer="rowwise_adagrad",
        table_learning_rate=0.01,
    )  # fmt: skip


def make_batches(options: argparse.Namespace, count: int = 4) -> list[SequenceBatch]:
    """Different ones, in host memory; ids are skewed as real ones are."""
    batches, rows = [], options.history + options.candidates
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        total = options.batch * rows
        items = (torch.rand(total, generator=draw) ** 3 * options.items).long()
        actions = torch.randint(ACTIONS, (total,), generator=draw)
        users = torch.randint(100, (len(CONTEXTS) * options.batch,), generator=draw)
        lengths = torch.tensor([rows, rows, *[1] * len(CONTEXTS)]).repeat_interleave(options.batch)
        times = (torch.arange(rows) * 3600).repeat(options.batch)
        features = KeyedJaggedTensor(["item", "action", *CONTEXTS], torch.cat([items, actions, users]), lengths=lengths)
        cases = options.batch * options.candidates
        batches.append(
            SequenceBatch(
                features=features, seq_offsets=torch.arange(options.batch + 1) * rows, max_seqlen=rows,
                timestamps=times, query_timestamps=times, num_targets=torch.full((options.batch,), options.candidates),
                labels=torch.randint(2, (cases, options.head[-1]), generator=draw).float(),
                user_ids=torch.arange(options.batch),
            )
        )  # fmt: skip
    return batches


def linear_flop(modules: Iterable[nn.Module], rows: int) -> float:
    """Forward and backward of all linear layers within these: 6 x parameters x rows."""
    return sum(6.0 * child.weight.numel() * rows
               for module in modules for child in module.modules() if isinstance(child, nn.Linear))  # fmt: skip


def dense_flop(model: HSTURanking, options: argparse.Namespace) -> float:
    """Of a step's linear layers: those of the encoder on all tokens, those of the head on the candidates."""
    tokens, cases = options.batch * options.length, options.batch * options.candidates
    return linear_flop([model.body.encoder], tokens) + linear_flop([model.body.head], cases)


def attention_flop(options: argparse.Namespace) -> float:
    """Of a step's attention, by the causal convention."""
    forward = options.heads * float(options.length) ** 2 * 2 * options.head_dim
    return 3.5 * forward * options.batch * options.layers


class Steps(L.Callback):
    """Times of the steps, their losses, and a profile of the last."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.losses = options, []  # type: ignore[var-annotated]
        self._ends: list[Any] = []
        self.profile: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to count memory, then to profile."""
        o = self.options
        if batch_idx == o.warmup and o.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if o.profile and batch_idx == o.warmup + o.steps:
            activities = [ProfilerActivity.CUDA] if o.device == "cuda" else [ProfilerActivity.CPU]
            self.profile = profile(activities=activities)
            self._synchronize()
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time and the loss."""
        self.losses.append(outputs["loss"].detach())
        if self.options.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())
        if self.profile is not None and batch_idx == trainer.num_training_batches - 1:
            self._synchronize()
            self.profile.stop()

    def _synchronize(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self) -> list[float]:
        """Of each timed step."""
        self._synchronize()
        ends = self._ends[self.options.warmup - 1 : self.options.warmup + self.options.steps]
        if self.options.device == "cuda":
            return [a.elapsed_time(b) for a, b in pairwise(ends)]
        return [1e3 * (b - a) for a, b in pairwise(ends)]


def fit(options: argparse.Namespace, steps: int, strategy: Any, epochs: int = 1, **fit_options: Any) -> Any:
    """A training of so many steps an epoch: its trainer, and its `Steps`."""
    own = Steps(options)
    trainer = L.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu", devices=1, strategy=strategy, callbacks=[own],
        precision=options.precision, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    batches = make_batches(options)
    if options.device == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    # Without workers the loader hands the batches on as they are, pinned.
    loader = DataLoader([batches[i % len(batches)] for i in range(steps)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(make_model(options), loader, **fit_options)
    return trainer, own


def make_strategy(options: argparse.Namespace) -> Any:
    """What the Trainer gets."""
    if options.strategy == "auto":
        return "auto"
    from genrec.parallel import HybridParallelStrategy

    return HybridParallelStrategy(sharding="row_wise", pipeline=options.pipeline)


def kind_of(name: str) -> str:
    """What a kernel or operator is counted as."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def where(averages: Iterable[Any], steps: int, step_ms: float, cuda: bool, named: int = 3) -> list[str]:
    """A table of where a step's time goes, and the longest names of each kind."""
    kinds: dict[str, list[tuple[float, str]]] = {name: [] for name, _ in KINDS} | {"other": []}
    for event in averages:
        if cuda != (event.device_type == DeviceType.CUDA):
            continue
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps
        if spent > 0:
            kinds[kind_of(event.key)].append((spent, event.key))
    lines = [f"{'where':<14}{'ms a step':>10}{'share':>8}   longest"]
    busy = sum(spent for entries in kinds.values() for spent, _ in entries)
    for name, entries in sorted(kinds.items(), key=lambda item: -sum(spent for spent, _ in item[1])):
        spent = sum(spent for spent, _ in entries)
        longest = "; ".join(f"{key[:60]} {ms:.2f}" for ms, key in sorted(entries, reverse=True)[:named])
        lines.append(f"{name:<14}{spent:>10.2f}{spent / max(busy, step_ms):>8.1%}   {longest}")
    if cuda:
        idle = max(step_ms - busy, 0.0)
        lines.append(f"{'idle':<14}{idle:>10.2f}{idle / max(busy, step_ms):>8.1%}   less what ran side by side")
    return lines


def measure(options: argparse.Namespace) -> None:
    """One training, and what is printed of it."""
    steps = options.warmup + options.steps + (options.profiled if options.profile else 0)
    _, own = fit(options, steps, make_strategy(options))
    times = own.milliseconds()
    middle = statistics.median(times)
    # Tables cost time to make and have no FLOP.
    few_items = argparse.Namespace(**{**vars(options), "items": 1})
    dense, attention = dense_flop(make_model(few_items), options), attention_flop(options)
    rate = (dense + attention) / middle / 1e9
    if options.device == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU at most"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of the process at most"
    tokens = options.batch * options.length
    print(f"attention: {', '.join(sorted(registry.used))}; layer: {options.layer} {layer_backends_used() or ''}")
    print(f"losses {float(own.losses[0]):.4f} ... {float(own.losses[-1]):.4f}")
    print(f"{middle:.2f} ms a step ({min(times):.2f}-{max(times):.2f}, {len(times)} steps), "
          f"{1e3 * tokens / middle:,.0f} tokens/s, {memory}")  # fmt: skip
    print(
        f"{(dense + attention) / 1e12:.4g} TFLOP a step ({dense / 1e12:.4g} linear, {attention / 1e12:.4g} attention)"
    )
    print(f"{rate:.4g} TFLOP/s, MFU {rate / options.peak_tflops:.2%} of {options.peak_tflops:g} TFLOP/s")
    if own.profile is not None:
        print(
            f"\nOf {options.profiled} steps under the profiler (shares of a step's time, or of all kernels' if longer):"
        )
        for line in where(own.profile.key_averages(), options.profiled, middle, options.device == "cuda",
                          options.kernels):  # fmt: skip
            print(line)


def compare(options: argparse.Namespace) -> bool:
    """Losses of one process, of each pipeline of the strategy, and of a run saved after half and resumed."""
    small = ["--layers", "2", "--hidden", "64", "--heads", "2", "--head-dim", "32", "--length", "131", "--candidates",
             "16", "--batch", "8", "--head", "32", "2", "--items", "1000", "--dropout", "0", "--precision", "32-true",
             "--device", options.device, "--attention", options.attention, "--layer", options.layer]  # fmt: skip
    small_options = parse(small)
    from genrec.parallel import HybridParallelStrategy

    half = 12
    alone = torch.stack(fit(small_options, half, "auto", epochs=2)[1].losses)
    print(f"one process            {alone[0]:.6f} ... {alone[-1]:.6f}")
    fine = bool(alone[-1] < alone[0])
    whole = alone
    for pipeline in ("none", "base", "sparse_dist"):
        strategy = HybridParallelStrategy(sharding="row_wise", pipeline=pipeline)  # type: ignore[arg-type]
        losses = torch.stack(fit(small_options, half, strategy, epochs=2)[1].losses)
        fine &= report(f"pipeline {pipeline}", losses, alone, 1e-4)
        whole = losses if pipeline == "none" else whole
    with tempfile.TemporaryDirectory() as folder:
        trainer, own = fit(small_options, half, HybridParallelStrategy(sharding="row_wise"))
        trainer.save_checkpoint(Path(folder) / "half.ckpt")
        resumed = fit(small_options, half, HybridParallelStrategy(sharding="row_wise"), epochs=2,
                      ckpt_path=Path(folder) / "half.ckpt")[1].losses  # fmt: skip
    return report("saved and resumed", torch.stack([*own.losses, *resumed]), whole, 1e-5) and fine


def report(name: str, losses: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """A line, and whether the losses agree."""
    fine = losses.shape == expected.shape
    off = ((losses - expected).abs() / expected.abs()).max().item() if fine else float("nan")
    fine = fine and off <= bound
    print(f"{name:<22} {losses[0]:.6f} ... {losses[-1]:.6f}  off by {off:.1e} {'ok' if fine else 'FAILED'}", flush=True)
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    print(headline())
    if options.compare:
        return 0 if compare(options) else 1
    print(
        f"HSTURanking ({options.form}): {options.layers} layers, hidden {options.hidden}, {options.heads} x "
        f"{options.head_dim}, B = {options.batch}, T = {options.length}, head {options.head}, {options.items:,} items "
        f"({options.embedding}, {options.table_dtype}), {options.precision}, residual "
        f"{'fp32' if options.fp32_residual else 'as the layers'}, strategy {options.strategy}, pipeline "
        f"{options.pipeline}", flush=True,
    )  # fmt: skip
    measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
