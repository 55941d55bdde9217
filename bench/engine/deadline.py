"""A run's time: how much is left, how long each kind of step took, and a limit that stops a step."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

REPEAT = 0.5  # seconds between the signals after a limit: a `__del__` or a library can swallow the exception of one


class OutOfTime(BaseException):
    """Raised inside a step that exceeds its limit. Like KeyboardInterrupt, it passes through `except Exception`."""


class Deadline:
    """The end of a run's time and the durations of its steps, so that no step starts that will not finish."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self.seconds = seconds
        self._took: dict[str, dict[int, float]] = {}  # seconds by kind and size

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - self.elapsed()

    def note(self, kind: str, seconds: float, size: int = 0) -> None:
        """Remember that a step of this `kind` and `size` took `seconds`; math.inf if it did not end."""
        took = self._took.setdefault(kind, {})
        took[size] = max(took.get(size, 0.0), seconds)

    def estimate(self, kind: str, first_guess: float, size: int = 0) -> float:
        """Seconds that a step of this `kind` takes: the longest of those that were not larger.

        Before the first of them, the shortest of the larger ones, or `first_guess` if it is less or there is none.
        """
        took = self._took.get(kind, {})
        not_larger = [seconds for known, seconds in took.items() if known <= size]
        return max(not_larger) if not_larger else min([first_guess, *took.values()])


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after `seconds`. For the main thread; an enclosing limit still applies.

    The exception is raised again every REPEAT seconds until it reaches the block's end, except while it unwinds: what
    `finally` restores is restored.
    """

    def stop(signal_number: int, frame: FrameType | None) -> None:
        if not isinstance(sys.exc_info()[1], OutOfTime):
            raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    enclosing = signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT)[0]
    if 0 < enclosing < seconds:
        signal.setitimer(signal.ITIMER_REAL, enclosing, REPEAT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if enclosing > 0:
            signal.setitimer(signal.ITIMER_REAL, max(enclosing - (time.monotonic() - begin), 1e-6), REPEAT)
