"""What the pytest-benchmark suites share: the device, which peers to run, and one timed call at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ..baselines.registry import contest_of
from ..engine.record import Workload
from ..engine.timing import Work, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, WARMUP_ROUNDS = 20, 3


def pairs(workloads: Sequence[Workload]) -> list[tuple[Workload, str]]:
    """Every workload with every peer that exists for it on this machine."""
    return [
        (workload, name)
        for workload in workloads
        for name, peer in contest_of(workload).peers.items()
        if peer.absent(workload, DEVICE) is None
    ]


def title(value: object) -> str:
    """A parameter's name in a test's."""
    return (
        str(value)
        .replace("instance_norm_prelu, ", "")
        .replace("instance_norm_add_prelu, ", "add, ")
        .replace(", ", "-")
        .replace(" ", "_")
        .replace("×", "x")
    )


def run(benchmark: Any, group: str, work: Work) -> None:
    """Time `work` in `group`: preparation off the clock, the device waited for, no result kept from call to call."""

    def call(*arguments: Any) -> None:
        work.call(*arguments)
        synchronize(DEVICE)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = work.prepare()
        synchronize(DEVICE)
        return arguments, {}

    benchmark.group = group
    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)


def run_peer(benchmark: Any, workload: Workload, name: str) -> None:
    """Time one peer on one workload. With --benchmark-disable it runs once, compiled without generating code."""
    contest = contest_of(workload)
    with traced_only() if benchmark.disabled else contextlib.nullcontext():
        candidate = contest.peers[name].make(contest.subject(workload, DEVICE))
        run(benchmark, str(workload), candidate.work)
    if contest.peers[name].compiles:
        torch.compiler.reset()


@contextlib.contextmanager
def traced_only() -> Iterator[None]:
    """torch.compile without generating code: for a run that is not timed."""
    compile_: Callable[..., Any] = torch.compile
    with mock.patch.object(torch, "compile", functools.partial(compile_, backend="aot_eager")):
        yield
