"""The width of a compiled kernel's accesses to tensors of x's size, read from its code by source line."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

from triton.runtime.jit import JITFunction

from .compile import Launch

# The kernels' names for pointers to tensors of x's size.
STREAMED = frozenset({"X", "Y", "R", "DX", "DY", "DR"})

TTIR_ACCESS = re.compile(
    r"\btt\.(?:load|store) .*tensor<(?P<shape>[\dx]+)x!tt\.ptr<\D+(?P<bits>\d+)>.* loc\((?P<place>#loc\d*)\)$",
    re.MULTILINE,
)
# A place in a file, or a name for another place, or a place inside a function that is called.
TTIR_PLACE = re.compile(
    r'^(#loc\d*) = loc\((?:"([^"]*)":(\d+):\d+|(?:"[^"]*"\(|callsite\()(#loc\d*)(?: at #loc\d*)?\))\)$', re.MULTILINE
)
PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*)"', re.MULTILINE)
PTX_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")

Place = tuple[str, int]  # a file's name and a line of it


def _functions(kernel: JITFunction) -> Iterator[JITFunction]:
    """A kernel and all functions that it calls by name, directly or indirectly."""
    yield kernel
    for node in ast.walk(ast.parse("".join(kernel.raw_src))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = kernel.fn.__globals__.get(node.func.id)
            if isinstance(called, JITFunction):
                yield from _functions(called)


def _calls(function: JITFunction) -> list[list[Place]]:
    """The lines of each tl.load and tl.store in a function whose address uses a pointer of STREAMED."""
    name, first = Path(inspect.getfile(function.fn)).name, function.starting_line_number
    return [
        [(name, first + line) for line in range(call.lineno - 1, call.end_lineno or call.lineno)]
        for call in ast.walk(ast.parse("".join(function.raw_src)))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("tl.load", "tl.store")
        and any(isinstance(node, ast.Name) and node.id in STREAMED for node in ast.walk(call.args[0]))
    ]


def _tile_bytes(ttir: str) -> Counter[Place]:
    """Bytes of the tiles that each source line accesses, according to triton's code."""
    places = {place: (path, line, inner) for place, path, line, inner in TTIR_PLACE.findall(ttir)}
    covered: Counter[Place] = Counter()
    for access in TTIR_ACCESS.finditer(ttir):
        path, line, inner = places[access["place"]]
        while inner:
            path, line, inner = places[inner]
        covered[Path(path).name, int(line)] += prod(map(int, access["shape"].split("x"))) * int(access["bits"]) // 8
    return covered


def _thread_bytes(ptx: str) -> dict[Place, Counter[int]]:
    """Bytes that a thread moves at each source line, by the width of the access in bytes."""
    names = {number: Path(path).name for number, path in PTX_FILE.findall(ptx)}
    moved: dict[Place, Counter[int]] = defaultdict(Counter)
    here: Place | None = None
    for line in ptx.splitlines():
        if place := PTX_LINE.match(line):
            here = names[place[1]], int(place[2])
        elif here is not None and (access := PTX_ACCESS.search(line)):
            width = int(access[1] or 1) * int(access[2]) // 8
            moved[here][width] += width
        elif here is not None and (copy := PTX_COPY.search(line)):
            width = int(copy[1], 0)
            moved[here][width] += width
    return moved


def share(launch: Launch, least: int) -> float | None:
    """The share of bytes that accesses of at least `least` bytes per thread move, among accesses to STREAMED tensors.

    Each access in the code counts once with the tile that it covers, even in a loop. For CUDA targets only.

    Returns None if the kernel has no such access.

    Raises:
        ValueError: an access of triton's code is missing in the machine code.
    """
    tiles, threads = _tile_bytes(launch.ttir), _thread_bytes(launch.compiled.asm["ptx"])
    total = wide = 0.0
    for function in dict.fromkeys(_functions(launch.compiled.src.fn)):
        for call in _calls(function):
            tile = sum(tiles[place] for place in call)
            widths = sum((threads[place] for place in call), Counter[int]())
            if not tile:
                continue
            if not widths:
                (name, first), (_, last) = call[0], call[-1]
                raise ValueError(f"{launch.name}: no access in the PTX of {name} lines {first} to {last}")
            total += tile
            wide += tile * sum(count for width, count in widths.items() if width >= least) / widths.total()
    return wide / total if total else None
