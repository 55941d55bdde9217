"""Whether a baseline computes the same numbers, decided before it is timed.

The exact run is plain PyTorch at a higher precision: float64 for an operation, float32 without TF32 for a network. The
distance of `eager`, at the timed settings, from the exact run is its rounding error e. A baseline passes if each of its
tensors (output and gradients) has a relative L2 distance from the exact run of at most

    2 · max(e of this tensor, median of e over all tensors) + floor

Two correct runs round differently, hence the factor 2. The median covers tensors for which eager happened to be very
accurate. The floor covers what float32 changes even if e is zero. It is 1e-5 for the output: on
EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3), channels_last_3d on a CPU differs by 2e-6 to 5e-6. It is 6e-3 for
gradients: the float32 gradients of single parameters differ that much from float64 where a sum cancels. A missing term
causes a distance of 0.1 or more. Errors below the rounding of a 16-bit type stay hidden, because a PReLU input that
changes sign moves such gradients by tenths. The float32 workloads and tests/gpu are the sensitive ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

OUTPUT = "output"
OUTPUT_FLOOR, GRADIENT_FLOOR = 1e-5, 6e-3


def distance(tensor: Tensor, exact: Tensor) -> float:
    """‖tensor − exact‖ / ‖exact‖ in float64. Infinite if the shapes differ or a tensor is not finite."""
    if tensor.shape != exact.shape:
        return math.inf
    norm = exact.double().norm().item()
    apart = (tensor.double() - exact.double()).norm().item()
    relative = apart / norm if norm else (0.0 if apart == 0 else math.inf)
    return relative if math.isfinite(relative) else math.inf


def distances(numbers: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """`distance` for every tensor of `exact`. Infinite for one that `numbers` lacks."""
    return {name: distance(numbers[name], exact[name]) if name in numbers else math.inf for name in exact}


@dataclass(frozen=True)
class Verdict:
    """The tensor that is nearest to its tolerance or exceeds it most."""

    tensor: str
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether all tensors of eager and of the baseline are finite and within their tolerances."""
        return math.isfinite(self.tolerance) and self.difference <= self.tolerance


def judge(baseline: Mapping[str, float], eager: Mapping[str, float]) -> Verdict:
    """The verdict on a baseline, given the distances of its tensors and of eager's from the exact run."""
    typical = median(eager.values())

    def tolerance(name: str) -> float:
        return 2 * max(eager[name], typical) + (OUTPUT_FLOOR if name == OUTPUT else GRADIENT_FLOOR)

    def excess(name: str) -> float:
        return baseline[name] / tolerance(name) if math.isfinite(tolerance(name)) else math.inf

    worst = max(baseline, key=excess)
    return Verdict(worst, baseline[worst], tolerance(worst))
