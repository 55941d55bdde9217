"""How wide the accesses of a compiled kernel to tensors of x's size are, read from its code by source line."""

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

# The pointers to tensors of x's size, by the names that the kernels give them.
STREAMED = frozenset({"X", "Y", "R", "DX", "DY", "DR"})

TTIR_ACCESS = re.compile(
    r"\btt\.(?:load|store) .*tensor<(?P<shape>[\dx]+)x!tt\.ptr<\D+(?P<bits>\d+)>.* loc\((?P<place>#loc\d*)\)$",
    re.MULTILINE,
)
# A place in a file, or another place by a name, or that of a function's line where the function is called.
TTIR_PLACE = re.compile(
    r'^(#loc\d*) = loc\((?:"([^"]*)":(\d+):\d+|(?:"[^"]*"\(|callsite\()(#loc\d*)(?: at #loc\d*)?\))\)$', re.MULTILINE
)
PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*)"', re.MULTILINE)
PTX_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")


Place = tuple[str, int]  # a file's name and a line of it


def _functions(kernel: JITFunction) -> Iterator[JITFunction]:
    """A kernel and the functions that it calls by their bare names, and so on."""
    yield kernel
    for node in ast.walk(ast.parse("".join(kernel.raw_src))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = kernel.fn.__globals__.get(node.func.id)
            if isinstance(called, JITFunction):
                yield from _functions(called)


def _calls(function: JITFunction) -> list[list[Place]]:
    """Of each tl.load and tl.store of a function whose address is in one of STREAMED: its lines."""
    name, first = Path(inspect.getfile(function.fn)).name, function.starting_line_number
    return [
        [(name, first + line) for line in range(call.lineno - 1, call.end_lineno or call.lineno)]
        for call in ast.walk(ast.parse("".join(function.raw_src)))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("tl.load", "tl.store")
        and any(isinstance(node, ast.Name) and node.id in STREAMED for node in ast.walk(call.args[0]))
    ]


def _tile_bytes(ttir: str) -> Counter[Place]:
    """Bytes of the tile that the accesses of each line cover, in triton's code."""
    places = {place: (path, line, inner) for place, path, line, inner in TTIR_PLACE.findall(ttir)}
    covered: Counter[Place] = Counter()
    for access in TTIR_ACCESS.finditer(ttir):
        path, line, inner = places[access["place"]]
        while inner:
            path, line, inner = places[inner]
        covered[Path(path).name, int(line)] += prod(map(int, access["shape"].split("x"))) * int(access["bits"]) // 8
    return covered


def _thread_bytes(ptx: str) -> dict[Place, Counter[int]]:
    """Bytes that a thread moves in the accesses of each line, by the width of the access in bytes."""
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
    """Of the bytes of accesses to STREAMED tensors, the share in accesses of at least `least` bytes a thread.

    Every access in the code counts once, with the tile that it covers, in a loop or not. None where the kernel has no
    such access. For CUDA targets only.

    Raises:
        ValueError: triton's code has an access of which the machine's code shows no trace.
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
