"""A table that is wider than the terminal, in several that are not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

GAP = 2  # between two columns


def terminal() -> int:
    """Its columns, as COLUMNS or the terminal says; 80 where neither does."""
    return shutil.get_terminal_size((80, 24)).columns


def widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """Of every column, as wide as its widest cell."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def parts(wide: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """The columns of every part, each no wider than `width` where its cells allow; the first `keys` begin all."""
    found: list[list[int]] = [[*range(keys)]]
    for i in range(keys, len(wide)):
        if len(found[-1]) > keys and sum(wide[j] + GAP for j in found[-1]) + wide[i] > width:
            found.append([*range(keys)])
        found[-1].append(i)
    return found


def aligned(row: Sequence[str], wide: Sequence[int], part: Sequence[int], right: bool = False) -> str:
    """The cells of a part in a line; right: all but the first against their right edges."""
    shown = [row[i].rjust(wide[i]) if right and i else row[i].ljust(wide[i]) for i in part]
    return (" " * GAP).join(shown).rstrip()
