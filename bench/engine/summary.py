"""Samples summed up: the middle, the spread, and how sure the middle is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 0.9  # that the interval of a ratio's median holds the median of endlessly many rounds


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted numbers, by linear interpolation."""
    position = q * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))


@dataclass(frozen=True)
class Summary:
    """Samples of one peer, in seconds per call."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """The median and the 20th and 80th percentile of `samples`, by linear interpolation."""
        ordered = sorted(samples)
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two peers' samples of the same round: its median, its spread, and the median's interval.

    low, high: order statistics between which the true median lies with a probability of at least 90 %, whatever the
    distribution; with fewer than five rounds there are none so sure, and it is the whole range.
    """

    median: float
    p20: float
    p80: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Of above[i] / below[i]; a round that only one of the two has finished does not count."""
        ordered = sorted(a / b for a, b in zip(above, below, strict=False))
        n = len(ordered)
        outside = 0  # samples below the interval, and above it
        while sum(math.comb(n, i) for i in range(outside + 2)) / 2**n <= (1 - SURE) / 2:
            outside += 1
        middle, p20, p80 = (quantile(ordered, q) for q in (0.5, 0.2, 0.8))
        return cls(middle, p20, p80, ordered[outside], ordered[n - 1 - outside], n)

    @property
    def off_one(self) -> float:
        """How far from 1 the interval reaches, as a factor of at least 1."""
        return max(self.high, 1 / self.low, 1.0)
