"""The audit's rows as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ... import columns
from ..ceilings import SHARED_BYTES
from .cases import direction, layout
from .rows import Row, violations

if TYPE_CHECKING:
    from .findings import Variants

HEADINGS = (
    "N×C×S", "layout", "dtype", "direction", "x read", "launches", "bytes/x", "ceiling", "counted on",
    "registers", "spills", "16-byte", "shared", "programs", "instructions", "barriers",
)  # fmt: skip
KEYS = 4  # columns that say which row it is
BROKEN = " !"  # behind a row that breaks a ceiling


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADINGS."""
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
        f"{row.interpreted} of {row.programs}" if row.programs else "predicted",
        registers,
        str(max(each.spills or 0 for each in compiled)),
        f"{100 * min(shares):.0f} %" if shares else "–",
        str(max(each.shared or 0 for each in compiled)),
        "/".join(str(each.programs) for each in compiled if each.programs is not None) or "–",
        "/".join(f"{loop.instructions:.1f}" for each in compiled for loop in each.loops) or "–",
        "/".join(str(loop.barriers) for each in compiled for loop in each.loops) or "–",
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows under where their shape is met, in as many tables as the terminal's width takes."""
    lines = [HEADINGS, *map(cells, rows)]
    wide = columns.widths(lines)
    for origin, group in groupby(rows, lambda row: row.case.origin):
        chosen = list(group)
        print(f"{origin}:")
        for part in columns.parts(wide, KEYS, columns.terminal() - len(BROKEN)):
            print(columns.aligned(HEADINGS, wide, part))
            for row in chosen:
                print(columns.aligned(cells(row), wide, part) + (BROKEN if violations(row) else ""))
            print()


def summary(rows: Sequence[Row], variants: Sequence[Variants], broken: Sequence[str]) -> list[str]:
    """What the table does not say, and at the end every broken ceiling in words."""
    lines = [
        f"registers a thread on {', '.join(SHARED_BYTES)}; spills in bytes a thread, shared memory in bytes a block: "
        "the most of these; 16-byte: share of the bytes of accesses to x, y, r and their gradients, the least of these",
        "counted on: programs interpreted, one for all that move the same, of those launched at full size",
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
    lines += [
        f"Example 1 {each.dtype} {layout(each.channels_last)}: {each.example} compiled variants, "
        f"{each.other_batch} more for other batch sizes, {each.other_volume} more for another volume"
        for each in variants
    ]
    count = len(broken)
    lines.append(f"{count} broken ceiling{'s' if count > 1 else ''}:" if broken else "every ceiling holds")
    return [*lines, *broken]
