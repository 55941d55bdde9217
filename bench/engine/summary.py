"""Medians and percentiles of samples, and the confidence interval of a median ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SURE = 0.9  # confidence level of the interval for the median ratio


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median and the 20th and 80th percentile of `samples`, by linear interpolation."""
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return median, p20, p80


@dataclass(frozen=True)
class Summary:
    """The samples of one baseline, in seconds per call."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """The median and the 20th and 80th percentile of `samples`, by linear interpolation."""
        return cls(*quantiles(samples), len(samples))


@dataclass(frozen=True)
class Ratio:
    """The ratios of two baselines' samples, round by round: median, percentiles, and the median's interval.

    low, high: order statistics between which the true median lies with a probability of at least 90 % for any
    distribution. With fewer than five rounds, which cannot give that probability, they are the smallest and the largest
    ratio.
    """

    median: float
    p20: float
    p80: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Summarize above[i] / below[i]. A round that only one of the two has finished is not counted."""
        ordered = sorted(a / b for a, b in zip(above, below, strict=False))
        n = len(ordered)
        outside = 0  # the number of samples on each side of the interval
        while sum(math.comb(n, i) for i in range(outside + 2)) / 2**n <= (1 - SURE) / 2:
            outside += 1
        return cls(*quantiles(ordered), ordered[outside], ordered[n - 1 - outside], n)

    @property
    def off_one(self) -> float:
        """The largest deviation of the interval from 1, as a factor of at least 1."""
        return max(self.high, 1 / self.low, 1.0)
