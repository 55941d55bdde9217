"""`instance_norm_prelu`, the fused operation, and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import reference, route

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]


def instance_norm_prelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | float = 0.25,
    eps: float = 1e-5,
) -> Tensor:
    """Instance normalisation followed by PReLU, as one operation.

        y = z where z > 0 else slope·z,   z = (x − mean)/√(variance + eps)·weight + bias

    with mean and (biased) variance of each (n, c) over its spatial positions.

    Equivalent to ``F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=eps), slope)``, or to ``F.leaky_relu``
    where slope is a number.

    Args:
        x: (N, C, *spatial), at least two spatial positions, any strides. On CUDA float32, bfloat16 and float16 take
            the Triton route; everything else the eager one.
        weight, bias: (C,) in x's dtype or float32, or None for 1 and 0.
        slope: (C,) or (1,) in x's dtype or float32: PReLU; or a number: LeakyReLU (0.0 is ReLU, 1.0 no activation).
        eps: added to the variance.

    Returns:
        y of x's shape and memory layout, in x's dtype; under autocast with a tensor slope, in autocast's dtype.

    Raises:
        ValueError: one spatial position, no sample or no channel; a parameter of the wrong length, dtype or device.
        TypeError: x or a parameter is not a tensor.
        RuntimeError: backend "triton" was asked for and cannot be taken.
    """
    _check(x, weight, bias, slope)
    if x.numel() < 2 * x.shape[0] * x.shape[1] or route.eager(route.reason(x)):
        return reference.forward(x, weight, bias, slope, eps)
    return fused(x, weight, bias, slope, eps)


def output_dtype(x: Tensor, slope: Tensor | float) -> torch.dtype | None:
    """The dtype of y under autocast, whose list has prelu but not leaky_relu; None for x's own."""
    if isinstance(slope, Tensor) and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def fused(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | float, eps: float, in_place: bool = False
) -> Tensor:
    """`instance_norm_prelu` on the Triton route, for arguments that are known to be good.

    in_place: where nothing is kept for a backward, y may be written over x.
    """
    dtype = output_dtype(x, slope)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (isinstance(slope, Tensor) and slope.requires_grad)
    ):
        return InstanceNormPReLU.apply(x, weight, bias, slope, eps, dtype)
    try:
        return launchers()[0](x, weight, bias, slope, eps, dtype, in_place)[0]
    except Exception as error:
        if not route.machine_fault(error, x.device):
            raise
        return reference.forward(x, weight, bias, slope, eps)


class InstanceNormPReLU(torch.autograd.Function):
    """The Triton route under autograd. Saves x and the statistics, nothing else of x's size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | float,
        eps: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        try:
            y, mean, rstd = launchers()[0](x, weight, bias, slope, eps, dtype)
        except Exception as error:
            if not route.machine_fault(error, x.device):
                raise
            y, mean, rstd = reference.forward(x, weight, bias, slope, eps), None, None
        shared = slope if isinstance(slope, Tensor) else None
        ctx.save_for_backward(x, weight, bias, shared, mean, rstd)
        ctx.slope = None if shared is not None else slope
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy,) = grad_outputs
        x, weight, bias, slope, mean, rstd = ctx.saved_tensors
        slope = ctx.slope if slope is None else slope
        # Where the backward itself is differentiated, or vectorised, a kernel would end the graph: the formula goes on.
        if mean is None or torch.is_grad_enabled() or route.vectorised(dy):
            return (*reference.backward(dy, x, weight, bias, slope, ctx.eps), None, None)
        needs = ctx.needs_input_grad[:4]
        try:
            gradients = launchers()[1](dy, x, weight, bias, slope, mean, rstd, needs)
        except Exception as error:
            if not route.machine_fault(error, x.device):
                raise
            gradients = reference.backward(dy, x, weight, bias, slope, ctx.eps)
        return (*gradients, None, None)


@lru_cache(maxsize=1)
def launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The launchers of the forward and of the backward; triton is imported here, at the first fused call."""
    from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
    from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward

    return instance_norm_prelu_forward, instance_norm_prelu_backward


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | float) -> None:
    """Raise where x's shape or a parameter cannot be right, naming it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 3:
        raise ValueError(f"x must be (N, C, *spatial) with at least one spatial axis, got shape {tuple(x.shape)}")
    shape = x.shape
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"x must have at least one sample and one channel, got shape {tuple(shape)}")
    C = shape[1]
    if weight is not None:
        _check_parameter("weight", weight, x, (C,))
    if bias is not None:
        _check_parameter("bias", bias, x, (C,))
    if isinstance(slope, Tensor):
        _check_parameter("slope", slope, x, (C, 1))
    elif not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a torch.Tensor or a number, got {type(slope).__name__}")


def _check_parameter(name: str, parameter: Tensor, x: Tensor, lengths: tuple[int, ...]) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(parameter).__name__}")
    if parameter.dim() != 1 or parameter.shape[0] not in lengths:
        needed = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        came, shape = tuple(parameter.shape), tuple(x.shape)
        raise ValueError(f"{name} must have shape {needed} for x of shape {shape}, got {came}")
    if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
        raise ValueError(f"{name} must be {x.dtype} (x's dtype) or torch.float32, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {parameter.device}")
