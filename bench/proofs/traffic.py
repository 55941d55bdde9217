"""The bytes that a plan moves, predicted by arithmetic, in whole 32-byte sectors because memory moves in sectors.

`predicted_bytes` is used if kernels cannot be interpreted; otherwise it is compared with the count of the interpreted
launch. `Programs.kinds` finds the different kinds of programs in a launch, so that one of each kind has to be counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from fastenc.kernels.plan import RELOAD_BLOCK_S, SECTOR_BYTES, SUM_N_C, SUM_N_N, Plan, blocks, ceil_div

FLOAT_BYTES = 4  # statistics, sums, partials and usually parameters are float32


def sectors(start: Any, length: Any, step: int = SECTOR_BYTES, count: Any = 1) -> Any:
    """The number of sectors that one access touches.

    Args:
        start: first byte. All arguments except step may be arrays.
        length: bytes of each span.
        step: bytes from one span to the next.
        count: number of spans.
    """
    first, last = start // SECTOR_BYTES, (start + length - 1) // SECTOR_BYTES
    touched = last - first + 1
    # A span adds the sectors that its predecessor did not touch. Their number repeats every `period` spans.
    period = SECTOR_BYTES // gcd(step, SECTOR_BYTES)
    for i in range(1, period + 1):
        before, first = last, (start + i * step) // SECTOR_BYTES
        last = (start + i * step + length - 1) // SECTOR_BYTES
        touched = touched + (last - np.maximum(first - 1, before)) * ((count - 1 - i + period) // period)
    return touched


@dataclass(frozen=True)
class Programs:
    """The parts of a tensor x (N, C, S) that the programs of a launch work on, as arrays with an entry per program.

    row: the first row, n·C + c.
    c: the channel of the first row.
    rows: the number of rows.
    s: the first position.
    positions: the number of positions.
    chunk: the number of the chunk, of `chunks` that the rows are split into.
    """

    C: int
    S: int
    chunks: int
    channels_last: bool
    row: np.ndarray
    c: np.ndarray
    rows: np.ndarray
    chunk: np.ndarray
    s: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, N: int, C: int, S: int, BLOCK_C: int, chunks: int, chunk_size: int, channels_last: bool) -> Programs:
        """The programs in order, each for BLOCK_C rows and a chunk of `chunk_size` positions."""
        p = np.arange(blocks(N, C, BLOCK_C, channels_last) * chunks)
        if channels_last:
            across = ceil_div(C, BLOCK_C)
            c, chunk = p % across * BLOCK_C, p // across % chunks
            row, rows = p // (across * chunks) * C + c, np.minimum(BLOCK_C, C - c)
        else:
            row, chunk = p // chunks * BLOCK_C, p % chunks
            c, rows = row % C, np.minimum(BLOCK_C, N * C - row)
        s = chunk * chunk_size
        return cls(C, S, chunks, channels_last, row, c, rows, chunk, s, np.minimum(chunk_size, S - s))

    @classmethod
    def streaming(cls, plan: Plan, N: int, C: int, S: int, channels_last: bool) -> Programs:
        """The programs of the one-pass kernel, or of each kernel that streams x."""
        chunk_size = S if plan.one_pass else plan.tiles * plan.BLOCK_S
        return cls.of(N, C, S, plan.BLOCK_C, plan.chunks, chunk_size, channels_last)

    @classmethod
    def combining(cls, plan: Plan, N: int, C: int, channels_last: bool) -> Programs:
        """The programs that combine the chunks' partials."""
        return cls.of(N, C, plan.chunks, plan.COMBINE_C, 1, plan.chunks, channels_last)

    @classmethod
    def summing_n(cls, N: int, C: int) -> Programs:
        """The programs that sum over n. They see the N·C sums as one channels-last sample (C, N)."""
        return cls.of(1, C, N, SUM_N_C, 1, N, True)

    def partials(self) -> Programs:
        """The same programs on the partials, whose layout is that of an x with `chunks` positions."""
        return replace(self, S=self.chunks, s=self.chunk, positions=np.ones_like(self.s))

    def first(self) -> np.ndarray:
        """Offset of the first element."""
        if self.channels_last:
            return (self.row // self.C * self.S + self.s) * self.C + self.c
        return self.row * self.S + self.s

    def tile_bytes(self, itemsize: int, BLOCK_S: int) -> int:
        """Bytes of accessing each element once, BLOCK_S positions at a time."""
        touched = 0
        for t in range(0, int(self.positions.max()), BLOCK_S):
            positions = np.clip(self.positions - t, 0, BLOCK_S)
            if self.channels_last:
                start = (self.first() + t * self.C) * itemsize
                tile = sectors(start, self.rows * itemsize, self.C * itemsize, positions)
            else:
                start = (self.first() + t) * itemsize
                tile = sectors(start, positions * itemsize, self.S * itemsize, self.rows)
            touched += int(tile[positions > 0].sum())
        return touched * SECTOR_BYTES

    def row_bytes(self) -> int:
        """Bytes of accessing one float32 per row."""
        return int(sectors(self.row * FLOAT_BYTES, self.rows * FLOAT_BYTES).sum()) * SECTOR_BYTES

    def channel_bytes(self) -> int:
        """Bytes of accessing one float32 parameter per row."""
        channels = np.minimum(self.rows, self.C)
        return int(sectors(self.c * FLOAT_BYTES, channels * FLOAT_BYTES).sum()) * SECTOR_BYTES

    def kinds(self, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """One program number for each kind of programs that move the same, and the number of programs of each kind."""
        traits = [self.rows, self.positions, self.first() * itemsize % SECTOR_BYTES]
        if self.rows.max() > 1:
            traits += [at * FLOAT_BYTES % SECTOR_BYTES for at in (self.row, self.c, self.partials().first())]
            traits.append(np.minimum(self.rows, self.C - self.c))  # channels up to the end of the sample
        _, numbers, counts = np.unique(np.stack(traits), axis=1, return_index=True, return_counts=True)
        return numbers, counts


def predicted_bytes(
    plan: Plan, N: int, C: int, S: int, itemsize: int, channels_last: bool, backward: bool, residual: bool = False
) -> int:
    """Bytes loaded and stored for x (N, C, S), with float32 weight, bias and slope (C,) and all gradients."""
    stream = Programs.streaming(plan, N, C, S, channels_last)
    tile, row, channel = stream.tile_bytes(itemsize, plan.BLOCK_S), stream.row_bytes(), stream.channel_bytes()
    sum_n = Programs.summing_n(N, C)
    total = 3 * (sum_n.tile_bytes(FLOAT_BYTES, SUM_N_N) + sum_n.row_bytes()) if backward and N > 1 else 0
    if residual:
        total += 2 * tile if backward else tile  # r and dr
    if plan.one_pass and backward:
        reload = row + channel if plan.BLOCK_S >= RELOAD_BLOCK_S else 0
        return total + 3 * tile + 3 * channel + 5 * row + reload
    if plan.one_pass:
        return total + 2 * tile + 3 * channel + 2 * row
    combine = Programs.combining(plan, N, C, channels_last)
    partials = stream.partials().tile_bytes(FLOAT_BYTES, 1) + combine.tile_bytes(FLOAT_BYTES, plan.COMBINE_K)
    if backward:
        total += 2 * tile + 3 * channel + 2 * row
        total += 3 * partials + 3 * combine.row_bytes()
        return total + 3 * tile + 3 * channel + 4 * row
    # A chunk's mean is its first element and the distance from it.
    total += tile + replace(stream, positions=np.ones_like(stream.s)).tile_bytes(itemsize, 1)
    total += 3 * partials + replace(combine, positions=np.ones_like(combine.s)).tile_bytes(FLOAT_BYTES, 1)
    return total + 2 * combine.row_bytes() + 2 * tile + 3 * channel + 2 * row
