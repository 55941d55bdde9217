"""A run's time: how much is left, how long each kind of step took, and a limit that stops a step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType


class OutOfTime(BaseException):
    """Raised inside a step that exceeds its limit. Like KeyboardInterrupt, it passes through `except Exception`."""


class Deadline:
    """The end of a run's time and the durations of its steps, so that no step starts that will not finish."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self.seconds = seconds
        self._longest: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begin

    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - self.elapsed()

    def note(self, kind: str, seconds: float) -> None:
        """Remember that a step of this `kind` took `seconds` or was stopped after them."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    def estimate(self, kind: str, first_guess: float) -> float:
        """Seconds that a step of this `kind` takes: the longest so far, or `first_guess` before the first."""
        return self._longest.get(kind, first_guess)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after `seconds`. For the main thread; an enclosing limit still applies."""

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
