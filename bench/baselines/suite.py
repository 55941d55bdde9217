"""A suite times one kind of workload: each of its baselines makes a runner from the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.floor import Cost
from ..engine.record import Workload
from ..engine.timing import Work

EAGER, FASTENC = "eager", "fastenc"


@dataclass(frozen=True)
class Runner:
    """One baseline, ready to run one workload.

    numbers: runs it once and returns the output and, if the mode has a backward, every gradient, by name.
    work: what is timed.
    held: called after the first run, returns what stays in memory between calls: parameters, inputs, optimizer state,
        copies of weights.
    note: called after the first run, returns what a reader of the result should know, such as fastenc's route.
    """

    numbers: Callable[[], dict[str, Tensor]]
    work: Work
    held: Callable[[], Iterable[Tensor]]
    note: Callable[[], str] = lambda: ""


def anywhere(workload: Workload, device: torch.device) -> None:
    """`Baseline.absent` of a baseline that exists on every machine, for every workload of its suite."""


@dataclass(frozen=True)
class Baseline:
    """One way to run a workload: a user's alternative to fastenc, or fastenc itself.

    make: makes the runner from the suite's inputs.
    compiles: the first call compiles, which takes tens of seconds.
    absent: returns why this baseline does not exist for a workload on a device, or None if it does.
    graphs: it keeps its own memory in CUDA graphs, which the allocator counts as reserved.
    """

    make: Callable[[Any], Runner]
    compiles: bool = False
    absent: Callable[[Workload, torch.device], str | None] = anywhere
    graphs: bool = False


@dataclass(frozen=True)
class Suite:
    """How one kind of workload is timed.

    inputs: makes what all baselines share, once for each workload.
    baselines: by name.
    exact: makes plain PyTorch at a higher precision and without TF32, which `agreement` compares with.
    cost: the least operations and bytes that the workload needs, or None if unknown.
    """

    inputs: Callable[[Workload, torch.device], Any]
    baselines: Mapping[str, Baseline]
    exact: Callable[[Any], Runner]
    cost: Callable[[Workload], Cost | None]
