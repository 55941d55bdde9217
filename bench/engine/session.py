"""A run of `gpu`, `compare`, `ops` or `clients`: workloads in order, a record that is always complete, a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..baselines.registry import suite_of
from ..baselines.suite import FASTENC
from ..console import Progress, wrapped
from . import floor
from .deadline import Deadline, OutOfTime, time_limit
from .machine import commit, condition, copy_bandwidth, describe, matmul_rates, source
from .measure import DeviceLost, Measurement
from .record import GpuTests, MatmulRate, Record, Settings, Workload, load, write
from .table import LEGEND, brief, heading, text

# Seconds of a workload, before the first was timed.
FIRST_GUESS = {
    "network": 12.0, "client": 20.0, "instance_norm_prelu": 4.0, "instance_norm_add_prelu": 4.0, "stem": 3.0,
}  # fmt: skip
PROMISED = 11  # compilations leave time for the next 11 workloads; `gpu` begins with the promised figures
CEILINGS, TESTS = 3.0, 20.0  # lengths on the progress bar

Tests = Callable[[Deadline], GpuTests]


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
    ) -> None:
        """
        Args:
            shared: the settings in force, for the record.
            only: the names of the baselines to run; None for all.
            tests: tests to run before the workloads.
            resume: continue an unfinished record in `out` with the same command, machine, settings and source files.
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
        slug = re.sub(r"[^a-z0-9]+", "-", self.record.machine.name.lower()).strip("-")
        self.path = out / f"{slug}-{command.split()[4]}-{now:%Y%m%dT%H%M%SZ}.json"
        self._done: dict[Workload, Workload] = {}
        earlier = unfinished(out, self.record) if resume else None
        if earlier is not None:
            self.path, found = earlier
            self.record = dataclasses.replace(found, complete=False, note="")
            self._done = {bare(each): each for each in found.workloads if not each.unfinished()}
        self._spent = self.record.seconds
        self._measurements = [Measurement(each, suite_of(each), device, only) for each in workloads]

    def run(self) -> int:
        """Run tests, ceilings and workloads, then print the table, also when stopped. Returns the exit status."""
        status, note = 0, ""
        waiting = [each for each in self._measurements if bare(each.workload()) not in self._done]
        total = 2 * CEILINGS + sum(each.total for each in waiting) + (TESTS if self._tests is not None else 0)
        with Progress(total) as progress:
            try:
                if self._done:
                    progress.say(f"resuming {self.path.name}, which already has {len(self._done)} workloads")
                self._measure(waiting, progress)
            except OutOfTime:
                note = "stopped at its deadline"
            except DeviceLost as lost:
                status, note = 1, f"stopped: {lost}"
            except KeyboardInterrupt:
                status, note = 130, "stopped by Ctrl-C"
        self._save(complete=not note, note=note, after=condition(self._device))
        print(heading(self.record), text(self.record), wrapped(LEGEND), sep="\n\n")
        if len(self._measurements) > 1:
            print(brief(self.record))
        print(f"record: {self.path}", flush=True)
        return status or int(self._faulty())

    def _measure(self, waiting: Sequence[Measurement], progress: Progress) -> None:
        if self._tests is not None:
            if self.record.tests.status != "passed":
                progress.say("tests/gpu")
                self._save(tests=self._tests(self._deadline))
            progress.advance(TESTS)
        self._measure_ceilings(progress)
        self._save(before=self.record.before or condition(self._device))
        kinds = [each.workload().kind for each in waiting]
        # Compilations take time from the last workloads. Another run with the same folder can measure those.
        for i, measurement in enumerate(waiting):
            reserve = sum(self._deadline.estimate(kind, FIRST_GUESS[kind]) for kind in kinds[i : i + PROMISED])
            measurement.run(self._deadline, reserve, progress)
            self._save()
        if self._deadline.left() > 2 * self._deadline.estimate("ceilings", 0.0):
            self._measure_ceilings(progress)

    def _measure_ceilings(self, progress: Progress) -> None:
        """Measure the ceilings. Done before and after the workloads, because the better result counts."""
        progress.say("copy bandwidth and matrix rates")
        begin = self._deadline.elapsed()
        dtypes = {each.workload().dtype for each in self._measurements if each.workload().flops}
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
        measured = (each.workload() for each in self._measurements)
        workloads = tuple(
            dataclasses.replace(each, floor=floor.seconds(each, record.machine))
            for each in (self._done.get(bare(each), each) for each in measured)
        )
        self.record = dataclasses.replace(record, workloads=workloads)
        write(self.record, self.path)

    def _faulty(self) -> bool:
        results = [result for workload in self.record.workloads for result in workload.results]
        faulty = any(result.status in ("wrong", "failed") for result in results if result.peer.startswith(FASTENC))
        return faulty or self.record.tests.status == "failed"


def bare(workload: Workload) -> Workload:
    """The workload without its measurements, which identifies it."""
    return dataclasses.replace(workload, flops=None, least_bytes=None, floor=None, noise=None, results=())


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
