"""Progress on a terminal's stderr: a bar with the time left by rich, plain lines where rich is missing."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any

EVERY = 20.0  # seconds after which a step of the same is worth a line


class Progress:
    """What a command is doing and how much of it is left, while the block runs.

    total: the sum of what `advance` will be given, in any unit; about seconds makes for a steady bar. Where stderr is
    no terminal there are plain lines: what a log should hold.
    """

    def __init__(self, total: float) -> None:
        self._total, self._done, self._said = total, 0.0, -math.inf
        self._begin = time.monotonic()
        self._last = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                pass
            else:
                times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
                columns = (BarColumn(16), *times, TextColumn("{task.description}", markup=False))
                self._bar = Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600)
                self._task = self._bar.add_task("", total=self._total)
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, what: str, step: str = "") -> None:
        """Show what is being done now, and which step of it; what has steps stays on the screen, or in the log."""
        if self._bar is not None:
            if step and what != self._last:
                self._bar.console.print(what, markup=False, highlight=False)
            self._bar.update(self._task, description=step or what)
            self._last = what
            return
        elapsed = time.monotonic() - self._begin
        if what != self._last or elapsed - self._said >= EVERY:
            self._last, self._said = what, elapsed
            left = f", about {elapsed / self._done * (self._total - self._done):.0f} s left" if self._done else ""
            print(f"[{elapsed:4.0f} s{left}] {what}{f': {step}' if step else ''}", file=sys.stderr, flush=True)

    def share(self) -> str:
        """How much is done, in words."""
        return f"{self._done:.0f} of {self._total:.0f}"

    def advance(self, amount: float) -> None:
        """So much more of the total is done."""
        self._done = min(self._total, self._done + amount)
        if self._bar is not None:
            self._bar.advance(self._task, amount)
