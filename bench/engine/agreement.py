"""Whether a peer computes the same numbers, decided before it is timed.

The exact run is plain PyTorch one precision up: in float64 for an operation, in float32 without TF32 for a network.
`eager` at the timed settings is off from it by its own rounding, e. A peer passes when each of its tensors (output and
gradients) is off by no more than

    2 · max(e of this tensor, median of e over all tensors) + floor

in relative L2 distance. The factor 2 is the room between two runs that round differently; the median keeps a tensor on
which eager was lucky from being held against a peer. The floor is what float32 itself may move where e is zero. On an
output it is 1e-5: channels_last_3d on a CPU is off by 2e-6 to 5e-6 on Example 1. On gradients it is 6e-3: the
reference's own float32 gradients of single parameters are off by as much from float64, where a sum cancels. A missing
term is off by 0.1 to 1 and more. Low precision hides what is smaller than its rounding: at 16 bits a PReLU input that
changes sign moves gradients by tenths, so the float32 workloads and tests/gpu are the sharp ones.
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
    """‖tensor − exact‖ / ‖exact‖ in float64; infinite when either is not finite or the shapes differ."""
    if tensor.shape != exact.shape:
        return math.inf
    norm = exact.double().norm().item()
    apart = (tensor.double() - exact.double()).norm().item()
    relative = apart / norm if norm else (0.0 if apart == 0 else math.inf)
    return relative if math.isfinite(relative) else math.inf


def distances(numbers: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """`distance` of every tensor of `exact`; infinite for one that `numbers` lacks."""
    return {name: distance(numbers[name], exact[name]) if name in numbers else math.inf for name in exact}


@dataclass(frozen=True)
class Verdict:
    """The tensor nearest to its tolerance, or farthest beyond it."""

    tensor: str
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether every tensor is finite, in eager and in the peer, and within its tolerance."""
        return math.isfinite(self.tolerance) and self.difference <= self.tolerance


def judge(peer: Mapping[str, float], eager: Mapping[str, float]) -> Verdict:
    """The verdict on a peer, from the distances of its tensors and of eager's to the exact run."""
    typical = median(eager.values())

    def tolerance(name: str) -> float:
        return 2 * max(eager[name], typical) + (OUTPUT_FLOOR if name == OUTPUT else GRADIENT_FLOOR)

    def excess(name: str) -> float:
        return peer[name] / tolerance(name) if math.isfinite(tolerance(name)) else math.inf

    worst = max(peer, key=excess)
    return Verdict(worst, peer[worst], tolerance(worst))
