"""The tables and the progress of every command.

rich draws the progress bar. Tables are plain text, and so is progress when stderr is not a terminal: a log cannot hold
a bar, and `bench gpu` must also run on machines without rich.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any

GAP = 2  # spaces between two columns
LINE_SECONDS = 20.0  # a log gets a line at least this often, as long as there is something to say

Row = Sequence[str]


def width() -> int:
    """The terminal's width in columns; 80 if neither the terminal nor COLUMNS says."""
    return shutil.get_terminal_size((80, 24)).columns


def wrapped(text: str) -> str:
    """`text` in lines that fit in the terminal."""
    return "\n".join(textwrap.wrap(text, width()))


def parts(wide: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Split columns of these widths into tables that fit in `width`, if their widest cells allow it.

    Returns the column numbers of each table. Each begins with the first `keys` columns.
    """
    found = [[*range(keys)]]
    for i in range(keys, len(wide)):
        if len(found[-1]) > keys and sum(wide[j] + GAP for j in found[-1]) + wide[i] > width:
            found.append([*range(keys)])
        found[-1].append(i)
    return found


def tables(headings: Row, groups: Iterable[Iterable[Row]], keys: int = 1) -> list[str]:
    """Each group of rows as text that fits in the terminal, split into several tables if necessary.

    Args:
        headings: one for each column.
        groups: rows with a cell for each column. A column is as wide in one group as in another, and is left out if all
            its cells are empty.
        keys: the number of columns that identify a row. They are aligned left, and all others right.
    """
    grouped = [list(group) for group in groups]
    rows = [row for group in grouped for row in group]
    shown = [i for i in range(len(headings)) if i < keys or any(row[i] for row in rows)]
    wide = [max(len(row[i]) for row in (headings, *rows)) for i in shown]

    def table(group: list[Row], part: list[int]) -> str:
        lines = (
            [row[shown[j]].ljust(wide[j]) if j < keys else row[shown[j]].rjust(wide[j]) for j in part]
            for row in (headings, *group)
        )
        return "\n".join((" " * GAP).join(line).rstrip() for line in lines)

    return ["\n\n".join(table(group, part) for part in parts(wide, keys, width())) for group in grouped]


class Progress:
    """Shows on stderr what a command is doing and how much time is left, inside a `with` block.

    total: the sum of all amounts that `advance` will get, in any unit; with seconds the bar moves steadily.
    """

    def __init__(self, total: float) -> None:
        self._total, self._done, self._said = total, 0.0, -math.inf
        self._begin, self._last = time.monotonic(), ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            columns = (BarColumn(16), *times, TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, what: str, step: str = "") -> None:
        """Show what is being done and which step of it. A `what` with steps stays visible above the bar."""
        if self._bar is not None:
            if step and what != self._last:
                self._bar.console.print(what, markup=False, highlight=False)
            self._bar.update(self._task, description=step or what)
            self._last = what
            return
        elapsed = time.monotonic() - self._begin
        if what != self._last or elapsed - self._said >= LINE_SECONDS:
            self._last, self._said = what, elapsed
            left = f", about {elapsed / self._done * (self._total - self._done):.0f} s left" if self._done else ""
            print(f"[{elapsed:4.0f} s{left}] {what}{f': {step}' if step else ''}", file=sys.stderr, flush=True)

    def row(self, text: str) -> None:
        """Print a result as soon as it is known."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(f"[{time.monotonic() - self._begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    def share(self) -> str:
        """How much is done, such as "3 of 8"."""
        return f"{self._done:.0f} of {self._total:.0f}"

    def advance(self, amount: float) -> None:
        """Count `amount` more of the total as done."""
        self._done = min(self._total, self._done + amount)
        if self._bar is not None:
            self._bar.advance(self._task, amount)
