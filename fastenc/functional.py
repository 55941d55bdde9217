"""`instance_norm_prelu`, the fused operation, and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, float32, is_grad_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import library, reference, route
from .convolution import autocast_dtype
from .pair import INSTANCE_NORMS
from .saved import save, saved

AXES = {kind: order + 3 for order, kind in enumerate(INSTANCE_NORMS)}  # of the x of each norm, with its batch


def instance_norm_prelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | float = 0.25,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance normalisation followed by PReLU, as one operation.

        y = z where z > 0 else slope·z,   z = (x − mean)/√(variance + eps)·weight + bias

    with the mean and the (biased) variance of each (n, c) over its spatial positions. With a residual, z + residual
    replaces z. That is the end of a residual block, at the cost of reading one more tensor.

    Equivalent to ``F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=eps), slope)``, or to ``F.leaky_relu``
    if slope is a number.

    Args:
        x: (N, C, *spatial), at least two spatial positions, any strides. float32, bfloat16 and float16 tensors on CUDA
            take the Triton route, all others the eager route.
        weight, bias: (C,) in x's dtype or float32, or None for 1 and 0.
        slope: a tensor (C,) or (1,) in x's dtype or float32, as in PReLU, or a number, as in LeakyReLU. 0.0 is ReLU,
            1.0 is no activation.
        eps: added to the variance.
        residual: a tensor of x's shape, dtype and device, or None.

    Returns:
        y (N, C, *spatial) in x's memory layout and dtype. Under autocast with a tensor slope it has autocast's dtype.

    Raises:
        ValueError: x has one spatial position, no sample or no channel; a parameter has the wrong length, dtype or
            device; residual has another shape, dtype or device than x.
        TypeError: x, a parameter or residual is not a tensor.
        RuntimeError: the backend is "triton" and the call cannot take that route.
    """
    positions = _positions(x, weight, bias, slope)
    why = route.reason(x)
    if residual is not None:
        _check_residual(residual, x)
        why = why or route.reason(residual)
    if positions < 2 or (why is not None and route.use_eager(why)):
        return reference.forward(x, weight, bias, slope, eps, residual)
    return fused(x, weight, bias, slope, eps, residual=residual)


def is_supported(norm: Any, weight: Tensor | None, bias: Tensor | None, slope: Tensor | float, x: Tensor) -> bool:
    """Whether the kernel supports x with this weight and bias of norm, an InstanceNorm, and this slope.

    The caller reads the parameters once, because nn.Module is slow to find them. If False, torch's own code runs.
    """
    C, shape = norm.num_features, x.shape
    return (
        len(shape) == AXES.get(type(norm))
        and shape[1] == C
        and 0 < 2 * C * shape[0] <= x.numel()
        and (weight is None or fits(weight, x, C))
        and (bias is None or fits(bias, x, C))
        and (not isinstance(slope, Tensor) or fits(slope, x, C) or fits(slope, x, 1))
    )


def fits(parameter: Tensor, x: Tensor, length: int) -> bool:
    """Whether parameter has this length, and a dtype and device that the kernels support for x."""
    try:
        return (
            parameter.shape == (length,)
            and ((dtype := parameter.dtype) is float32 or dtype is x.dtype)
            and parameter.device == x.device
            and ((kind := type(parameter)) is Parameter or kind is Tensor or is_compiling())  # others compute their way
        )
    except AttributeError:  # not a tensor
        return False


def fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    eps: float,
    in_place: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`instance_norm_prelu` on the Triton route, with arguments that have been checked.

    in_place: y may overwrite x if no gradient is needed.
    """
    dtype = autocast_dtype(x) if isinstance(slope, Tensor) else None  # it casts prelu, but not leaky_relu
    if is_compiling():
        return library.forward(x, weight, bias, slope, eps, dtype, residual)
    if is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (isinstance(slope, Tensor) and slope.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        residuals = () if residual is None else (residual,)
        return InstanceNormPReLU.apply(x, weight, bias, slope, (eps, dtype), *residuals)
    return launched_forward(x, weight, bias, slope, residual, eps, dtype, in_place)[0]


def launched_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y and the statistics from the kernels. If they cannot be launched, y from the formula, and None."""
    try:
        return launchers()[0](x, weight, bias, slope, eps, dtype, in_place, None, residual)
    except Exception as error:
        route.fall_back(error, x.device)
        return reference.forward(x, weight, bias, slope, eps, residual), None


class InstanceNormPReLU(torch.autograd.Function):
    """The Triton route under autograd. The only tensors of x's size that it saves are x and the residual.

    numbers: eps and the dtype of y, or None for x's. residuals: the residual, if there is one. They are packed because
    each argument of `apply` takes time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | float,
        numbers: tuple[float, torch.dtype | None],
        *residuals: Tensor,
    ) -> Tensor:
        eps, dtype = numbers
        y, statistics = launched_forward(x, weight, bias, slope, residuals[0] if residuals else None, eps, dtype)
        if isinstance(slope, Tensor):
            save(ctx, x, weight, bias, slope, statistics, *residuals)
        else:
            save(ctx, x, weight, bias, None, statistics, *residuals)
            ctx.slope = slope
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, bias, slope, statistics, *residuals = saved(ctx)
        slope = ctx.slope if slope is None else slope
        residual = residuals[0] if residuals else None
        gradients: tuple[Tensor | None, ...] | None = None
        # The kernels are not differentiable. The formula serves double backward and batched gradients.
        if not (statistics is None or is_grad_enabled() or route.transformed(dy)):
            needs = ctx.needs_input_grad[:4] + ctx.needs_input_grad[5:]
            try:
                gradients = launchers()[1](dy, x, weight, bias, slope, statistics, needs, False, residual)
            except Exception as error:
                route.fall_back(error, x.device)
        if gradients is None:
            gradients = reference.backward(dy, x, weight, bias, slope, ctx.eps, residual)
        return (*gradients[:4], None, *gradients[4:])


@lru_cache(maxsize=1)
def launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The launchers of the forward and of the backward; triton is imported here, at the first fused call."""
    from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
    from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward

    return instance_norm_prelu_forward, instance_norm_prelu_backward


def _positions(x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | float) -> int:
    """The number S of spatial positions of x, or 0 if a parameter of another class needs the eager route.

    Raises if x or a parameter has a wrong type, shape, dtype or device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) < 3:
        raise ValueError(f"x must be (N, C, *spatial) with at least one spatial axis, got shape {tuple(shape)}")
    C = shape[1]
    rows = shape[0] * C
    if rows == 0:
        raise ValueError(f"x must have at least one sample and one channel, got shape {tuple(shape)}")
    if weight is not None and not fits(weight, x, C):
        return _unfit("weight", weight, x, (C,))
    if bias is not None and not fits(bias, x, C):
        return _unfit("bias", bias, x, (C,))
    if isinstance(slope, Tensor):
        if not (fits(slope, x, C) or fits(slope, x, 1)):
            return _unfit("slope", slope, x, (C, 1))
    elif not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a torch.Tensor or a number, got {type(slope).__name__}")
    return x.numel() // rows


def _check_residual(residual: Any, x: Tensor) -> None:
    """Raise if residual is not a tensor of x's shape, dtype and device."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    for what, came, needed in (
        ("shape", tuple(residual.shape), tuple(x.shape)),
        ("dtype", residual.dtype, x.dtype),
        ("device", residual.device, x.device),
    ):
        if came != needed:
            raise ValueError(f"residual must have x's {what} {needed}, got {came}")


def _unfit(name: str, parameter: Tensor, x: Tensor, lengths: tuple[int, ...]) -> int:
    """Raise the error for a parameter that does not fit x. 0 if its class alone speaks against the kernels."""
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
    route.use_eager(f"{name} is a {type(parameter).__name__}, not a plain torch.Tensor")
    return 0
