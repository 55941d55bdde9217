"""Time that is shared out: how much is left, what a step has cost so far, and a limit that stops one that overruns."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType


class OutOfTime(BaseException):
    """Raised inside a step that overran its limit. No `except Exception` on the way holds it, as with Ctrl-C."""


class Deadline:
    """A point in time, and what each kind of step took, so that the next one is begun only where it will fit."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._seconds = seconds
        self._longest: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds to the deadline, negative after it."""
        return self._seconds - self.elapsed()

    def share(self, part: float) -> float:
        """Seconds that are a `part` of the whole time."""
        return part * self._seconds

    def note(self, kind: str, seconds: float) -> None:
        """Remember that a step of this `kind` took, or was stopped after, so many seconds."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    def estimate(self, kind: str, first_guess: float) -> float:
        """Seconds that a step of this `kind` takes: the longest noted, or `first_guess` before any was."""
        return self._longest.get(kind, first_guess)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block once `seconds` are over. Main thread only; an enclosing limit stays in force."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    enclosing = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    if 0 < enclosing < seconds:
        signal.setitimer(signal.ITIMER_REAL, enclosing)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if enclosing > 0:
            signal.setitimer(signal.ITIMER_REAL, max(enclosing - (time.monotonic() - begin), 1e-6))
