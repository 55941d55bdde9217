"""The state of programs that run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counts import WARP
from .faults import Fault
from .memory import Global, Shared
from .parse import Instruction

Array = NDArray[Any]


@dataclass
class Batch:
    """Programs that run together. active: the lanes that are at the current instruction; None for all."""

    programs: Array
    threads: int
    grid: tuple[int, int, int]
    arguments: Sequence[int | float]
    memory: Global
    shared: Shared
    registers: list[Array]
    active: Array | None = None
    warps: int = field(init=False)
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = (len(self.programs), self.threads)
        self.activate(None)

    def activate(self, lanes: Array | None) -> None:
        self.active = None if lanes is None or lanes.all() else lanes
        self.warps = self.shape[0] * self.threads // WARP
        if self.active is not None:
            full = np.broadcast_to(self.active, self.shape)
            self.warps = int(full.reshape(-1, WARP).any(1).sum())

    def rows(self, instruction: Instruction) -> Array:
        """A mask of the programs that are at `instruction`. Raises Fault if only some threads of a program are."""
        if self.active is None:
            return np.ones(self.shape[0], bool)
        some, every = self.active.any(1), self.active.all(1)
        if (some != every).any():
            raise Fault(f"not all threads of a program reach {instruction}")
        return np.broadcast_to(some, self.shape[:1])
