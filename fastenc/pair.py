"""The pairs that become one kernel: the classes of norm and activation, and what is read off a module of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTIVATIONS = (nn.PReLU, nn.LeakyReLU, nn.ReLU)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# A class that was given to a module later may have its own forward: then that one runs.
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
