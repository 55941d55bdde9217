"""The audit as text: tables of the rows, then a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from ... import console
from ..ceilings import SHARED_BYTES
from .cases import direction, layout
from .rows import Requests, Row, Variants, violations

HEADINGS = (
    "N×C×S", "layout", "dtype", "direction", "x read", "launches", "bytes/x", "ceiling", "counted on",
    "registers", "spills", "wide", "shared", "programs", "instructions", "barriers",
)  # fmt: skip
KEYS = 4  # the first columns identify a row


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row, as in HEADINGS."""
    case = row.case
    compiled = [one for target, one in row.compiled.items() if target in SHARED_BYTES]
    registers = "/".join("–" if each.registers is None else str(each.registers) for each in compiled)
    shares = [each.vector_share for each in compiled if each.vector_share is not None]
    return (
        f"{case.N}×{case.C}×{case.S}",
        layout(case.channels_last),
        case.dtype,
        direction(case.backward),
        "once" if row.one_pass else "twice, L2" if row.slab else "twice*" if row.split_excused else "twice",
        str(max(len(each.launches) for each in compiled)),
        f"{row.moved:.4f}",
        f"{row.ceiling:.4f}",
        f"{row.count.interpreted} of {row.count.programs}",
        registers,
        str(max(each.spills or 0 for each in compiled)),
        f"{100 * min(shares):.0f} %" if shares else "–",
        str(max(each.shared or 0 for each in compiled)),
        "/".join(str(each.programs) for each in compiled if each.programs is not None) or "–",
        "/".join(f"{loop.instructions:.1f}" for each in compiled for loop in each.loops) or "–",
        "/".join(str(loop.barriers) for each in compiled for loop in each.loops) or "–",
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print a table for each origin of the shapes, with "!" behind a row that breaks a ceiling."""
    groups = {origin: list(group) for origin, group in groupby(rows, lambda row: row.case.origin)}
    marked = [[(*cells(row), "!" if violations(row) else "") for row in group] for group in groups.values()]
    for origin, table in zip(groups, console.tables((*HEADINGS, ""), marked, KEYS), strict=True):
        print(f"{origin}:", table, "", sep="\n")


def print_requests(requests: Sequence[Requests]) -> None:
    """Print a table of the sectors that a warp's request touches."""
    headings = ("N×C×S", "layout", "dtype", "launch", "load", "copy", "store")
    lines = [
        (
            f"{each.case.N}×{each.case.C}×{each.case.S}{' residual' if each.case.residual else ''}",
            layout(each.case.channels_last),
            each.case.dtype,
            each.launch,
            *("–" if sectors is None else f"{sectors:.1f}" for sectors in (each.load, each.copy, each.store)),
        )
        for each in requests
    ]
    (printed,) = console.tables(headings, [lines], KEYS)
    print(f"sectors for each request of a warp, sm_90 code executed, one program of each launch:\n{printed}\n")


def summary(rows: Sequence[Row], variants: Sequence[Variants], broken: Sequence[str]) -> list[str]:
    """A legend, the results that are not in the table, and a sentence for each broken ceiling."""
    lines = [
        f"registers: per thread, on {', '.join(SHARED_BYTES)}. spills: bytes per thread; shared: bytes per block; the "
        "largest of these targets. wide: share of the bytes of x, y, r and their gradients that moves in accesses of "
        "16 bytes (8 where one pass reduces bfloat16 channels); the smallest of these targets",
        "counted on: programs that were interpreted, one of each kind that moves the same, of all programs launched",
    ]
    lines.append(
        "programs: the least that an SM holds at a time; instructions: of a thread for each of its elements, and "
        "barriers for each tile, in the loops that stream x; all read from sm_90 machine code"
    )
    if any(row.slab for row in rows):
        lines.append("twice, L2: a slab, whose second read comes from L1 or L2")
    if any(map(violations, rows)):
        lines.append("!: the row breaks a ceiling")
    if any(row.split_excused for row in rows):
        lines.append("twice*: the row is short, but slices of its channels would move partial sectors")
    for target in (target for target in rows[0].compiled if target not in SHARED_BYTES):
        failures = Counter(row.compiled[target].failure for row in rows)
        lines.append(f"{target}: {failures.pop(None, 0)} of {len(rows)} rows compile")
        lines += [f"  {count}: {why}" for why, count in failures.items()]
    if variants:
        lines.append("Example 1 is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3)")
    lines += [
        f"Example 1 {each.dtype} {layout(each.channels_last)}: {each.example} compiled variants, "
        f"{each.other_batch} more for other batch sizes, {each.other_volume} more for another input size"
        for each in variants
    ]
    count = len(broken)
    lines.append(f"{count} broken ceiling{'s' if count > 1 else ''}:" if broken else "every ceiling holds")
    return [*lines, *broken]
