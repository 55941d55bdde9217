"""The pairs that become one kernel: the classes of norms and activations, and the parameters of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTIVATIONS = (nn.PReLU, nn.LeakyReLU, nn.ReLU)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# The functions and methods that do the same.
UNTRACEABLE = (F.relu_, torch.relu_, F.leaky_relu_)  # torch.compile takes them of tensors alone
RELU = (F.relu, torch.relu, Tensor.relu)
RELU_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)
PRELU = (F.prelu, torch.prelu, Tensor.prelu)
LEAKY_RELU = (F.leaky_relu, F.leaky_relu_)
FUNCTIONS = (*RELU, *RELU_IN_PLACE, *PRELU, *LEAKY_RELU)
# A module whose class was changed may have another forward, which then runs.
TORCH_FORWARDS = frozenset(kind.forward for kind in (*INSTANCE_NORMS, *ACTIVATIONS, *DROPOUTS, nn.Identity))


def slope_of(activation: nn.Module) -> Tensor | float:
    """The slope below zero of a PReLU, LeakyReLU or ReLU."""
    if isinstance(activation, nn.PReLU):
        return activation.weight
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0


def slope_of_call(function: Any, args: Any, kwargs: Any) -> tuple[Tensor | float, bool]:
    """The slope of a call of one of `FUNCTIONS`, and whether the call is in place."""
    if function in PRELU:
        return _argument(args, kwargs, 1, "weight", None), False
    if function in LEAKY_RELU:
        slope = _argument(args, kwargs, 1, "negative_slope", 0.01)
        return slope, function is F.leaky_relu_ or _argument(args, kwargs, 2, "inplace", False)
    return 0.0, function in RELU_IN_PLACE or _argument(args, kwargs, 1, "inplace", False)


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def why_not_plain(norm: Any) -> str | None:
    """Why norm, an InstanceNorm, does more than normalise by the statistics of its input."""
    if type(norm).forward not in TORCH_FORWARDS:
        return "its class has a forward of its own"
    if norm.track_running_stats or norm._buffers.get("running_mean") is not None:
        return "it keeps running statistics"
    return None
