"""A run of `gpu`, `compare`, `ops` or `clients`: workloads in stages, a record that is always complete, a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..baselines.registry import suite_of
from ..baselines.suite import FASTENC, Baseline
from ..console import Progress, wrapped
from . import floor
from .deadline import Deadline, OutOfTime, time_limit
from .machine import commit, condition, copy_bandwidth, describe, matmul_rates, source
from .measure import DeviceLost, Measurement
from .record import GpuTests, MatmulRate, Record, Settings, Workload, load, write
from .table import LEGEND, brief, heading, milliseconds, text

CEILINGS, TESTS = 3.0, 20.0  # lengths on the progress bar

Tests = Callable[[Deadline], GpuTests]
Stage = Callable[[Workload, str, Baseline], int]
LAST = 99  # the stage that only a resumed run enters


class Session:
    """One run. It writes its record into `out` and updates it after every workload."""

    def __init__(
        self,
        command: str,
        out: Path,
        device: torch.device,
        shared: Settings,
        workloads: Sequence[Workload],
        deadline: Deadline,
        *,
        only: Collection[str] | None = None,
        tests: Tests | None = None,
        resume: bool = False,
        stage: Stage = lambda workload, name, baseline: 0,
    ) -> None:
        """
        Args:
            shared: the settings in force, for the record.
            only: the names of the baselines to run; None for all.
            tests: tests to run after stage 0.
            resume: continue an unfinished record in `out` with the same command, machine, settings and source files.
                Finished results are kept.
            stage: the stage in which a workload's baseline runs, from 0. Only a resumed run enters stage LAST. Each
                stage measures eager and fastenc again, because a ratio needs times from the same rounds.
        """
        now = datetime.now(timezone.utc)
        head, dirty = commit()
        self._device, self._deadline, self._tests = device, deadline, tests
        self.record = Record(
            command=command,
            date=now.isoformat(timespec="seconds"),
            commit=head,
            dirty=dirty,
            source=source(),
            machine=describe(device),
            settings=shared,
            tests=GpuTests("not run"),
            workloads=(),
            complete=False,
        )
        self.path = out / f"{self.record.machine.slug}-{command.split()[4]}-{now:%Y%m%dT%H%M%SZ}.json"
        fresh = {each: Measurement(each, suite_of(each), device, only).workload() for each in workloads}
        earlier = unfinished(out, self.record) if resume else None
        if earlier is not None:
            self.path, found = earlier
            self.record = dataclasses.replace(found, complete=False, note="")
            known = {bare(each): each for each in found.workloads}
            fresh = {each: merged(known.get(each, new), new) for each, new in fresh.items()}
        self._resumes = earlier is not None
        self._spent = self.record.seconds
        self._workloads = fresh
        self._stage = stage

    def run(self) -> int:
        """Run the stages, tests and ceilings, then print the table, also when stopped. Returns the exit status."""
        status, note = 0, ""
        stages = self._stages()
        total = 2 * CEILINGS + sum(each.total for _, stage in stages for each in stage)
        with Progress(total + (TESTS if self._tests is not None else 0)) as progress:
            try:
                if self._resumes:
                    progress.say(self._resumed())
                self._measure(stages, progress)
            except OutOfTime:
                note = "stopped at its deadline"
            except DeviceLost as lost:
                status, note = 1, f"stopped: {lost}"
            except KeyboardInterrupt:
                status, note = 130, "stopped by Ctrl-C"
        self._save(complete=not note, note=note, after=condition(self._device))
        print(heading(self.record), text(self.record), wrapped(LEGEND), sep="\n\n")
        if len(self._workloads) > 1:
            print(brief(self.record))
        print(f"record: {self.path}", flush=True)
        return status or int(self._faulty())

    def _resumed(self) -> str:
        """What this run resumes from."""
        here = [[each for each in one.results if each.status != "not here"] for one in self._workloads.values()]
        done = [sum(result.status != "left out" for result in results) for results in here]
        finished = sum(count == len(results) for count, results in zip(done, here, strict=True))
        return (
            f"resuming {self.path.name}: {finished} of {len(here)} workloads are finished, and {sum(done)} of "
            f"{sum(map(len, here))} results; tests/gpu {self.record.tests.status}"
        )

    def _stages(self) -> list[tuple[int, list[Measurement]]]:
        """Each stage and its measurements: the results that are left out, with eager and fastenc."""
        stages: dict[int, list[Measurement]] = {}
        for asked, workload in self._workloads.items():
            suite, names = suite_of(asked), dict[int, list[str]]()
            for result in workload.results:
                stage = self._stage(asked, result.peer, suite.baselines[result.peer])
                if result.status == "left out" and (stage != LAST or self._resumes):
                    names.setdefault(stage, [FASTENC] if workload.timed(FASTENC) else []).append(result.peer)
            for stage, only in names.items():
                stages.setdefault(stage, []).append(Measurement(workload, suite, self._device, only))
        return sorted(stages.items())

    def _measure(self, stages: Sequence[tuple[int, Sequence[Measurement]]], progress: Progress) -> None:
        self._measure_ceilings(progress)
        self._save(before=self.record.before or condition(self._device))
        for number, stage in stages:
            if number > 0:
                self._run_tests(progress)
            try:
                self._run(stage, progress)
            except DeviceLost:
                self._run_tests(progress)  # in other processes, they may say which kernel it was
                raise
        self._run_tests(progress)
        if self._deadline.left() > 2 * self._deadline.estimate("ceilings", 0.0):
            self._measure_ceilings(progress)

    def _run_tests(self, progress: Progress) -> None:
        """Run the tests, unless this run or the resumed one has run them."""
        tests, self._tests = self._tests, None
        if tests is not None and self.record.tests.status not in ("passed", "failed"):
            progress.say("tests/gpu")
            torch.cuda.empty_cache()
            self._save(tests=tests(self._deadline))
            progress.advance(TESTS)

    def _run(self, stage: Sequence[Measurement], progress: Progress) -> None:
        """Measure one stage. Compilations leave time for the stage's other workloads."""
        for i, measurement in enumerate(stage):
            reserve = sum(each.reserve(self._deadline) for each in stage[i + 1 :])
            try:
                measurement.run(self._deadline, reserve, progress)
            finally:
                found = measurement.workload()
                self._workloads[bare(found)] = merged(self._workloads[bare(found)], found)
                self._save()
                if any(each.status not in ("left out", "not here") for each in found.results):
                    progress.row(row(found))

    def _measure_ceilings(self, progress: Progress) -> None:
        """Measure the ceilings. Done before and after the workloads, because the better result counts."""
        progress.say("copy bandwidth and matrix rates")
        begin = self._deadline.elapsed()
        dtypes = {each.dtype for each in self._workloads.values() if each.flops}
        with time_limit(self._deadline.left()):
            bandwidth, found = copy_bandwidth(self._device), matmul_rates(dtypes, self._device)
        known = self.record.machine
        rates = tuple(MatmulRate(each.dtype, max(each.rate, known.matmul_rate(each.dtype) or 0.0)) for each in found)
        bandwidth = max(bandwidth, known.copy_bandwidth or 0.0)
        self._save(machine=dataclasses.replace(known, copy_bandwidth=bandwidth, matmul_rates=rates))
        self._deadline.note("ceilings", self._deadline.elapsed() - begin)
        progress.advance(CEILINGS)

    def _save(self, **changes: Any) -> None:
        record = dataclasses.replace(self.record, seconds=self._spent + self._deadline.elapsed(), **changes)
        with_floor = (
            dataclasses.replace(each, floor=floor.seconds(each, record.machine)) for each in self._workloads.values()
        )
        self.record = dataclasses.replace(record, workloads=tuple(with_floor))
        write(self.record, self.path)

    def _faulty(self) -> bool:
        results = [result for workload in self.record.workloads for result in workload.results]
        faulty = any(result.status in ("wrong", "failed") for result in results if result.peer.startswith(FASTENC))
        return faulty or self.record.tests.status == "failed"


def bare(workload: Workload) -> Workload:
    """The workload without its measurements, which identifies it."""
    return dataclasses.replace(workload, flops=None, least_bytes=None, floor=None, noise=None, results=())


def latest(records: Iterable[Record]) -> list[Workload]:
    """The newest measurement of each workload, in records of one machine."""
    found: dict[Workload, Workload] = {}
    for record in sorted(records, key=lambda record: record.date):
        found.update((bare(each), each) for each in record.workloads if each.measured)
    return list(found.values())


def merged(earlier: Workload, later: Workload) -> Workload:
    """The workload with all results of both. A finished result of the earlier is kept."""
    found = {result.peer: result for result in later.results}
    kept = {result.peer: result for result in earlier.results if result.status not in ("left out", "not here")}
    results = tuple({**{one.peer: one for one in earlier.results}, **found, **kept}.values())
    return dataclasses.replace(later, noise=later.noise if earlier.noise is None else earlier.noise, results=results)


def row(workload: Workload) -> str:
    """A measurement as a line: the time of each baseline, or its status."""
    cells = (
        f"{each.peer} {each.status if each.time is None else f'{milliseconds(each.median)} ms'}"
        for each in workload.results
        if each.status != "not here"
    )
    return f"{workload}: {', '.join(cells)}"


def unfinished(folder: Path, like: Record) -> tuple[Path, Record] | None:
    """The newest unfinished record in `folder` of a run like this one, or None."""
    found: list[tuple[Path, Record]] = []
    for path in folder.glob("*.json"):
        try:
            record = load(path)
        except ValueError:  # not a record of this schema
            continue
        machine = dataclasses.replace(record.machine, copy_bandwidth=None, matmul_rates=())
        same = (record.source, machine, record.settings) == (like.source, like.machine, like.settings)
        left = not record.complete or any(workload.unfinished() for workload in record.workloads)
        if same and left and record.command.split()[:5] == like.command.split()[:5]:
            found.append((path, record))
    return max(found, key=lambda each: each[1].date, default=None)
