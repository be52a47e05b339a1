"""The CUTLASS attention kernels on a Hopper GPU: right, and how fast.

    python benchmarks/cutlass_check.py [--library FOLDER] [--beside FOLDER] [--seconds 300] [--only WORD]

Loads libgenrec_attention.so (GENREC_LIBRARY_PATH, or --library), compares forward and backward with an fp32 reference
on small jagged batches, without and with biases, in bf16 and some in fp16, then times full-length batches. With
--beside, the backward pass of a second library (of the same interface) is timed too, by turns with the first's, and
their gradients are compared. Works in a child process and watches it: a kernel that hangs costs its own stage and a
restart, not the run. Errors are relative: |x - reference| / |reference|; those of a relative bias's tables are relative
to the root of all the squares that a table sums: the terms' rounding counts, not how far they happen to cancel. `--only
bias` runs what has a bias.
"""

from __future__ import annotations

import argparse
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DIMS = (128, 64, 256)
STAGE_SECONDS = 8.0
FIRST_SECONDS = 30.0  # importing PyTorch, creating the context


def stages() -> list[tuple[str, Any]]:
    """Names and arguments of all stages, the most telling ones first."""
    found: list[tuple[str, Any]] = []
    for dim in (*DIMS, 32):
        found += [(f"forward D={dim} {name}", ("check", dim, case, False, False)) for name, case in CASES.items()]
    for dim in (*DIMS, 32):
        found += [(f"backward D={dim} {name}", ("check", dim, case, True, False)) for name, case in CASES.items()]
    for dim in DIMS:
        found += [(f"time D={dim} S={length}", ("time", dim, length)) for length in (4096, 1024)]
    if os.environ.get(BESIDE):
        found += [(f"beside D={dim} S={length}", ("beside", dim, length)) for dim in DIMS for length in (4096, 1024)]
    for dim in (*DIMS, 32):
        found += [(f"backward ordered D={dim} {name}", ("check", dim, CASES[name], True, True))
                  for name in ("mixed", "long mixed")]  # fmt: skip
    found += [("dims 40 and 72", ("check", (40, 72), CASES["mixed"], True, False))]
    for backward in (False, True):
        word = "backward" if backward else "forward"
        for dim in (*DIMS, 32):
            found += [(f"fp16 {word} D={dim} {name}", ("check", dim, CASES[name], backward, False, "float16"))
                      for name in ("causal", "mixed", "cached", "long", "long mixed")]  # fmt: skip
    return found + bias_stages()


def bias_stages() -> list[tuple[str, Any]]:
    """The kernels with a bias: none of them has been run on a GPU before."""
    found: list[tuple[str, Any]] = []
    for backward in (False, True):
        word = "backward" if backward else "forward"
        for dim in DIMS:
            cases = [(name, {**CASES[mask], "bias": bias}) for name, (mask, bias) in BIASES.items()]
            found += [(f"bias {word} D={dim} {name}", ("check", dim, case, backward, False)) for name, case in cases]
    for dim in DIMS:
        found += [(f"bias time D={dim} S={length}", ("clock_bias", dim, length)) for length in (4096, 1024)]
    for dim, name in ((128, "mixed ties"), (256, "causal seconds"), (64, "cached years"), (64, "dense shared")):
        mask, bias = BIASES[name]
        found += [(f"bias ordered D={dim} {name}", ("check", dim, {**CASES[mask], "bias": bias}, True, True))]
    return found


BESIDE = "GENREC_CHECK_BESIDE"
"""Environment variable by which a child process hears of --beside."""

CASES: dict[str, dict[str, Any]] = {
    "one full tile": {"lengths": (128,), "causal": False},
    "causal": {"lengths": (300, 3, 0, 129, 64)},
    "mixed": {"lengths": (300, 1, 0, 517), "contexts": (3, 1, 0, 5), "targets": (70, 0, 0, 33), "group": 2},
    "window": {"lengths": (700, 65), "contexts": (4, 0), "targets": (9, 2), "window": 100},
    "cached": {"lengths": (60, 1, 0, 130), "kv_lengths": (400, 131, 7, 300)},
    # Kernels for sequences of 2,048 rows and more in the mean, where there are such (csrc/attention/launch.h).
    "long": {"lengths": (2300, 2048)},
    "long mixed": {"lengths": (2500,), "contexts": (3,), "targets": (70,), "group": 2},
}

BIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal seconds": ("causal", {"digits": 3.0}),
    "mixed ties": ("mixed", {"digits": 4.0, "tied": True}),
    "window years": ("window", {"digits": 8.5, "asked": True}),
    "cached years": ("cached", {"digits": 8.5}),
    "full milliseconds": ("one full tile", {"digits": 12.0}),
    "few buckets": ("causal", {"digits": 5.0, "buckets": 8, "position": False}),
    "position alone": ("mixed", {"buckets": 0}),
    "dense": ("mixed", {"dense_heads": 2}),
    "dense shared": ("cached", {"dense_heads": 1}),
}
"""Mask, and bias: gaps between events reach 10 ** digits."""


def main() -> int:
    """Runs the stages in child processes; 0 where all that ran passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--library", help="folder of libgenrec_attention.so")
    parser.add_argument("--beside", help="folder of a second one, timed by turns with the first")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop starting stages after so long")
    parser.add_argument("--only", default="", help="stages whose names hold this word, such as time")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        os.environ["GENREC_LIBRARY_PATH"] = str(Path(options.library).resolve())
    if options.beside:
        os.environ[BESIDE] = str(Path(options.beside).resolve())
    if options.child is not None:
        return child(options.child, options.only)
    root = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    names = [name for name, _ in stages() if options.only in name]
    at, bad, end = 0, 0, time.monotonic() + options.seconds
    while at < len(names) and time.monotonic() < end:
        reached, failures = watch(at, names, end, options.only)
        bad += failures
        at = max(reached, at + 1)
    print(f"cutlass_check: {at} of {len(names)} stages, {bad} bad")
    return 1 if bad else 0


def watch(start: int, names: list[str], end: float, only: str) -> tuple[int, int]:
    """A child from stage `start` on; the stage to go on with, and how many went wrong."""
    process = subprocess.Popen(
        [sys.executable, "-u", __file__, "--child", str(start), "--only", only],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    at, bad, limit, pending = start, 0, FIRST_SECONDS, ""
    while True:
        if not selector.select(timeout=limit) or time.monotonic() > end:
            process.kill()
            hung = time.monotonic() <= end
            print(f"{names[min(at, len(names) - 1)]}: {'HUNG, killed' if hung else 'out of time'}")
            return (at + 1 if hung else len(names)), bad + hung
        text = os.read(process.stdout.fileno(), 65536).decode(errors="replace")
        if not text:
            break
        *lines, pending = (pending + text).split("\n")
        for line in lines:
            if line.startswith("STAGE "):
                at, limit = int(line.split()[1]), STAGE_SECONDS
            else:
                print(line, flush=True)
                bad += line.startswith("BAD")
    code = process.wait()
    if code != 0:
        print(f"{names[min(at, len(names) - 1)]}: child ended with {code}")
        return at + 1, bad + 1
    return len(names), bad


def child(start: int, only: str) -> int:
    """Runs the stages from `start` on; stops at the first CUDA error, which nothing in a process survives."""
    import torch

    from genrec.attention import _cutlass_binding

    if not torch.cuda.is_available():
        print("BAD: PyTorch sees no GPU")
        return 0
    if start == 0:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuda", torch.version.cuda)
        print(_cutlass_binding.library().genrec_attention_instances().decode().replace("\n", "; "))
    chosen = [stage for stage in stages() if only in stage[0]]
    for number, (name, (kind, *arguments)) in enumerate(chosen):
        if number < start:
            continue
        print(f"STAGE {number}")
        try:
            line = KINDS[kind](name, *arguments)
            torch.cuda.synchronize()
            print(line)
        except (RuntimeError, ValueError) as error:
            print(f"BAD {name}: {type(error).__name__}: {str(error)[:300]}")
            if "CUDA" in str(error):
                return 3
    return 0


def inputs(dim: int | tuple[int, int], case: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Tensors and options of a case."""
    import torch

    from genrec.attention import AttentionMask

    qk_dim, v_dim = dim if isinstance(dim, tuple) else (dim, dim)
    draw = torch.Generator(device="cuda").manual_seed(1)
    lengths, kv_lengths = case["lengths"], case.get("kv_lengths", case["lengths"])

    def normal(rows: int, columns: int) -> Any:
        values = torch.randn(rows, 2, columns, generator=draw, device="cuda", dtype=torch.float32)
        return values.to(dtype).requires_grad_()

    def counts(name: str) -> Any:
        return None if name not in case else torch.tensor(case[name], device="cuda")

    mask = AttentionMask(counts("contexts"), counts("targets"), case.get("group", 1), case.get("window"),
                         case.get("causal", True))  # fmt: skip
    q, k, v = normal(sum(lengths), qk_dim), normal(sum(kv_lengths), qk_dim), normal(sum(kv_lengths), v_dim)
    offsets = [torch.tensor([0, *_sums(n)], device="cuda") for n in (lengths, kv_lengths)]
    options: dict[str, Any] = {"mask": mask, "alpha": qk_dim**-0.5, "scale": 1 / 50}
    if "kv_lengths" in case:
        options |= {"kv_offsets": offsets[1], "max_kv_len": max(kv_lengths)}
    d_out = normal(sum(lengths), v_dim).detach()
    if "bias" in case:
        options["bias"] = make_bias(lengths, kv_lengths, draw, **case["bias"])
    return {"q": q, "k": k, "v": v, "offsets": offsets[0], "longest": max(lengths), "options": options, "d_out": d_out}


def make_bias(
    lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    draw: Any,
    digits: float = 0.0,
    buckets: int = 129,
    position: bool = True,
    tied: bool = False,
    asked: bool = False,
    dense_heads: int = 0,
) -> Any:
    """A dense bias, or a relative one with times that rise within each sequence."""
    import torch

    from genrec.attention import RelativeBias

    def table(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw, device="cuda").requires_grad_()

    if dense_heads > 0:
        return table(len(lengths), dense_heads, max(lengths), max(kv_lengths))
    rows = sum(kv_lengths)
    gaps = (10 ** (torch.rand(rows, generator=draw, device="cuda", dtype=torch.float64) * digits)).long()
    if tied:
        gaps = gaps * (torch.rand(rows, generator=draw, device="cuda") < 0.4)
    times = torch.cat([part.cumsum(0) for part in gaps.split(kv_lengths)]) + 1_000_000_000
    later = None
    if asked:
        last = [part[len(part) - n :] for part, n in zip(times.split(kv_lengths), lengths, strict=True)]
        later = torch.cat(last) + torch.randint(0, 100_000, (sum(lengths),), generator=draw, device="cuda")
    return RelativeBias(table(2 * max(kv_lengths) + 3) if position else None, table(buckets) if buckets > 0 else None,
                        times, later)  # fmt: skip


def trained(bias: Any) -> dict[str, Any]:
    """The bias's tensors that have gradients, by name."""
    import torch

    if bias is None or isinstance(bias, torch.Tensor):
        return {} if bias is None else {"dense": bias}
    tables = {"position": bias.position_weight, "time": bias.time_weight}
    return {name: table for name, table in tables.items() if table is not None}


def _sums(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[: i + 1]) for i in range(len(lengths))]


def check(
    name: str,
    dim: int | tuple[int, int],
    case: dict[str, Any],
    backward: bool,
    ordered: bool,
    dtype: str = "bfloat16",
) -> str:
    """One line: errors of the output, or of the three gradients, against the torch backend in fp32."""
    import torch

    from genrec.attention import hstu_attention

    given = inputs(dim, case, getattr(torch, dtype))
    most = 0.01 if dtype == "bfloat16" else 0.00125  # three more digits of two
    leaves = [given[key] for key in "qkv"]
    tables = trained(given["options"].get("bias"))
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]

    def run(tensors: list[Any], backend: str) -> list[Any]:
        with torch.set_grad_enabled(backward):
            out = hstu_attention(*tensors, given["offsets"], given["longest"], backend=backend,
                                 deterministic=ordered, **given["options"])  # fmt: skip
        if not backward:
            return [out]
        return list(torch.autograd.grad(out, [*tensors, *tables.values()], given["d_out"].to(out.dtype)))

    wanted = run(wide, "torch")
    terms = terms_of_tables(given, case, wide) if backward and tables and "dense" not in tables else None
    found = run(leaves, "cutlass")
    torch.cuda.synchronize()
    again = run(leaves, "cutlass")
    words, good = [], True
    labels = ("dq", "dk", "dv", *tables) if backward else ("out",)
    for label, x, y, reference in zip(labels, found, again, wanted, strict=True):
        size, bound = (terms, most / 2) if terms is not None and label in tables else (reference.norm(), most)
        error = ((x.float() - reference).norm() / size).item()
        same = torch.equal(x, y)
        good = good and error < bound and (same or (label not in ("dk", "dv", "out") and not ordered))
        words.append(f"{label} {error:.2e}{'' if same else ' (not repeated bit by bit)'}")
        if not error < bound:
            words.append(_where(x.float(), reference) if x.dim() == 3 else _first_bad(x, reference))
    return f"{'ok ' if good else 'BAD'} {name}: " + ", ".join(words)


def terms_of_tables(given: dict[str, Any], case: dict[str, Any], tensors: list[Any]) -> Any:
    """The norm of all that a relative bias's tables sum, the gradients of the single scores: by the torch backend, with
    the bias written out for each head."""
    import torch

    from genrec.attention import hstu_attention
    from genrec.attention.spec import time_bucket

    options = given["options"]
    bias, lengths = options["bias"], case["lengths"]
    kv_lengths, heads = case.get("kv_lengths", lengths), tensors[0].shape[1]
    dense = torch.zeros(len(lengths), heads, max(lengths), max(kv_lengths), device="cuda")
    query_at = key_at = 0
    with torch.no_grad():
        for b, (queries, keys) in enumerate(zip(lengths, kv_lengths, strict=True)):
            row = torch.arange(keys - queries, keys, device="cuda")[:, None]
            column = torch.arange(keys, device="cuda")[None]
            part = dense[b, :, :queries, :keys]
            if bias.position_weight is not None:
                part += bias.position_weight[column - row + (bias.position_weight.numel() - 1) // 2]
            if bias.time_weight is not None and queries > 0:
                times = bias.timestamps[key_at : key_at + keys]
                asked = times[(row[:, 0] + 1).clamp(max=keys - 1)]
                if bias.query_timestamps is not None:
                    asked = bias.query_timestamps[query_at : query_at + queries]
                part += bias.time_weight[time_bucket(asked[:, None] - times[None], bias.time_weight.numel())]
            query_at, key_at = query_at + queries, key_at + keys
    dense.requires_grad_()
    out = hstu_attention(*tensors, given["offsets"], given["longest"], backend="torch", **{**options, "bias": dense})
    (terms,) = torch.autograd.grad(out, [dense], given["d_out"].to(out.dtype))
    return terms.norm()


def _first_bad(x: Any, reference: Any) -> str:
    """Of a table or a dense bias: how many entries are off, and the first of them."""
    bad = ((x - reference).abs() > 0.02 * reference.abs().max()).nonzero()
    first = [(tuple(i), round(x[tuple(i)].item(), 4), round(reference[tuple(i)].item(), 4)) for i in bad[:6].tolist()]
    return f"[bad {len(bad)} of {x.numel()}; {first}]"


def _where(x: Any, reference: Any) -> str:
    """Where an error is: by blocks of 64 rows, by head, by blocks of 8 columns; and the first bad elements."""
    difference = (x - reference).abs().nan_to_num(1e9)
    bad = difference > 0.05 * reference.abs().max()
    blocks = [int(part.sum()) for part in bad.split(64)]
    columns = [int(bad[..., c : c + 8].sum()) for c in range(0, bad.shape[2], 8)]
    first = [(tuple(i), round(x[tuple(i)].item(), 4), round(reference[tuple(i)].item(), 4))
             for i in bad.nonzero()[:4].tolist()]  # fmt: skip
    return f"[bad {int(bad.sum())} of {bad.numel()}; by 64 rows {blocks[:16]}; by head {bad.sum((0, 2)).tolist()}; " \
           f"by 8 columns {columns}; {first}]"  # fmt: skip


def use_library(folder: str) -> None:
    """Lets the library of a folder serve the calls from here on."""
    from genrec.attention import _cutlass_binding

    os.environ["GENREC_LIBRARY_PATH"] = folder
    _cutlass_binding.library.cache_clear()


def beside(name: str, dim: int, length: int) -> str:
    """Median times of the backward pass of two libraries by turns (two rounds), 4 heads, 128 k tokens, causal."""
    import torch

    from genrec.attention import hstu_attention

    heads, batch = 4, 131072 // length
    q, k, v, d_out = (torch.randn(batch * length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    work = 5 * heads * dim * length**2 * batch / 1e12
    folders = [os.environ.get("GENREC_LIBRARY_PATH", ""), os.environ[BESIDE]]
    times: dict[str, list[float]] = {}
    wanted: list[Any] = []
    worst = 0.0
    for folder in folders * 2:
        use_library(folder)
        offsets = torch.arange(batch + 1, device="cuda") * length  # new offsets, hence a plan of the library's own
        out = hstu_attention(*leaves, offsets, length, alpha=dim**-0.5, scale=1 / length, backend="cutlass")
        found = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        wanted = wanted or [x.float() for x in found]
        worst = max(worst, *(((x.float() - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)))
        back = median(lambda out=out: torch.autograd.grad(out, leaves, d_out, retain_graph=True))
        times.setdefault(folder, []).append(back)
    use_library(folders[0])
    words = [f"{' '.join(f'{t:.3f}' for t in times[folder])} ms {work / min(times[folder]) * 1e3:.0f} TFLOP/s"
             for folder in folders]  # fmt: skip
    return f"{'    ' if worst < 0.01 else 'BAD '}{name} B={batch}: {words[0]}, beside {words[1]}; apart {worst:.1e}"


def clock(name: str, dim: int, length: int) -> str:
    """Median time of forward and backward, 4 heads, 128 k tokens, causal, and the rate by the usual count."""
    import torch

    from genrec.attention import hstu_attention

    heads, batch = 4, 131072 // length
    q, k, v, d_out = (torch.randn(batch * length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    offsets = torch.arange(batch + 1, device="cuda") * length

    def forward() -> Any:
        return hstu_attention(*leaves, offsets, length, alpha=dim**-0.5, scale=1 / length, backend="cutlass")

    out = forward()
    work = 2 * heads * dim * length**2 * batch / 1e12
    with torch.no_grad():
        ahead = median(forward)
    back = median(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True))
    return (f"    {name} B={batch}: forward {ahead:.3f} ms {work / ahead * 1e3:.0f} TFLOP/s, "
            f"backward {back:.3f} ms {2.5 * work / back * 1e3:.0f} TFLOP/s")  # fmt: skip


def clock_bias(name: str, dim: int, length: int) -> str:
    """As `clock`, without a bias, with a relative one (gaps of up to a day) and, where it fits, with a dense one."""
    import torch

    from genrec.attention import hstu_attention

    heads, batch = 4, 131072 // length
    q, k, v, d_out = (torch.randn(batch * length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    offsets = torch.arange(batch + 1, device="cuda") * length
    draw = torch.Generator(device="cuda").manual_seed(1)
    lengths = (length,) * batch
    biases = {"none": None, "relative": make_bias(lengths, lengths, draw, digits=5.0)}
    biases["position"] = make_bias(lengths, lengths, draw, buckets=0)
    if length <= 1024:
        biases["dense"] = make_bias(lengths, lengths, draw, dense_heads=1)
    words, plain = [], (1.0, 1.0)
    for label, bias in biases.items():

        def forward(bias: Any = bias) -> Any:
            return hstu_attention(*leaves, offsets, length, alpha=dim**-0.5, scale=1 / length, bias=bias,
                                  backend="cutlass")  # fmt: skip

        out, wanted = forward(), [*leaves, *trained(bias).values()]
        with torch.no_grad():
            ahead = median(forward)
        back = median(lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, d_out, retain_graph=True))
        plain = (ahead, back) if bias is None else plain
        words.append(f"{label} forward {ahead:.3f} ms ({ahead / plain[0]:.2f}) backward {back:.3f} ms "
                     f"({back / plain[1]:.2f})")  # fmt: skip
        if bias is not None:
            for tensor in trained(bias).values():
                tensor.requires_grad_(False)
            out = forward()
            back = median(lambda out=out: torch.autograd.grad(out, leaves, d_out, retain_graph=True))
            words[-1] += f", its own gradients not wanted {back:.3f} ms ({back / plain[1]:.2f})"
    return f"    {name} B={batch}: " + ", ".join(words)


def median(function: Any, times: int = 15) -> float:
    """Milliseconds, by events, after three calls to warm up."""
    import torch

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # about 20 ms, in which all calls are queued: the host's time stays out
    spans = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in spans)[times // 2]


KINDS: dict[str, Any] = {"check": check, "time": clock, "beside": beside, "clock_bias": clock_bias}

if __name__ == "__main__":
    sys.exit(main())
