"""What the pytest-benchmark suites share: the device, the baselines to run, and the timing of single calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ..baselines.registry import suite_of
from ..engine.record import Workload
from ..engine.timing import Work, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, WARMUP_ROUNDS = 20, 3


def pairs(workloads: Sequence[Workload]) -> list[tuple[Workload, str]]:
    """Each workload with each baseline that exists for it on this machine."""
    return [
        (workload, name)
        for workload in workloads
        for name, baseline in suite_of(workload).baselines.items()
        if baseline.absent(workload, DEVICE) is None
    ]


def title(value: object) -> str:
    """A parameter as part of a test's name."""
    text = str(value).replace("instance_norm_prelu, ", "").replace("instance_norm_add_prelu, ", "add, ")
    return text.replace(", ", "-").replace(" ", "_").replace("×", "x")


def run(benchmark: Any, group: str, work: Work) -> None:
    """Time `work` in this group, without its preparation. Each call waits for the device and drops its result."""

    def call(*arguments: Any) -> None:
        work.call(*arguments)
        synchronize(DEVICE)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = work.prepare()
        synchronize(DEVICE)
        return arguments, {}

    benchmark.group = group
    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)


def run_baseline(benchmark: Any, workload: Workload, name: str) -> None:
    """Time a baseline on a workload. With --benchmark-disable it runs once, and torch.compile generates no code."""
    suite = suite_of(workload)
    with traced_only() if benchmark.disabled else contextlib.nullcontext():
        runner = suite.baselines[name].make(suite.inputs(workload, DEVICE))
        run(benchmark, str(workload), runner.work)
    if suite.baselines[name].compiles:
        torch.compiler.reset()


@contextlib.contextmanager
def traced_only() -> Iterator[None]:
    """Inside the block torch.compile generates no code, for runs that are not timed."""
    compile_: Callable[..., Any] = torch.compile
    with mock.patch.object(torch, "compile", functools.partial(compile_, backend="aot_eager")):
        yield
