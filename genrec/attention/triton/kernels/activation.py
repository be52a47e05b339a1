"""SiLU and its derivative, and the dropout of weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_fast(x):
    """The hardware's tanh: relative error 2^-11, enough for weights that are rounded to 16 bits."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(x, FAST: tl.constexpr):
    """SiLU of x; with FAST of 2 x, so that the caller's factor absorbs the half of silu(x) = x/2 (1 + tanh(x/2)).

    The multiprocessor has a sixteenth of its speed for such functions: one tanh costs half of what exp and 1/x do.
    """
    if FAST:
        return x + x * tanh_fast(x)
    else:
        return x * tl.sigmoid(x)


@triton.jit
def silu_and_slope(x, FAST: tl.constexpr):
    """SiLU of x and its derivative; with FAST SiLU of 2 x and twice its derivative there."""
    if FAST:
        t = tanh_fast(x)
        one_more = 1.0 + t
        return x * one_more, x * (one_more - one_more * t) + one_more
    else:
        s = tl.sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)


@triton.jit
def silu_slope(x, scale, FAST: tl.constexpr):
    """The derivative alone, times `scale`: with FAST three fused multiply-adds and a tanh."""
    if FAST:
        t = tanh_fast(x)
        one_more = scale * t + scale
        return x * (one_more - one_more * t) + one_more
    else:
        s = tl.sigmoid(x)
        return (s + x * s * (1.0 - s)) * scale


@triton.jit
def kept(seed, sequence_head, i, j, dropout):
    """1 / (1 - dropout) where the weight of row i and key j is kept, else 0: a function of its arguments alone."""
    i, j = tl.broadcast(i, j)
    zero = i * 0
    # Seven rounds of Philox pass all known tests of randomness; ten is the usual margin, for other uses.
    bits, _, _, _ = tl.philox(seed, i.to(tl.uint32), j.to(tl.uint32), (zero + sequence_head).to(tl.uint32),
                              zero.to(tl.uint32), 7)  # fmt: skip
    uniform = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)
