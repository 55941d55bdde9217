"""How wide the accesses of a compiled kernel to tensors of x's size are, read from its code by source line."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter, defaultdict
from math import prod
from pathlib import Path

from triton.runtime.jit import JITFunction

from .compile import Launch

# The pointers to tensors of x's size, by the names that the kernels give them.
STREAMED = frozenset({"X", "Y", "DX", "DY"})

TTIR_ACCESS = re.compile(
    r"\btt\.(?:load|store) .*tensor<(?P<shape>[\dx]+)x!tt\.ptr<\D+(?P<bits>\d+)>.* loc\((?P<place>#loc\d*)\)$",
    re.MULTILINE,
)
TTIR_PLACE = re.compile(r'^(#loc\d*) = loc\("([^"]*)"(?::(\d+):\d+|\((#loc\d*)\))\)$', re.MULTILINE)
PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(.*)"', re.MULTILINE)
PTX_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s")


def _calls(kernel: JITFunction) -> list[range]:
    """Of each tl.load and tl.store of a kernel whose address is in one of STREAMED: its lines in the kernel's file."""
    first = kernel.starting_line_number
    return [
        range(first + call.lineno - 1, first + (call.end_lineno or call.lineno))
        for call in ast.walk(ast.parse("".join(kernel.raw_src)))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("tl.load", "tl.store")
        and any(isinstance(node, ast.Name) and node.id in STREAMED for node in ast.walk(call.args[0]))
    ]


def _tile_bytes(ttir: str, file: str) -> Counter[int]:
    """Bytes of the tile that each access in triton's code covers, by its line in `file`."""
    elsewhere = ("", "", "")  # in a function that the kernel calls
    places = {place: (text, line, inner) for place, text, line, inner in TTIR_PLACE.findall(ttir)}
    covered: Counter[int] = Counter()
    for access in TTIR_ACCESS.finditer(ttir):
        text, line, inner = places.get(access["place"], elsewhere)
        while inner:
            text, line, inner = places.get(inner, elsewhere)
        if Path(text).name == file:
            covered[int(line)] += prod(map(int, access["shape"].split("x"))) * int(access["bits"]) // 8
    return covered


def _thread_bytes(ptx: str, file: str) -> dict[int, Counter[int]]:
    """Bytes that a thread moves in the accesses of each line in `file`, by the width of the access in bytes."""
    own = {number for number, path in PTX_FILE.findall(ptx) if Path(path).name == file}
    moved: dict[int, Counter[int]] = defaultdict(Counter)
    here: int | None = None
    for line in ptx.splitlines():
        if place := PTX_LINE.match(line):
            here = int(place[2]) if place[1] in own else None
        elif here is not None and (access := PTX_ACCESS.search(line)):
            width = int(access[1] or 1) * int(access[2]) // 8
            moved[here][width] += width
    return moved


def share(launch: Launch, least: int) -> float | None:
    """Of the bytes of accesses to STREAMED tensors, the share in accesses of at least `least` bytes a thread.

    Every access in the code counts once, with the tile that it covers, in a loop or not. None where the kernel has no
    such access. For CUDA targets only.

    Raises:
        ValueError: triton's code has an access of which the machine's code shows no trace.
    """
    kernel = launch.compiled.src.fn
    file = Path(inspect.getfile(kernel.fn)).name
    tiles, threads = _tile_bytes(launch.ttir, file), _thread_bytes(launch.compiled.asm["ptx"], file)
    total = wide = 0.0
    for call in _calls(kernel):
        tile = sum(tiles[line] for line in call)
        widths = sum((threads[line] for line in call), Counter[int]())
        if not tile:
            continue
        if not widths:
            raise ValueError(f"{launch.name}: no access in the PTX of {file} lines {call.start} to {call.stop - 1}")
        total += tile
        wide += tile * sum(count for width, count in widths.items() if width >= least) / widths.total()
    return wide / total if total else None
