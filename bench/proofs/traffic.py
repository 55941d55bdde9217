"""The bytes that a plan moves, predicted by arithmetic alone, in whole 32-byte sectors as memory moves them.

`predicted_bytes` stands in where kernels cannot be interpreted; elsewhere the count of the interpreted launch is held
against it. `Programs.kinds` finds the programs of a launch that differ, so that counting one of each counts them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from fastenc.kernels.plan import RELOAD_BLOCK_S, SECTOR_BYTES, SUM_N_C, SUM_N_N, Plan, blocks, ceil_div

FLOAT_BYTES = 4  # statistics, sums and partials are float32, and parameters mostly


def sectors(start: Any, length: Any, step: int = SECTOR_BYTES, count: Any = 1) -> Any:
    """Sectors touched by one access to `count` spans, `length` bytes each, `step` bytes apart from byte `start`.

    All but step may be arrays.
    """
    first, last = start // SECTOR_BYTES, (start + length - 1) // SECTOR_BYTES
    touched = last - first + 1
    # A later span touches what its predecessor did not; what that is repeats every `period` spans.
    period = SECTOR_BYTES // gcd(step, SECTOR_BYTES)
    for i in range(1, period + 1):
        before, first = last, (start + i * step) // SECTOR_BYTES
        last = (start + i * step + length - 1) // SECTOR_BYTES
        touched = touched + (last - np.maximum(first - 1, before)) * ((count - 1 - i + period) // period)
    return touched


@dataclass(frozen=True)
class Programs:
    """What the programs of a launch work on, in a tensor x (N, C, S): arrays with an entry for each program.

    row: the first row, n·C + c. c: its channel. rows: how many. s: the first position. positions: how many.
    chunk: which of the `chunks` pieces of the rows it is.
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
        """The programs in order: BLOCK_C rows by a chunk of `chunk_size` positions each."""
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
        """The programs that sum over n, which see N·C sums as one volume (C, N), channels-last."""
        return cls.of(1, C, N, SUM_N_C, 1, N, True)

    def partials(self) -> Programs:
        """The same programs as they see the partials, which lie as x would with `chunks` positions."""
        return replace(self, S=self.chunks, s=self.chunk, positions=np.ones_like(self.s))

    def first(self) -> np.ndarray:
        """Offset of the first element."""
        if self.channels_last:
            return (self.row // self.C * self.S + self.s) * self.C + self.c
        return self.row * self.S + self.s

    def tile_bytes(self, itemsize: int, BLOCK_S: int) -> int:
        """Bytes of one access to every element, BLOCK_S positions at a time."""
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
        """Bytes of one access to a float32 of every row."""
        return int(sectors(self.row * FLOAT_BYTES, self.rows * FLOAT_BYTES).sum()) * SECTOR_BYTES

    def channel_bytes(self) -> int:
        """Bytes of one access to a float32 parameter of every row's channel."""
        channels = np.minimum(self.rows, self.C)
        return int(sectors(self.c * FLOAT_BYTES, channels * FLOAT_BYTES).sum()) * SECTOR_BYTES

    def kinds(self, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of programs that all differ in what they move, and how many programs move the same as each."""
        traits = [self.rows, self.positions, self.first() * itemsize % SECTOR_BYTES]
        if self.rows.max() > 1:
            traits += [at * FLOAT_BYTES % SECTOR_BYTES for at in (self.row, self.c, self.partials().first())]
            traits.append(np.minimum(self.rows, self.C - self.c))  # channels before they begin again
        _, numbers, counts = np.unique(np.stack(traits), axis=1, return_index=True, return_counts=True)
        return numbers, counts


def predicted_bytes(
    plan: Plan, N: int, C: int, S: int, itemsize: int, channels_last: bool, backward: bool, residual: bool = False
) -> int:
    """Bytes loaded and stored for x (N, C, S), with weight, bias and slope (C,) in float32 and all their gradients."""
    stream = Programs.streaming(plan, N, C, S, channels_last)
    tile, row, channel = stream.tile_bytes(itemsize, plan.BLOCK_S), stream.row_bytes(), stream.channel_bytes()
    sum_n = Programs.summing_n(N, C)
    total = 3 * (sum_n.tile_bytes(FLOAT_BYTES, SUM_N_N) + sum_n.row_bytes()) if backward and N > 1 else 0
    if residual:
        total += 2 * tile if backward else tile  # r, and dr
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
