"""The bytes that a plan moves, predicted by arithmetic, in whole 32-byte sectors because memory moves in sectors.

`predicted_bytes` is used if kernels cannot be interpreted; otherwise it is compared with the count of the interpreted
launch. `Programs.kinds` finds the different kinds of programs in a launch, so that one of each kind has to be counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from fastenc.kernels.plan import SECTOR_BYTES, SUM_N_C, SUM_N_N, Plan, blocks, ceil_div

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

    N: int
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
        """The programs, chunk by chunk, each for BLOCK_C rows and `chunk_size` positions."""
        across = blocks(N, C, BLOCK_C, channels_last)
        chunk, p = np.divmod(np.arange(across * chunks), across)
        if channels_last:
            slices = ceil_div(C, BLOCK_C)
            c = p % slices * BLOCK_C
            row, rows = p // slices * C + c, np.minimum(BLOCK_C, C - c)
        else:
            row = p * BLOCK_C
            c, rows = row % C, np.minimum(BLOCK_C, N * C - row)
        s = chunk * chunk_size
        return cls(N, C, S, chunks, channels_last, row, c, rows, chunk, s, np.minimum(chunk_size, S - s))

    @classmethod
    def streaming(cls, plan: Plan, N: int, C: int, S: int, channels_last: bool) -> Programs:
        """The programs of the one-pass kernel, or of each launch that streams x."""
        return cls.of(N, C, S, plan.BLOCK_C, plan.chunks, plan.tiles * plan.BLOCK_S, channels_last)

    def combining(self) -> Programs:
        """Of these the first chunks': the programs of the launch that combines partials, or those that store them."""
        return self.chosen(self.chunk == 0)

    def chosen(self, which: np.ndarray) -> Programs:
        """Some of these."""
        arrays = {name: getattr(self, name)[which] for name in ("row", "c", "rows", "chunk", "s", "positions")}
        return replace(self, **arrays)

    @classmethod
    def summing_n(cls, N: int, C: int) -> Programs:
        """The programs that sum over n. They see the N·C sums as one channels-last sample (C, N)."""
        return cls.of(1, C, N, SUM_N_C, 1, N, True)

    def part(self, chunk: Any) -> Any:
        """Offset of a partial result of the first row's."""
        if self.channels_last:
            return (self.row // self.C * self.chunks + chunk) * self.C + self.c
        return self.row * self.chunks + chunk

    def part_bytes(self) -> int:
        """Bytes of one access to the program's own partial result of every row, all of one kind."""
        touched = sectors(self.part(self.chunk) * FLOAT_BYTES, self.rows * FLOAT_BYTES)
        return int(touched.sum()) * SECTOR_BYTES

    def parts_bytes(self, COMBINE_K: int) -> int:
        """Bytes of accesses to all partial results of every row, COMBINE_K chunks at a time, all of one kind."""
        touched = 0
        for k in range(0, self.chunks, COMBINE_K):
            count, start = min(COMBINE_K, self.chunks - k), self.part(k) * FLOAT_BYTES
            if self.channels_last:
                touched += sectors(start, self.rows * FLOAT_BYTES, self.C * FLOAT_BYTES, count).sum()
            else:
                touched += sectors(start, count * FLOAT_BYTES, self.chunks * FLOAT_BYTES, self.rows).sum()
        return int(touched) * SECTOR_BYTES

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
        traits = [self.rows, self.positions, self.chunk == 0, self.first() * itemsize % SECTOR_BYTES]
        if self.chunks > 1:
            traits += [self.part(chunk) * FLOAT_BYTES % SECTOR_BYTES for chunk in (0, self.chunk)]
        if self.rows.max() > 1:
            traits += [at * FLOAT_BYTES % SECTOR_BYTES for at in (self.row, self.c)]
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
    if plan.branch == "one pass" and backward:
        return total + 3 * tile + 3 * channel + 5 * row
    if plan.branch == "one pass":
        return total + 2 * tile + 3 * channel + 2 * row
    combine, kinds, sums = stream.combining(), 2, 2
    total += (5 if backward else 3) * tile + 3 * channel
    if backward:
        kinds, sums = 3, 4 if plan.branch == "split" else 3
        total += 2 * row  # the statistics, read once in each of two launches below
    else:
        total += replace(stream, positions=np.ones_like(stream.s)).tile_bytes(itemsize, 1)
    if plan.chunks == 1 and plan.branch == "slab":
        return total + sums * combine.row_bytes()
    total += kinds * stream.part_bytes() + sums * combine.row_bytes()
    readers = combine if plan.combines_apart else stream
    total += 2 * readers.parts_bytes(plan.COMBINE_K)
    if backward:
        total += combine.parts_bytes(plan.COMBINE_K) + 2 * row + 3 * channel
    if plan.combines_apart:
        total += 2 * row + 3 * combine.channel_bytes() + (2 * combine.row_bytes() if backward else 0)
    return total
