"""The peers: what a user could run instead of fastenc, and fastenc, each as one candidate for one workload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.floor import Cost, cost
from ..engine.record import Workload
from ..engine.timing import Work

EAGER, FASTENC = "eager", "fastenc"


@dataclass(frozen=True)
class Candidate:
    """One peer, ready to run one workload.

    `numbers()` runs it once and gives the output and, where the mode has a backward, every gradient by name.
    `held()`, asked after the first call, is what it keeps between calls: parameters, inputs, optimizer state, copies of
    weights. `note()`, asked then too, is what a reader of the result should know: fastenc's route, for one, which a
    machine's fault may have changed in that call.
    """

    numbers: Callable[[], dict[str, Tensor]]
    work: Work
    held: Callable[[], Iterable[Tensor]]
    note: Callable[[], str] = lambda: ""


def anywhere(workload: Workload, device: torch.device) -> None:
    """Of a peer that every machine has for every workload of its kind."""


@dataclass(frozen=True)
class Peer:
    """How a candidate is made of a workload's subject.

    compiles: its first call compiles for tens of seconds. absent: why the peer does not exist for this workload on this
    device, in words; None where it does. graphs: it holds memory of its own in CUDA graphs, which the allocator counts
    as reserved.
    """

    make: Callable[[Any], Candidate]
    compiles: bool = False
    absent: Callable[[Workload, torch.device], str | None] = anywhere
    graphs: bool = False


@dataclass(frozen=True)
class Contest:
    """One kind of workload: its subject, made once and shared by all peers; the peers; plain PyTorch one precision up,
    which `agreement` measures by and which runs without TF32; and what the work cannot do without, None if unknown."""

    subject: Callable[[Workload, torch.device], Any]
    peers: Mapping[str, Peer]
    exact: Callable[[Any], Candidate]
    cost: Callable[[Workload], Cost | None] = cost
