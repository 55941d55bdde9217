"""Which taps of a convolution's kernel meet the tensor, and not only its padding. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Window:
    """The taps [low, high) of each axis, and what the tensor is padded by on either side so that they fit.

    `padding` is (before, after) of each axis; negative where the stride leaves positions out at the end.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The window's part of a weight (out, in, *kernel)."""
        return (slice(None), slice(None), *map(slice, self.low, self.high))

    @property
    def taps(self) -> int:
        return prod(high - low for low, high in zip(self.low, self.high, strict=True))


def window_of(size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
              whole: bool = False) -> Window | None:  # fmt: skip
    """The smallest window that holds every tap that meets a tensor of `size`, or, `whole`, all taps.

    None where the convolution has no output. At stride s and padding p, tap k of an axis meets position o·s − p + k.
    """
    low, high, around, output = [], [], [], []
    for length, taps, step, pad in zip(size, kernel, stride, padding, strict=True):
        positions = (length + 2 * pad - taps) // step + 1
        if length < 1 or positions < 1:
            return None
        alive = [k for k in range(taps) if whole or any(0 <= o * step - pad + k < length for o in range(positions))]
        if not alive:
            return None
        first, last = alive[0], alive[-1] + 1
        before = pad - first
        low.append(first)
        high.append(last)
        around.append((before, (positions - 1) * step + last - first - length - before))
        output.append(positions)
    return Window(tuple(low), tuple(high), tuple(around), tuple(output))
