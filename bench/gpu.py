"""The one command for a GPU machine: the tests that need a GPU, then the times, one record, one table."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
import tempfile
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from . import gpu_tests
from .deadline import Deadline, OutOfTime, time_limit
from .machine import ceilings, commit, describe, settings
from .measure import DeviceLost, Measurement
from .peers import peers_of
from .record import GpuTests, Network, Record, Settings, Workload, write
from .table import heading, table

PURPOSE = "run the GPU tests, time fastenc against its peers, write one JSON record and print one table"
ENDING = 10.0  # seconds kept for importing torch before the clock runs and for ending after it
TESTS_SHARE = 0.4  # of the minutes, at most
FIRST_GUESS = {"network": 12.0, "instance_norm_prelu": 4.0}  # seconds a workload takes, until one was timed

Mode = Literal["forward", "backward", "forward+backward"]
Precision = Literal["float32", "bfloat16", "bfloat16 autocast"]
Layout = Literal["contiguous", "channels_last"]


def _networks(precision: Precision, batch: int, size: tuple[int, ...], network: Network) -> list[Workload]:
    modes: tuple[Mode, ...] = ("forward+backward", "forward")
    shape = (batch, network.in_planes, *size)
    return [Workload("network", mode, precision, shape, network=network) for mode in modes]


def _ops(precision: Precision, shape: tuple[int, ...], layouts: tuple[Layout, ...]) -> list[Workload]:
    size = prod(shape) * (2 if precision == "bfloat16" else 4)
    tensors: dict[Mode, int] = {"forward": 2, "backward": 3}
    return [
        Workload("instance_norm_prelu", mode, precision, shape, layout, least_bytes=count * size)
        for layout in layouts
        for mode, count in tensors.items()
    ]


def plan(device: torch.device) -> list[Workload]:
    """The workloads, most valuable first: Example 1 of the seed, and the op at its largest layers; tiny on a CPU."""
    both: tuple[Layout, ...] = ("channels_last", "contiguous")
    if device.type == "cpu":
        tiny = _networks("float32", 2, (8, 7, 6), Network(4, (2, 1), 3, 32))
        return [*tiny, *_ops("float32", (2, 4, 8, 7, 6), both)]

    def example_1(precision: Precision, batch: int) -> list[Workload]:
        return _networks(precision, batch, (31, 32, 30), Network(64, (3, 3, 3, 3, 3), 3, 32))

    return [
        *example_1("bfloat16 autocast", 8),
        *_ops("bfloat16", (8, 64, 31, 32, 30), both),
        *example_1("float32", 8),
        *example_1("bfloat16 autocast", 32),
        *example_1("bfloat16 autocast", 1),
        *_ops("float32", (8, 64, 31, 32, 30), both),
        *example_1("float32", 32),
        *example_1("float32", 1),
        *_ops("bfloat16", (8, 128, 16, 16, 15), both[:1]),
    ]


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not (math.isfinite(minutes) and minutes > 0):
        raise argparse.ArgumentTypeError(f"got {text}; a number of minutes above 0 is needed")
    return minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gpu`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record and tests.log")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="stop by itself within so many (default: 8)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs a tiny version of the same (default: cuda)"
    )
    parser.epilog = (
        "exit status: 0 done; 1 a test failed, or fastenc failed or disagreed with eager; "
        "2 no GPU, or DIR cannot be written; 130 stopped by Ctrl-C"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    deadline = Deadline(arguments.minutes * 60 - ENDING)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"fastenc bench gpu: torch {torch.__version__} sees no CUDA GPU here; "
            "--device cpu runs a tiny version of the same on the CPU",
            file=sys.stderr,
        )
        return 2
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=arguments.out):
            pass
    except OSError as error:
        print(f"fastenc bench gpu: --out: cannot write to {arguments.out}: {error.strerror}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with settings(tf32=True, benchmark=True) as shared:
        command = f"python -m fastenc.bench gpu --device {device.type} --minutes {arguments.minutes:g}"
        return Session(command, arguments.out, device, shared, deadline).run()


class Session:
    """One run of the command. The record is written anew after every workload."""

    def __init__(self, command: str, out: Path, device: torch.device, shared: Settings, deadline: Deadline) -> None:
        now = datetime.now(timezone.utc)
        head, dirty = commit()
        self._device, self._deadline, self._log = device, deadline, out / "tests.log"
        self._record = Record(
            command=command,
            date=now.isoformat(timespec="seconds"),
            commit=head,
            dirty=dirty,
            machine=describe(device),
            settings=shared,
            tests=GpuTests("not run"),
            workloads=(),
            complete=False,
        )
        slug = re.sub(r"[^a-z0-9]+", "-", self._record.machine.name.lower()).strip("-")
        self._path = out / f"{slug}-{now:%Y%m%dT%H%M%SZ}.json"
        self._measurements = [Measurement(workload, peers_of(workload), device) for workload in plan(device)]

    def run(self) -> int:
        """Tests, ceilings, workloads; then the table, whatever came between. Returns the exit status."""
        status, note = 0, ""
        try:
            self._measure()
        except OutOfTime:
            note = "stopped at its deadline"
        except DeviceLost as lost:
            status, note = 1, f"stopped: {lost}"
        except KeyboardInterrupt:
            status, note = 130, "stopped by Ctrl-C"
        self._save(complete=not note, note=note)
        print(heading(self._record))
        print(f"record: {self._path}; log of the tests: {self._log}\n")
        print(table(self._record), flush=True)
        return status or int(self._faulty())

    def _measure(self) -> None:
        limit = min(TESTS_SHARE * (self._deadline.left() + ENDING), self._deadline.left())
        self._say("tests/gpu", f"{limit:.0f} s at most")
        self._save(tests=gpu_tests.run(self._log, limit))
        self._say("ceilings", "copy bandwidth and matrix rate")
        with time_limit(self._deadline.left()):
            bandwidth, rate = ceilings(self._device)
        machine = dataclasses.replace(self._record.machine, copy_bandwidth=bandwidth, matmul_rate=rate)
        self._save(machine=machine)
        workloads = [measurement.workload() for measurement in self._measurements]
        for i, (workload, measurement) in enumerate(zip(workloads, self._measurements, strict=True)):
            reserve = sum(self._deadline.estimate(later.kind, FIRST_GUESS[later.kind]) for later in workloads[i:])
            measurement.run(self._deadline, reserve, functools.partial(self._say, str(workload)))
            self._save()

    def _save(self, **changes: Any) -> None:
        workloads = tuple(measurement.workload() for measurement in self._measurements)
        self._record = dataclasses.replace(self._record, workloads=workloads, **changes)
        write(self._record, self._path)

    def _say(self, what: str, step: str) -> None:
        print(f"[{self._deadline.elapsed():4.0f} s] {what}: {step}", file=sys.stderr, flush=True)

    def _faulty(self) -> bool:
        results = [result for workload in self._record.workloads for result in workload.results]
        faulty = any(result.status in ("wrong", "failed") for result in results if result.peer == "fastenc")
        return faulty or self._record.tests.status == "failed"
