"""One HSTU layer on a GPU, forward and backward: the Triton layer backend beside plain torch, in one run.

    python benchmarks/layer.py              # all forms and recompute settings
    python benchmarks/layer.py --quick      # parity, then one form, in about 20 s
    python benchmarks/layer.py --form paper --attention triton --dropout 0.2

Hidden size 1024, 4 heads of 256, B = 32 sequences of S = 4096 tokens, bf16; both layers run the same attention. Times
are medians (lowest - highest) of CUDA events; matrix products, layer without attention and layer take turns. FLOP are
counted as usual for this layer: attention 2 H S^2 D a sequence forward (causal) and 2.5 times that backward, the
projections 2 T x in x out forward and twice that backward; nothing else, and nothing for what is recomputed. "outside"
is the time that is neither attention nor matrix products: that of the layer with its attention replaced by nothing,
less that of the bare products; its share is of the whole layer's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from genrec.environment import headline
from genrec.layers.config import HSTUConfig
from genrec.layers.hstu import HSTULayer
from genrec.layers.ops import get_layer_ops, layer_backends_used
from genrec.layers.tokens import TokenSequence

FORMS: dict[str, dict[str, Any]] = {
    "gated": {"form": "production", "silu_all": True, "concat": False},
    "production": {"form": "production"},
    "paper": {"form": "paper"},
}
"""gated: affine norms, SiLU on u, v, q, k, u * norm(a), no relative bias; published figures are about this layer."""

NO_ATTENTION = "no attention:"
"""Stands in the lines of layers whose attention could not run."""

RECOMPUTE: list[tuple[str, ...]] = [(), ("norm", "gate"), ("norm", "silu", "gate")]


@dataclass
class Times:
    """Milliseconds of repeated runs."""

    runs: list[float]

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.runs)

    def __str__(self) -> str:
        return f"{self.median:7.2f} ({min(self.runs):.2f} - {max(self.runs):.2f})"


class _NoAttention(torch.autograd.Function):
    """Stands for the attention and costs nothing: its result and its gradients lie ready."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ready: dict[str, Tensor]) -> Tensor:
        ctx.ready = ready
        return ready["a"].view_as(ready["a"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.ready["q"], ctx.ready["k"], ctx.ready["v"], None


def without_attention(layer: HSTULayer, ready: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The layer with `_NoAttention`."""
    c = layer.config

    def run(x: Tensor) -> Tensor:
        x, u, v, q, k = layer.ops.norm_linear_silu(x, layer.input_norm, layer.uvqk, (c.v_dim, c.qk_dim), c.silu_all)
        a = _NoAttention.apply(q, k, v, ready)
        return layer.ops.gated_output(x, a, u, layer.output_norm, layer.output, c.concat, c.dropout, layer.training)

    return run


def ready_tensors(layer: HSTULayer, rows: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """What `_NoAttention` returns: numbers of the size of an attention's."""
    c = layer.config
    widths = {"a": c.v_dim, "v": c.v_dim, "q": c.qk_dim, "k": c.qk_dim}
    return {name: torch.randn(rows, c.num_heads, w, device=device).to(dtype) for name, w in widths.items()}


def timed(steps: Sequence[Callable[[], object]], iterations: int, warmup: int = 3) -> list[Times]:
    """`iterations` rounds after `warmup`, each step once a round: all at the clock that the GPU has under this load."""
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)] for _ in steps]
    for i in range(-warmup, iterations):
        if i == 0:
            torch.cuda.synchronize()
        for step, own in zip(steps, events, strict=True):
            if i < 0:
                step()
                continue
            start, end = own[i]
            start.record()
            step()
            end.record()
    torch.cuda.synchronize()
    return [Times([start.elapsed_time(end) for start, end in own]) for own in events]


def step_of(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward, gradients thrown away."""
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(run(x), leaves, upstream, allow_unused=True)

    return step


def products_step(layer: HSTULayer, x: Tensor) -> Callable[[], None]:
    """The layer's two projections alone, forward and backward."""
    wide = torch.randn(x.shape[0], layer.output.in_features, device=x.device, dtype=x.dtype, requires_grad=True)
    dy = torch.randn(x.shape[0], layer.uvqk.out_features, device=x.device, dtype=x.dtype)

    def step() -> None:
        torch.autograd.grad(layer.uvqk(x), [x, layer.uvqk.weight], dy)
        torch.autograd.grad(layer.output(wide), [wide, layer.output.weight], x.detach())

    return step


def flop(config: HSTUConfig, batch: int, length: int) -> float:
    """Of one layer, forward and backward, by the convention of this module's head."""
    c = config.resolved()
    tokens, heads = batch * length, c.num_heads
    attention = heads * length**2 * (c.qk_dim + c.v_dim) * batch
    inner = heads * (2 * c.qk_dim + 2 * c.v_dim) + heads * c.v_dim * (3 if c.concat else 1)
    return 3.5 * attention + 3 * 2.0 * tokens * c.hidden_dim * inner


def measure(form: str, options: argparse.Namespace) -> list[str]:
    """The table's lines of one form."""
    batch, length = options.batch, options.length
    config = HSTUConfig(hidden_dim=options.hidden, num_heads=options.heads, max_seqlen=length, dropout=options.dropout,
                        attention_backend=options.attention, **FORMS[form])  # fmt: skip
    rows, dtype, device = batch * length, torch.bfloat16, "cuda"
    tokens = TokenSequence(
        x=torch.empty(0),
        seq_offsets=torch.arange(batch + 1, device=device) * length,
        max_seqlen=length,
        timestamps=torch.randint(0, 10_000, (rows,), device=device).cumsum(0),
    )
    x = torch.randn(rows, options.hidden, device=device).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    layers = [("torch", ())] + [("triton", names) for names in (RECOMPUTE if not options.quick else RECOMPUTE[:1])]
    lines = []
    for backend, names in layers:
        torch.manual_seed(0)
        layer = HSTULayer(replace(config, layer_backend=backend, layer_recompute=names)).to(device, dtype)
        ready = ready_tensors(layer, rows, dtype, device)
        steps = [products_step(layer, x), step_of(without_attention(layer, ready), layer, x, upstream)]
        whole = step_of(lambda x, layer=layer: layer(x, tokens), layer, x, upstream)
        peak, failure = float("nan"), ""
        try:
            whole()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            whole()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            steps.append(whole)
        except Exception as error:  # The layer's own figures count even where the attention can't run.
            failure = f"   {NO_ATTENTION} {type(error).__name__}: {str(error)[:120]}"
        products, bare, *layers_times = timed(steps, options.iterations)
        del ready, steps
        outside = bare.median - products.median
        line = f"{form:<11} {backend:<7} {'+'.join(names) or '-':<15} {products!s:>24} {bare!s:>26} {outside:7.2f}"
        for times in layers_times:
            rate = flop(config, batch, length) / times.median / 1e9
            line += f" {times!s:>26} {rate:8.0f} {outside / times.median:8.1%} {peak:9.2f}"
        line += failure
        print(line, flush=True)
        lines.append(line)
    return lines


PARITY = {"gated": torch.bfloat16, "production": torch.bfloat16, "paper": torch.float32}


def parity(forms: Sequence[str] = tuple(PARITY), device: str = "cuda", rows: int = 4099, hidden: int = 1024,
           heads: int = 4) -> bool:  # fmt: skip
    """The layer outside its attention against fp64, by the tests' bound: 2 (gradients 5) times torch's own error."""
    fine = True
    for form in forms:
        dtype = PARITY[form]
        config = HSTUConfig(hidden_dim=hidden, num_heads=heads, dropout=0.0, attention_backend="torch",
                            group_norm=form == "production", **FORMS[form])  # fmt: skip
        torch.manual_seed(0)
        layer = HSTULayer(config).to(device, dtype)
        x = torch.randn(rows, hidden, device=device).to(dtype)
        upstream = torch.randn_like(x)
        results = []
        for backend, kind in (("torch", torch.float64), ("torch", dtype), ("triton", dtype)):
            layer.to(kind).ops = get_layer_ops(backend, RECOMPUTE[-1] if backend == "triton" else ())
            torch.manual_seed(1)
            ready = {name: t.to(kind) for name, t in ready_tensors(layer, rows, dtype, device).items()}
            leaf = x.to(kind).detach().requires_grad_()
            y = without_attention(layer, ready)(leaf)
            leaves = [leaf, *(p for n, p in layer.named_parameters() if "relative" not in n)]
            results.append([t.double() for t in (y, *torch.autograd.grad(y, leaves, upstream.to(kind)))])
        worst = 0.0
        for i, (want, low, got) in enumerate(zip(*results, strict=True)):
            bound = (5 if i else 2) * (low - want).abs().max() + 1e-6 * want.abs().max()
            worst = max(worst, ((got - want).abs().max() / bound).item())
        fine &= worst <= 1.0
        print(
            f"parity {form:<11} {dtype!s:<15} error / bound {worst:.3f} {'ok' if worst <= 1.0 else 'FAILED'}",
            flush=True,
        )
    return fine


def parity_of_tokens(device: str = "cuda", rows: int = 4099, hidden: int = 1024) -> bool:
    """Rows moved to their places and back, and encodings with dropout, against plain torch in fp32."""
    torch.manual_seed(0)
    triton_ops, torch_ops = get_layer_ops("triton"), get_layer_ops("torch")
    order = torch.randperm(rows, device=device)
    pool, places = (
        list(torch.randn(rows, hidden, device=device).split([rows // 3, rows - rows // 3])),
        order.split([rows // 3, rows - rows // 3]),
    )
    fine = torch.equal(triton_ops.place_rows(pool, places), torch_ops.place_rows(pool, places))
    results = []
    for ops in (torch_ops, triton_ops):
        torch.manual_seed(1)
        leaves = [torch.randn(n, hidden, device=device).requires_grad_() for n in (rows, 513, 64)]
        indices = [torch.randint(0, n, (rows,), device=device) // 2 for n in (513, 64)]
        y = ops.add_encodings(leaves[0], 32.0, list(zip(leaves[1:], indices, strict=True)), 0.0, True)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    fine &= all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(*results, strict=True))
    x = torch.ones(rows, hidden, device=device, requires_grad=True)
    y = triton_ops.add_encodings(x, 1.0, [], 0.25, True)
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    kept = (y > 0).float().mean().item()
    fine &= torch.equal(gradient, y) and abs(kept - 0.75) < 4 * (0.1875 / y.numel()) ** 0.5
    print(
        f"parity tokens      rows, encodings, dropout (kept {kept:.5f} of 0.75)  {'ok' if fine else 'FAILED'}",
        flush=True,
    )
    return fine


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="parity, then one form without recompute settings")
    parser.add_argument("--no-parity", action="store_true", help="times alone")
    parser.add_argument("--form", choices=sorted(FORMS), help="default: all")
    parser.add_argument("--attention", default="triton", help="attention backend of both layers")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args(arguments)
    options.iterations = min(options.iterations, 10) if options.quick else options.iterations
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/layer.py measures GPU kernels, and torch sees no CUDA device here: nothing was run.")
        return 2
    print(headline())
    print(f"hidden {options.hidden}, {options.heads} heads, B = {options.batch}, S = {options.length}, bf16, "
          f"dropout {options.dropout}")  # fmt: skip
    fine = options.no_parity or all([parity(), parity_of_tokens()])
    print(f"{'form':<11} {'backend':<7} {'recompute':<15} {'matrix products, ms':>24} "
          f"{'without attention, ms':>26} {'outside':>7} {'layer, ms':>26} {'TFLOP/s':>8} {'outside':>8} "
          f"{'peak GiB':>9}")  # fmt: skip
    forms = [options.form] if options.form else ["gated"] if options.quick else list(FORMS)
    lines = [line for form in forms for line in measure(form, options)]
    print("fused:", "; ".join(layer_backends_used().get("triton", [])))
    whole = not any(NO_ATTENTION in line for line in lines)
    return 0 if fine and whole else 1


if __name__ == "__main__":
    sys.exit(main())
