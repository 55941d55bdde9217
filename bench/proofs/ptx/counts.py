"""Counts of what a launch executed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARP = 32
SECTOR = 32


@dataclass
class Counts:
    """Counters of one launch.

    instructions: executed by warps, by PTX opcode.
    barriers: executed by programs.
    requests, sectors: of global memory, by "load", "store" and "copy" (asynchronous, to shared memory). A request is
        one instruction of one warp.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    sectors: Counter[str] = field(default_factory=Counter)

    def request(self, kind: str, address: NDArray[np.int64], mask: NDArray[Any] | None, shape: tuple[int, int]) -> None:
        """Count the warps that access memory, and the 32-byte sectors that each of them touches.

        An access is aligned and at most as wide as a sector, so each lane touches one sector.
        """
        sector = address // SECTOR
        if mask is not None:
            sector = np.where(mask, sector, -1)
        if sector.shape[1] == 1:
            touched = (sector >= 0).sum() * (shape[1] // WARP)
            requests = touched
        else:
            of_warp = np.sort(sector.reshape(-1, WARP), axis=1)
            off = of_warp[:, 0] < 0
            touched = len(of_warp) + np.count_nonzero(np.diff(of_warp, axis=1)) - np.count_nonzero(off)
            requests = np.count_nonzero(of_warp[:, -1] >= 0)
        alike = shape[0] // sector.shape[0]
        self.requests[kind] += int(requests) * alike
        self.sectors[kind] += int(touched) * alike

    def sectors_per_request(self, kind: str) -> float:
        """The average number of sectors per request. The best is 4 for 4-byte accesses and 16 for 16-byte accesses."""
        return self.sectors[kind] / max(1, self.requests[kind])
