"""Which key a row sees, and which blocks of keys (of rows) a block of rows (of keys) has to visit.

Positions are counted in the key sequence `contexts | history | targets`. A block loop visits at most four runs of
blocks: [0, first) contexts in front of a window, [low, full_low) and [full_high, high) blocks that the mask cuts, and
[target_low, target_high) the rows' own groups; the blocks [full_low, full_high) are seen whole and need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible(
    i,
    j,
    contexts,
    history_end,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_CONTEXTS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """Whether row i sees key j, both inside the sequence; i and j broadcast."""
    if CAUSAL:
        seen = j <= i
    else:
        seen = (j >= 0) & (i >= 0)
    if WINDOW >= 0:
        seen = seen & (i - j <= WINDOW) & (j - i <= WINDOW)
    if HAS_CONTEXTS:
        seen = seen | (i < contexts) | (j < contexts)
    if HAS_TARGETS:
        is_target = i >= history_end
        own_group = (j <= i) & ((i - history_end) // GROUP == (j - history_end) // GROUP)
        seen = tl.where(j < history_end, seen | is_target, is_target & own_group)
    return seen


@triton.jit
def key_blocks(
    i0,
    i1,
    contexts,
    history_end,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """The runs of key blocks that rows [i0, i1) visit."""
    r0 = tl.maximum(i0, contexts)
    r1 = tl.minimum(i1, history_end)
    only_history = (i0 >= contexts) & (i1 <= history_end)
    has_history = r0 < r1
    first = 0
    low = 0
    high = history_end
    full_low = 0
    full_high = history_end
    if CAUSAL:
        high = tl.where(only_history, tl.minimum(i1, history_end), history_end)
        full_high = tl.where(has_history, tl.minimum(r0 + 1, history_end), history_end)
    elif WINDOW >= 0:
        high = tl.where(only_history, tl.minimum(i1 + WINDOW, history_end), history_end)
        full_high = tl.where(has_history, tl.minimum(r0 + WINDOW + 1, history_end), history_end)
    if WINDOW >= 0:
        first = tl.where(only_history, contexts, 0)
        low = tl.where(only_history, tl.maximum(i0 - WINDOW, 0), 0)
        full_low = tl.where(has_history, r1 - 1 - WINDOW, 0)
        full_low = tl.where(full_low <= contexts, 0, full_low)
    first = tl.cdiv(first, BLOCK)
    low = tl.maximum(low // BLOCK, first)
    high = tl.maximum(tl.cdiv(high, BLOCK), low)
    full_low = tl.minimum(tl.maximum(tl.cdiv(full_low, BLOCK), low), high)
    full_high = tl.minimum(tl.maximum(full_high // BLOCK, full_low), high)
    target_low = high
    target_high = high
    if HAS_TARGETS:
        start = tl.maximum(i0, history_end) - history_end
        target_low = tl.maximum((history_end + start // GROUP * GROUP) // BLOCK, high)
        target_high = tl.where(i1 > history_end, tl.maximum(tl.cdiv(i1, BLOCK), target_low), target_low)
    return first, low, full_low, full_high, high, target_low, target_high


@triton.jit
def query_blocks(
    j0,
    j1,
    contexts,
    history_end,
    kv_len,
    q_len,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """The runs of row blocks (rows counted from the first query) that see keys [j0, j1)."""
    shift = kv_len - q_len
    below = j0 < history_end
    any_context = j0 < contexts
    all_contexts = j1 <= contexts
    low = contexts
    high = kv_len
    full_low = 0
    full_high = kv_len
    if CAUSAL:
        low = tl.where(any_context, contexts, j0)
        full_low = tl.where(all_contexts | (j1 - 1 <= contexts), 0, j1 - 1)
    elif WINDOW >= 0:
        low = tl.where(any_context, contexts, tl.maximum(j0 - WINDOW, contexts))
        full_low = tl.where(all_contexts | (j1 - 1 - WINDOW <= contexts), 0, j1 - 1 - WINDOW)
    if WINDOW >= 0:
        high = tl.where(any_context | (j1 + WINDOW >= history_end), kv_len, j1 + WINDOW)
        full_high = tl.where(all_contexts | (j0 + WINDOW + 1 >= history_end), kv_len, j0 + WINDOW + 1)
    whole = (j1 <= history_end) & (j0 + BLOCK_KEYS <= kv_len)
    full_high = tl.where(whole, full_high, 0)
    target_low = history_end
    target_high = kv_len
    if HAS_TARGETS:
        group_end = history_end + ((j1 - 1 - history_end) // GROUP + 1) * GROUP
        target_low = tl.where(below, history_end, j0)
        target_high = tl.where(below, kv_len, tl.minimum(group_end, kv_len))
    first = tl.cdiv(tl.where(below, tl.minimum(tl.maximum(contexts - shift, 0), q_len), 0), BLOCK)
    low = tl.maximum(tl.maximum(low - shift, 0) // BLOCK, first)
    high = tl.where(below, tl.minimum(tl.maximum(high - shift, 0), q_len), 0)
    high = tl.maximum(tl.cdiv(high, BLOCK), low)
    full_low = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_low - shift, 0), BLOCK), low), high)
    full_high = tl.minimum(tl.maximum(full_high - shift, 0), q_len) // BLOCK
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if HAS_TARGETS:
        target_low = tl.maximum(tl.maximum(target_low - shift, 0) // BLOCK, high)
        target_high = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(target_high - shift, 0), q_len), BLOCK), target_low)
    else:
        target_low = high
        target_high = high
    return first, low, full_low, full_high, high, target_low, target_high


@triton.jit
def cut_count(first, low, full_low, full_high, high, target_low, target_high):
    """How many of the visited blocks need a mask."""
    return first + (full_low - low) + (high - full_high) + (target_high - target_low)


@triton.jit
def cut_block(index, first, low, full_low, full_high, high, target_low):
    """The block number of the index-th block that needs a mask."""
    block = index + tl.where(index >= first, low - first, 0)
    block += tl.where(block >= full_low, full_high - full_low, 0)
    block += tl.where(block >= high, target_low - high, 0)
    return block
