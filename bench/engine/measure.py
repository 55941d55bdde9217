"""The measurement of one workload: build each baseline, compare it with the exact run, time those that agree."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..arguments import first_line
from ..baselines.suite import EAGER, FASTENC, Baseline, Runner, Suite
from ..console import Progress
from .agreement import distances, judge
from .deadline import Deadline, OutOfTime, time_limit
from .machine import settings
from .memory import held_bytes, peak_bytes
from .record import NOT_REACHED, Result, Workload
from .summary import Ratio, Summary
from .timing import calls_per_sample, sample, synchronize

# Seconds of a workload without its compilations, before the first was timed.
FIRST_GUESS = {
    "network": 12.0, "client": 20.0, "instance_norm_prelu": 4.0, "instance_norm_add_prelu": 4.0, "stem": 3.0,
}  # fmt: skip
COMPILE_GUESS = {"cuda": 45.0, "cpu": 20.0}  # seconds of a network's compilation, before the first was timed
OPERATION_SHARE = 1 / 3  # of these seconds for an operation
MOST_COMPILING = 0.2  # largest share of the time for one compilation; max-autotune of 3-D convolutions takes minutes
ROUNDS_SECONDS = {"cuda": 3.0, "cpu": 1.0}
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
SURE_ROUNDS, SURE_SECONDS = 8, 30.0  # 8 rounds keep one outlier out of a ratio's interval, worth up to 30 s
COMPILING, PREPARING, TIMING = 8.0, 1.0, 2.0  # lengths on the progress bar
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class DeviceLost(RuntimeError):
    """The GPU no longer responds: an earlier kernel broke the process's CUDA context."""


class Measurement:
    """The measurement of one workload. `workload()` returns the results so far, at any time."""

    def __init__(
        self, workload: Workload, suite: Suite, device: torch.device, only: Collection[str] | None = None
    ) -> None:
        """Measure `workload` with the baselines of `suite` named in `only` (None: all), and with eager.

        Baselines that the workload has a time of are measured to compare the others with.

        Raises ValueError if the suite has no "eager" to compare with.
        """
        if EAGER not in suite.baselines:
            raise ValueError(f"baselines: 'eager' is needed to compare with, got {list(suite.baselines)}")
        cost = suite.cost(workload) if workload.flops is None else None
        if cost is not None:
            workload = dataclasses.replace(workload, flops=cost.flops, least_bytes=cost.bytes)
        self._workload = workload
        self._suite, self._device = suite, device
        names = [EAGER, *(name for name in suite.baselines if name != EAGER and (only is None or name in only))]
        known = {result.peer for result in workload.results if result.time is not None}
        self._baselines: dict[str, Baseline] = {}
        self._results: dict[str, Result] = {}
        for name in names:
            reason = suite.baselines[name].absent(workload, device)
            if reason is None:
                self._baselines[name] = suite.baselines[name]
                self._results[name] = Result(name, "left out", note=NOT_REACHED)
            else:
                self._results[name] = Result(name, "not here", note=reason)
        self._new = [name for name in self._baselines if name not in known]
        self._samples: dict[str, list[float]] = {name: [] for name in names}
        self._again: list[float] = []  # second samples of one baseline in every round, which show the noise
        self._eager: dict[str, float] | None = None
        self._pools: dict[str, int] = {}
        self._begin = self._compiling = 0.0

    @property
    def total(self) -> float:
        """The amount by which `run` advances a progress bar."""
        return sum(_preparation(baseline) + TIMING for baseline in self._baselines.values())

    def run(self, deadline: Deadline, reserve: float, progress: Progress) -> None:
        """Measure. A compilation is not started if it would leave less than `reserve` seconds for other workloads.

        Raises OutOfTime at the deadline, and DeviceLost. Results from before an exception are kept.
        """
        self._begin = time.monotonic()
        new = [(name, self._baselines[name].compiles) for name in self._new]
        if all(compiles and self._compiling_seconds(name, deadline, reserve) is None for name, compiles in new):
            return
        try:
            with time_limit(deadline.left()):
                self._time(self._compare(deadline, reserve, progress), progress)
        finally:
            deadline.note(self._workload.kind, self._spent())
            if self._compiling:
                torch.compiler.reset()
            gc.collect()

    def reserve(self, deadline: Deadline) -> float:
        """The seconds that a compilation of another workload leaves for this one: for all but its own compilations."""
        waits = any(not self._baselines[name].compiles for name in self._new)
        return self._seconds(deadline) if waits else 0.0

    def _seconds(self, deadline: Deadline) -> float:
        """The estimated seconds of `run` without compilations."""
        return deadline.estimate(self._workload.kind, FIRST_GUESS[self._workload.kind])

    def _spent(self) -> float:
        """The seconds of `run` so far, without compilations."""
        return time.monotonic() - self._begin - self._compiling

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

    def _compare(self, deadline: Deadline, reserve: float, progress: Progress) -> dict[str, Runner]:
        """The runners whose numbers agree with the exact run, by name."""
        progress.say(str(self._workload), "exact run")
        truth: dict[str, Tensor] = {}
        inputs = None
        with self._failures(EAGER):
            inputs = self._suite.inputs(self._workload, self._device)
            with settings(tf32=False, benchmark=False):
                truth = self._suite.exact(inputs).numbers()
        if not truth:
            self._give_up()
            return {}
        agreeing: dict[str, Runner] = {}
        for name, baseline in self._baselines.items():
            limit: float | None = deadline.left()
            if baseline.compiles:
                limit = self._compiling_seconds(name, deadline, reserve)
            if limit is None:
                self._results[name] = Result(name, "left out", note="no time left to compile")
                continue
            progress.say(str(self._workload), f"{name}{', compiling' if baseline.compiles else ''}")
            begin = time.monotonic()
            try:
                with time_limit(limit), self._failures(name):
                    runner = self._first_call(name, baseline, inputs, truth)
                    if runner is not None:
                        agreeing[name] = runner
            except OutOfTime:
                if not baseline.compiles:
                    raise
                self._results[name] = Result(name, "left out", note="no time left to compile")
                deadline.note(*self._compilation(name, math.inf))  # a larger one would not be faster
            finally:
                if baseline.compiles:
                    self._compiling += time.monotonic() - begin
                    deadline.note(*self._compilation(name, time.monotonic() - begin))
            progress.advance(_preparation(baseline))
            if self._eager is None:
                self._give_up()
                break
        return agreeing

    def _compilation(self, name: str, seconds: float) -> tuple[str, float, int]:
        """The arguments of `Deadline.note` and `Deadline.estimate` for the compilation of a baseline."""
        return f"compile {self._workload.kind}, {self._workload.mode}, {name}", seconds, prod(self._workload.shape)

    def _compiling_seconds(self, name: str, deadline: Deadline, reserve: float) -> float | None:
        """The seconds that the compilation of a baseline may take; None if it would take more."""
        guess = COMPILE_GUESS[self._device.type]
        most = max(MOST_COMPILING * deadline.seconds, 2 * guess)
        guess *= 1.0 if self._workload.kind in ("network", "client") else OPERATION_SHARE
        timing = max(self._seconds(deadline) - self._spent(), ROUNDS_SECONDS[self._device.type])
        limit = min(deadline.left() - reserve - timing, most)
        return limit if limit >= deadline.estimate(*self._compilation(name, guess)) else None

    def _give_up(self) -> None:
        """Mark all other baselines as failed: without eager's numbers they cannot be compared."""
        for name in self._baselines:
            if name != EAGER:
                self._results[name] = Result(name, "failed", note="eager failed, so there is nothing to compare with")

    def _first_call(self, name: str, baseline: Baseline, inputs: Any, truth: Mapping[str, Tensor]) -> Runner | None:
        """Build and run one baseline. Returns its runner if the numbers agree with the exact run, else None."""
        graphs = baseline.graphs and self._device.type == "cuda"
        reserved = self._reserved() if graphs else 0
        runner = baseline.make(inputs)
        synchronize(self._device)
        begin = time.monotonic()
        # With avx512_bf16, the oneDNN of torch 2.13 leaves weight gradients of small maps unwritten in bfloat16.
        spared = self._device.type == "cpu" and self._workload.precision.startswith("bfloat16")
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if spared else contextlib.nullcontext():
            numbers = runner.numbers()
        synchronize(self._device)
        first_call = time.monotonic() - begin
        apart = distances(numbers, truth)
        del numbers
        verdict = judge(apart, apart if self._eager is None else self._eager)
        result = Result(name, "left out", first_call=first_call, note=runner.note())
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
            for _ in range(3):  # graphs are captured in the second or third call
                runner.numbers()
            self._pools[name] = self._reserved() - reserved
        return runner

    def _reserved(self) -> int:
        """Bytes that the CUDA allocator cannot release: memory in use and the pools of CUDA graphs."""
        gc.collect()
        synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def _time(self, runners: dict[str, Runner], progress: Progress) -> None:
        """Measure peak memory, then take one sample of each baseline per round, so that clock drift affects all alike.

        Every second round runs in reverse. fastenc (or eager without fastenc) is sampled at both ends of a round.
        """
        calls: dict[str, int] = {}
        for name, runner in runners.items():
            progress.say(str(self._workload), f"{name}, warming up")
            work = runner.work
            with self._failures(name):
                calls[name] = calls_per_sample(work, self._device)
                above = peak_bytes(lambda work=work: work.call(*work.prepare()), self._device)  # type: ignore[misc]
                peak = held_bytes(runner.held()) + above + self._pools.get(name, 0)
                self._results[name] = dataclasses.replace(self._results[name], peak_memory=peak)
            progress.advance(TIMING / 2)
        progress.say(str(self._workload), f"timing {len(calls)} baselines")
        self._rounds(runners, calls, progress)

    def _rounds(self, runners: Mapping[str, Runner], calls: Mapping[str, int], progress: Progress) -> None:
        twin = FASTENC if FASTENC in calls else EAGER
        turns = [(name, self._samples[name]) for name in calls if name != twin]
        if twin in calls:
            turns = [(twin, self._samples[twin]), *turns, (twin, self._again)]
        begin = time.monotonic()
        for done in range(MOST_ROUNDS):
            spent = time.monotonic() - begin
            least = SURE_ROUNDS if spent < SURE_SECONDS else LEAST_ROUNDS
            if done >= least and spent >= ROUNDS_SECONDS[self._device.type]:
                break
            for name, samples in turns if done % 2 == 0 else reversed(turns):
                if self._results[name].status == "left out":
                    with self._failures(name):
                        samples.append(sample(runners[name].work, calls[name], self._device))
        progress.advance(len(calls) * TIMING / 2)

    @contextlib.contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Turn an error of one baseline into its result, so that the others still run."""
        try:
            yield
        except Exception as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or CPU_OUT_OF_MEMORY in str(error):
                self._results[name] = Result(name, "out of memory")
            else:
                self._results[name] = Result(name, "failed", note=f"{type(error).__name__}: {first_line(error)}")
        else:
            return
        gc.collect()
        try:
            synchronize(self._device)
        except RuntimeError as error:
            raise DeviceLost(f"the GPU no longer responds after {name} on {self._workload}") from error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _preparation(baseline: Baseline) -> float:
    return COMPILING if baseline.compiles else PREPARING
