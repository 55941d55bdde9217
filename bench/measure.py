"""One workload: every peer built, compared with the exact run, and those that agree timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .agreement import distances, judge
from .deadline import Deadline, OutOfTime, time_limit
from .machine import settings
from .peers import Candidate, Peer, exact
from .record import Result, Status, Summary, Workload
from .timing import calls_per_sample, peak_memory, sample, synchronize

COMPILE_GUESS = {"cuda": 45.0, "cpu": 20.0}  # seconds, until a compilation has been timed
ROUNDS_SECONDS = {"cuda": 3.0, "cpu": 0.5}
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
UNTIMED: Status = "left out: no time left"


class DeviceLost(RuntimeError):
    """The device answers no more: an earlier kernel broke the process's CUDA context."""


class Measurement:
    """The measurement of one workload, readable at any moment: `workload()` is what has been measured so far."""

    def __init__(self, workload: Workload, peers: Mapping[str, Peer], device: torch.device) -> None:
        """Raises ValueError when `peers` has no "eager", which all others are compared with."""
        if "eager" not in peers:
            raise ValueError(f"peers: got {list(peers)}; 'eager' is needed, the others are compared with it")
        self._workload, self._device = workload, device
        self._peers = {"eager": peers["eager"], **peers}
        self._results = {name: Result(name, UNTIMED) for name in self._peers}
        self._samples: dict[str, list[float]] = {name: [] for name in self._peers}
        self._eager: dict[str, float] | None = None
        self._compiling = 0.0

    def run(self, deadline: Deadline, reserve: float, say: Callable[[str], None]) -> None:
        """Measure. A peer that compiles is begun only where `reserve` seconds will be left for all else.

        Raises OutOfTime at the deadline and DeviceLost; whatever interrupts, `workload()` keeps what was measured.
        """
        begin = time.monotonic()
        try:
            with time_limit(deadline.left()):
                self._time(self._compare(deadline, reserve, say), say)
        finally:
            deadline.note(self._workload.kind, time.monotonic() - begin - self._compiling)
            if self._compiling:
                torch.compiler.reset()
            gc.collect()

    def workload(self) -> Workload:
        """The workload with the results so far."""
        results = []
        for name, result in self._results.items():
            if self._samples[name] and result.status == UNTIMED:
                result = dataclasses.replace(result, status="ok", time=Summary.of(self._samples[name]))
            results.append(result)
        return dataclasses.replace(self._workload, results=tuple(results))

    def _compare(self, deadline: Deadline, reserve: float, say: Callable[[str], None]) -> dict[str, Candidate]:
        """The candidates whose numbers agree with the exact run."""
        say("exact run")
        truth: dict[str, Tensor] = {}
        with self._failures("eager"), settings(tf32=False, benchmark=False):
            truth = exact(self._workload, self._device).numbers()
        if not truth:
            self._give_up()
            return {}
        agreeing: dict[str, Candidate] = {}
        kind = f"compile {self._workload.kind}"
        for name, peer in self._peers.items():
            limit = deadline.left()
            if peer.compiles:
                limit -= reserve
                if limit < deadline.estimate(kind, COMPILE_GUESS[self._device.type]):
                    continue
            say(name)
            begin = time.monotonic()
            try:
                with time_limit(limit), self._failures(name):
                    candidate = self._first_call(name, peer, truth)
                    if candidate is not None:
                        agreeing[name] = candidate
            except OutOfTime:
                if not peer.compiles:
                    raise
            finally:
                if peer.compiles:
                    self._compiling += time.monotonic() - begin
                    deadline.note(kind, time.monotonic() - begin)
            if self._eager is None:
                self._give_up()
                break
        return agreeing

    def _give_up(self) -> None:
        """Without eager's numbers no other peer can be compared, and so none is timed."""
        others = (name for name in self._peers if name != "eager")
        self._results |= {name: Result(name, "failed", note="no eager to compare with") for name in others}

    def _first_call(self, name: str, peer: Peer, truth: Mapping[str, Tensor]) -> Candidate | None:
        """Build one peer, run it once, and give it back when its numbers agree with the exact run."""
        candidate = peer.make(self._workload, self._device)
        synchronize(self._device)
        begin = time.monotonic()
        numbers = candidate.numbers()
        synchronize(self._device)
        first_call = time.monotonic() - begin
        apart = distances(numbers, truth)
        verdict = judge(apart, apart if self._eager is None else self._eager)
        result = Result(name, UNTIMED, first_call=first_call, note=candidate.note())
        if math.isfinite(verdict.difference) and math.isfinite(verdict.tolerance):
            result = dataclasses.replace(result, difference=verdict.difference, tolerance=verdict.tolerance)
        if not verdict.agrees:
            why = f"{verdict.tensor} is off by {verdict.difference:.1e}, {verdict.tolerance:.1e} allowed"
            self._results[name] = dataclasses.replace(result, status="wrong", note=why)
            return None
        if name == "eager":
            self._eager = apart
        self._results[name] = result
        return candidate

    def _time(self, candidates: dict[str, Candidate], say: Callable[[str], None]) -> None:
        """Peak memory of each, then one sample of each in turn, so that a drift of the clock meets all alike."""
        say("timing")
        calls: dict[str, int] = {}
        for name, candidate in candidates.items():
            with self._failures(name):
                calls[name] = calls_per_sample(candidate.work, self._device)
                above = peak_memory(candidate.work, self._device)
                peak = None if above is None else candidate.standing + above
                self._results[name] = dataclasses.replace(self._results[name], peak_memory=peak)
        begin = time.monotonic()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.monotonic() - begin > ROUNDS_SECONDS[self._device.type]:
                break
            for name in calls:
                if self._results[name].status == UNTIMED:
                    with self._failures(name):
                        self._samples[name].append(sample(candidates[name].work, calls[name], self._device))

    @contextlib.contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Turn an error of one peer into its result, so that the others go on."""
        try:
            yield
        except torch.OutOfMemoryError:
            self._results[name] = Result(name, "out of memory")
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            self._results[name] = Result(name, "failed", note=f"{type(error).__name__}: {first_line}")
        else:
            return
        gc.collect()
        try:
            synchronize(self._device)
        except RuntimeError as error:
            raise DeviceLost(f"the GPU answers no more after {name} on {self._workload}") from error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
