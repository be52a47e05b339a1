"""How many additions to memory a compiled Triton kernel makes, told from its code: does any thread add a copy?

A tile smaller than a block of threads lies in several threads at once, and each of them would add it. Triton's own
`atomic_add` lets one of them do it, by a condition on the thread's number; inline assembly knows nothing of that. So
the conditions in front of the additions are evaluated for every thread, as far as its number decides them (what depends
on data counts as true), and the threads that may add must be as many as the tiles have elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_ASSIGNMENT = re.compile(r"([a-z][\w.:]*)\s+(%\w+), ([^\[{]*);$")
_ADDITION = re.compile(r"(?:@(!?)(%p\w+)\s+)?(?<![\w.])(?:atom|red)\.(?!shared)([\w.:]+)")
_TILE = re.compile(r"tt\.atomic_rmw .*? : \((?:tensor<([\dx]+)x!tt\.ptr|!tt\.ptr)")
_32 = 0xFFFFFFFF
_WORDS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "xor": lambda a, b: a ^ b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shl": lambda a, b: (a << b) & _32,
    "shr": lambda a, b: (a & _32) >> b,
    "bfe": lambda a, b, c: (a >> b) & ((1 << c) - 1),
    "selp": lambda a, b, c: a if c else b,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    **dict.fromkeys(["lt", "lo"], lambda a, b: a < b),
    **dict.fromkeys(["le", "ls"], lambda a, b: a <= b),
    **dict.fromkeys(["gt", "hi"], lambda a, b: a > b),
    **dict.fromkeys(["ge", "hs"], lambda a, b: a >= b),
}


def tile_elements(ttgir: str) -> int:
    """Elements of all tiles that the intermediate code adds to memory."""
    total = 0
    for shape in _TILE.findall(ttgir):
        elements = 1
        for size in filter(None, shape.split("x")):
            elements *= int(size)
        total += elements
    return total


def additions(ptx: str, threads: int) -> int:
    """Numbers that the threads of a program add at most, each line of the code executed once."""
    definitions: dict[str, list[tuple[str, list[str]]]] = {}
    for line in ptx.splitlines():
        found = _ASSIGNMENT.match(line.strip())
        if found:
            definitions.setdefault(found[2], []).append((found[1], [x.strip() for x in found[3].split(",")]))
    known: dict[tuple[str, int], int | None] = {}

    def value(name: str, thread: int) -> int | None:
        """Of a register in a thread; None where more than the thread's number decides."""
        if name == "%tid.x":
            return thread
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", name):
            return int(name, 0)
        if (name, thread) not in known:
            known[name, thread] = None  # for what depends on itself
            if len(definitions.get(name, [])) == 1:
                word, inputs = definitions[name][0]
                known[name, thread] = _result(word, [value(x, thread) for x in inputs])
        return known[name, thread]

    total = 0
    for line in ptx.splitlines():
        for found in _ADDITION.finditer(line):  # inline assembly may hold several
            width = int((re.search(r"\.v(\d)", found[3]) or ["", "1"])[1])
            holds = [value(found[2], thread) if found[2] else 1 for thread in range(threads)]
            total += width * sum(x is None or bool(x) != bool(found[1]) for x in holds)
    return total


def _result(word: str, inputs: list[int | None]) -> int | None:
    """Of an instruction; None where it isn't decided."""
    name, *rest = word.split(".")
    if name in ("and", "or") and None in inputs:
        decided = [x for x in inputs if x is not None]
        decides = bool(decided) and bool(decided[0]) == (name == "or") and (name == "and" or rest[-1:] == ["pred"])
        return decided[0] if decides else None
    if any(x is None for x in inputs):
        return None
    if name == "setp" and rest[0] in _COMPARISONS:
        return int(_COMPARISONS[rest[0]](*inputs))  # type: ignore[arg-type]
    if name == "not":
        return int(not inputs[0]) if rest[-1:] == ["pred"] else ~(inputs[0] or 0) & _32
    return _WORDS[name](*inputs) if name in _WORDS else None
