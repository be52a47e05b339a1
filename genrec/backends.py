"""`python -m genrec.backends`: which attention and layer backends this machine can run, and why not the others.

With options that describe a call (`--dtype bf16 --qk-dim 50 --bias relative --targets`) the answer is about that call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from genrec._version import __version__
from genrec.attention import AttentionSpec, registry
from genrec.attention.registry import BackendReport
from genrec.layers import ops as layer_ops

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command line; every option has None or False for "not asked"."""
    p = argparse.ArgumentParser(prog="python -m genrec.backends", description=__doc__.split("\n\n")[0])
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    p.add_argument("--dtype", choices=sorted(DTYPES), help="of q, k and v")
    p.add_argument("--heads", type=int, help="number of heads")
    p.add_argument("--qk-dim", type=int, help="Dqk of a head")
    p.add_argument("--v-dim", type=int, help="Dv of a head; default: as --qk-dim")
    p.add_argument("--bias", choices=["none", "relative", "dense"], help="kind of bias")
    p.add_argument("--contexts", action="store_true", help="contextual tokens")
    p.add_argument("--targets", action="store_true", help="candidates")
    p.add_argument("--target-group-size", type=int, help="tokens of a candidate")
    p.add_argument("--window", type=int, help="reach of history rows")
    p.add_argument("--no-causal", action="store_true", help="history rows see later ones too")
    p.add_argument("--dense-mask", action="store_true", help="a boolean mask tensor")
    p.add_argument("--cached-keys", action="store_true", help="new queries against a key-value cache")
    p.add_argument("--tensor-scale", action="store_true", help="a scale for each sequence")
    p.add_argument("--dropout", type=float, help="of the attention weights")
    p.add_argument("--grad", action="store_true", help="with a backward pass")
    p.add_argument("--deterministic", action="store_true", help="same bits in every run")
    return p


def asked_spec(options: argparse.Namespace) -> AttentionSpec | None:
    """The call that the options describe; None where they say nothing."""
    if not any(value not in (None, False) for value in vars(options).values()):
        return None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    qk_dim = options.qk_dim or 64
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None
    return AttentionSpec(
        device=device,
        dtype=DTYPES[options.dtype or ("bf16" if device == "cuda" else "fp32")],
        num_heads=options.heads or 2,
        qk_dim=qk_dim,
        v_dim=options.v_dim or qk_dim,
        bias=options.bias or "none",
        contexts=options.contexts,
        targets=options.targets,
        target_group_size=options.target_group_size or 1,
        window=options.window,
        causal=not options.no_causal,
        dense_mask=options.dense_mask,
        cached_keys=options.cached_keys,
        tensor_scale=options.tensor_scale,
        dropout=options.dropout or 0.0,
        capability=capability,
        needs_grad=options.grad,
        deterministic=options.deterministic,
    )


def table(spec: AttentionSpec | None = None) -> str:
    """A line for each backend: its name, whether it runs (and serves `spec`), and why not."""
    lines = registry.report(spec)
    first = next((line.name for line in lines if not (line.reason or line.passed_over)), "none")
    choice = f"'auto' {'would choose' if spec else 'tries them in this order; first that runs'}: {first}"
    return f"{_rows('attention', lines)}\n\n{choice}"


def layer_table() -> str:
    """The same for what runs the layers outside attention."""
    lines = layer_ops.report()
    first = "triton" if torch.cuda.is_available() and lines[0].reason is None else "torch"
    return f"{_rows('layer', lines)}\n\n'auto' takes triton for tensors on a GPU, else torch; here: {first}"


def _rows(head: str, lines: Sequence[BackendReport | layer_ops.LayerBackendReport]) -> str:
    width = max(len("attention"), *(len(line.name) for line in lines))
    rows = [f"{head:<{width}}  runs  why not"]
    rows += [
        f"{line.name:<{width}}  {'no ' if line.reason else 'yes'}   {line.reason or _aside(line)}".rstrip()
        for line in lines
    ]
    return "\n".join(rows)


def _aside(line: BackendReport | layer_ops.LayerBackendReport) -> str:
    passed_over = getattr(line, "passed_over", None)
    return f"'auto' passes it over: {passed_over}" if passed_over else ""


def machine() -> str:
    """PyTorch's version and the devices that it sees."""
    devices = ["cpu"]
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        devices.append(f"cuda:{number} {torch.cuda.get_device_name(number)} (capability {major}.{minor})")
    return f"genrec {__version__}, torch {torch.__version__}, devices: {', '.join(devices)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. The exit status is 1 where no backend can serve the call asked about."""
    spec = asked_spec(parser().parse_args(arguments))
    print(machine())
    if spec is not None:
        print(spec)
    print()
    print(table(spec))
    if spec is None:
        print(f"\n{layer_table()}")
    return 0 if any(line.reason is None for line in registry.report(spec)) else 1


if __name__ == "__main__":
    sys.exit(main())
