"""One workload: every peer built, compared with the exact run, and those that agree timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..baselines.suite import EAGER, FASTENC, Candidate, Contest, Peer
from ..console import Progress
from .agreement import distances, judge
from .deadline import Deadline, OutOfTime, time_limit
from .machine import settings
from .memory import held_bytes, peak_bytes
from .record import NOT_REACHED, Result, Workload
from .summary import Ratio, Summary
from .timing import calls_per_sample, sample, synchronize

COMPILE_GUESS = {"cuda": 45.0, "cpu": 20.0}  # seconds, until a compilation of a peer has been timed
MOST_COMPILING = 0.2  # of the whole time, for one compilation: max-autotune of 3-D convolutions may take minutes
ROUNDS_SECONDS = {"cuda": 3.0, "cpu": 1.0}
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SURE_ROUNDS, SURE_SECONDS = 8, 30.0  # from 8 on an outlier is outside a ratio's interval: worth so many seconds
COMPILING, PREPARING, TIMING = 8.0, 1.0, 2.0  # shares of the work of one peer, for the progress bar
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class DeviceLost(RuntimeError):
    """The device answers no more: an earlier kernel broke the process's CUDA context."""


class Measurement:
    """The measurement of one workload, readable at any moment: `workload()` is what has been measured so far."""

    def __init__(
        self, workload: Workload, contest: Contest, device: torch.device, only: Collection[str] | None = None
    ) -> None:
        """only: names of the peers to run beside eager, by default all.

        Raises ValueError when the contest has no "eager", which all others are compared with.
        """
        if EAGER not in contest.peers:
            raise ValueError(f"peers: got {list(contest.peers)}; 'eager' is needed, the others are compared with it")
        cost = contest.cost(workload)
        if cost is not None:
            workload = dataclasses.replace(workload, flops=cost.flops, least_bytes=cost.bytes)
        self._workload = workload
        self._contest, self._device = contest, device
        names = [EAGER, *(name for name in contest.peers if name != EAGER and (only is None or name in only))]
        self._peers: dict[str, Peer] = {}
        self._results: dict[str, Result] = {}
        for name in names:
            reason = contest.peers[name].absent(workload, device)
            if reason is None:
                self._peers[name] = contest.peers[name]
                self._results[name] = Result(name, "left out", note=NOT_REACHED)
            else:
                self._results[name] = Result(name, "not here", note=reason)
        self._samples: dict[str, list[float]] = {name: [] for name in names}
        self._again: list[float] = []  # a second sample of the same peer in every round: the noise floor
        self._eager: dict[str, float] | None = None
        self._pools: dict[str, int] = {}
        self._compiling = 0.0

    @property
    def units(self) -> float:
        """How much `run` advances a progress bar by."""
        return sum(_units(peer) + TIMING for peer in self._peers.values())

    def run(self, deadline: Deadline, reserve: float, progress: Progress) -> None:
        """Measure. A peer that compiles is begun only where `reserve` seconds will be left for all else.

        Raises OutOfTime at the deadline and DeviceLost; whatever interrupts, `workload()` keeps what was measured.
        """
        if not self._peers:
            return
        begin = time.monotonic()
        try:
            with time_limit(deadline.left()):
                self._time(self._compare(deadline, reserve, progress), progress)
        finally:
            deadline.note(self._workload.kind, time.monotonic() - begin - self._compiling)
            if self._compiling:
                torch.compiler.reset()
            gc.collect()

    def workload(self) -> Workload:
        """The workload with the results so far."""
        results = []
        twin = FASTENC if self._samples.get(FASTENC) else EAGER
        for name, result in self._results.items():
            samples = self._samples[name]
            if samples and result.status == "left out":
                result = dataclasses.replace(result, status="ok", time=Summary.of(samples))
                if name != EAGER and self._samples[EAGER]:
                    result = dataclasses.replace(result, over_eager=Ratio.of(self._samples[EAGER], samples))
                if name != FASTENC and twin == FASTENC:
                    result = dataclasses.replace(result, over_fastenc=Ratio.of(samples, self._samples[FASTENC]))
            results.append(result)
        noise = Ratio.of(self._again, self._samples[twin]).off_one if self._again else None
        return dataclasses.replace(self._workload, noise=noise, results=tuple(results))

    def _compare(self, deadline: Deadline, reserve: float, progress: Progress) -> dict[str, Candidate]:
        """The candidates whose numbers agree with the exact run."""
        progress.say(str(self._workload), "exact run")
        truth: dict[str, Tensor] = {}
        subject = None
        with self._failures(EAGER):
            subject = self._contest.subject(self._workload, self._device)
            with settings(tf32=False, benchmark=False):
                truth = self._contest.exact(subject).numbers()
        if not truth:
            self._give_up()
            return {}
        agreeing: dict[str, Candidate] = {}
        guess = COMPILE_GUESS[self._device.type]
        most = max(deadline.share(MOST_COMPILING), 2 * guess)
        for name, peer in self._peers.items():
            limit, kind = deadline.left(), f"compile {self._workload.kind}, {name}"
            if peer.compiles:
                limit = min(limit - reserve, most)
                if limit < deadline.estimate(kind, guess):
                    self._results[name] = Result(name, "left out", note="no time left to compile")
                    continue
            progress.say(str(self._workload), f"{name}{', compiling' if peer.compiles else ''}")
            begin = time.monotonic()
            try:
                with time_limit(limit), self._failures(name):
                    candidate = self._first_call(name, peer, subject, truth)
                    if candidate is not None:
                        agreeing[name] = candidate
            except OutOfTime:
                if not peer.compiles:
                    raise
                self._results[name] = Result(name, "left out", note="no time left to compile")
                deadline.note(kind, math.inf)  # another workload's would be no faster: it is not tried again
            finally:
                if peer.compiles:
                    self._compiling += time.monotonic() - begin
                    deadline.note(kind, time.monotonic() - begin)
            progress.advance(_units(peer))
            if self._eager is None:
                self._give_up()
                break
        return agreeing

    def _give_up(self) -> None:
        """Without eager's numbers no other peer can be compared, and so none is timed."""
        for name in self._peers:
            if name != EAGER:
                self._results[name] = Result(name, "failed", note="no eager to compare with")

    def _first_call(self, name: str, peer: Peer, subject: Any, truth: Mapping[str, Tensor]) -> Candidate | None:
        """Build one peer, run it once, and give it back when its numbers agree with the exact run."""
        graphs = peer.graphs and self._device.type == "cuda"
        reserved = self._reserved() if graphs else 0
        candidate = peer.make(subject)
        synchronize(self._device)
        begin = time.monotonic()
        with self._whole_gradients():
            numbers = candidate.numbers()
        synchronize(self._device)
        first_call = time.monotonic() - begin
        apart = distances(numbers, truth)
        del numbers
        verdict = judge(apart, apart if self._eager is None else self._eager)
        result = Result(name, "left out", first_call=first_call, note=candidate.note())
        if math.isfinite(verdict.difference) and math.isfinite(verdict.tolerance):
            result = dataclasses.replace(result, difference=verdict.difference, tolerance=verdict.tolerance)
        if not verdict.agrees:
            why = f"{verdict.tensor} is off by {verdict.difference:.1e}, {verdict.tolerance:.1e} allowed"
            self._results[name] = dataclasses.replace(result, status="wrong", note=why)
            return None
        if name == EAGER:
            self._eager = apart
        self._results[name] = result
        if graphs:
            for _ in range(3):  # graphs are captured by the second call or the third
                candidate.numbers()
            self._pools[name] = self._reserved() - reserved
        return candidate

    @contextlib.contextmanager
    def _whole_gradients(self) -> Iterator[None]:
        """On a CPU, compare in bfloat16 without oneDNN.

        On CPUs with avx512_bf16 the oneDNN of torch 2.13 leaves weight gradients of small maps unwritten.
        """
        spared = self._device.type == "cpu" and self._workload.precision.startswith("bfloat16")
        onednn = torch.backends.mkldnn
        enabled = bool(onednn.enabled)
        onednn.enabled = enabled and not spared  # type: ignore[assignment]
        try:
            yield
        finally:
            onednn.enabled = enabled  # type: ignore[assignment]

    def _reserved(self) -> int:
        """Bytes that the CUDA allocator cannot give back: what is in use, and the pools of CUDA graphs."""
        gc.collect()
        synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def _time(self, candidates: dict[str, Candidate], progress: Progress) -> None:
        """Peak memory of each, then one sample of each in turn, so that a drift of the clock meets all alike.

        Every other round runs backwards; fastenc, or eager where it is missing, has a second sample at the other end.
        """
        calls: dict[str, int] = {}
        for name, candidate in candidates.items():
            progress.say(str(self._workload), f"{name}, warming up")
            work = candidate.work
            with self._failures(name):
                calls[name] = calls_per_sample(work, self._device)
                above = peak_bytes(lambda work=work: work.call(*work.prepare()), self._device)  # type: ignore[misc]
                peak = held_bytes(candidate.held()) + above + self._pools.get(name, 0)
                self._results[name] = dataclasses.replace(self._results[name], peak_memory=peak)
            progress.advance(TIMING / 2)
        progress.say(str(self._workload), f"timing {len(calls)} peers in turn")
        self._rounds(candidates, calls, progress)

    def _rounds(self, candidates: Mapping[str, Candidate], calls: Mapping[str, int], progress: Progress) -> None:
        twin = FASTENC if FASTENC in calls else EAGER
        turns = [(name, self._samples[name]) for name in calls if name != twin]
        if twin in calls:
            turns = [(twin, self._samples[twin]), *turns, (twin, self._again)]
        begin, enough, told = time.monotonic(), ROUNDS_SECONDS[self._device.type], 0.0
        for done in range(MOST_ROUNDS):
            spent = time.monotonic() - begin
            least = SURE_ROUNDS if spent < SURE_SECONDS else LEAST_ROUNDS
            share = max(told, min(done / least, spent / enough if enough else 1.0, 1.0))
            progress.advance((share - told) * len(calls) * TIMING / 2)
            told = share
            if share == 1:
                break
            for name, samples in turns if done % 2 == 0 else reversed(turns):
                if self._results[name].status == "left out":
                    with self._failures(name):
                        samples.append(sample(candidates[name].work, calls[name], self._device))

    @contextlib.contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Turn an error of one peer into its result, so that the others go on."""
        try:
            yield
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or CPU_OUT_OF_MEMORY in str(error):
                self._results[name] = Result(name, "out of memory")
            else:
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


def _units(peer: Peer) -> float:
    return COMPILING if peer.compiles else PREPARING
