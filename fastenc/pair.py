"""The pairs that become one kernel: the classes of norms and activations, and the parameters of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTIVATIONS = (nn.PReLU, nn.LeakyReLU, nn.ReLU)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# A module whose class was changed may have another forward, which then runs.
TORCH_FORWARDS = frozenset(kind.forward for kind in (*INSTANCE_NORMS, *ACTIVATIONS, *DROPOUTS, nn.Identity))


def slope_of(activation: nn.Module) -> Tensor | float:
    """The slope below zero of a PReLU, LeakyReLU or ReLU."""
    if isinstance(activation, nn.PReLU):
        return activation.weight
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0


def why_not_plain(norm: Any) -> str | None:
    """Why norm, an InstanceNorm, does more than normalise by the statistics of its input."""
    if type(norm).forward not in TORCH_FORWARDS:
        return "its class has a forward of its own"
    if norm.track_running_stats or norm._buffers.get("running_mean") is not None:
        return "it keeps running statistics"
    return None
