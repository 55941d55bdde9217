"""The formula in plain torch: the eager route, the oracle of the tests and the baseline of the benchmarks.

With mean and variance of each (n, c) over its S spatial positions:
    rstd = 1/√(variance + eps),  x̂ = (x − mean)·rstd,  z = x̂·weight + bias,  y = z where z > 0 else slope·z
and with a residual r, z + r in place of z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | float = 0.25,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """y by torch's own two operations. x (N, C, *spatial); weight, bias (C,) or None; slope (C,), (1,) or a number.

    residual: of x's shape and dtype, or None.
    """
    if any(parameter is not None and parameter.dtype != x.dtype for parameter in (weight, bias)):
        # instance_norm takes float32 parameters with a low-precision x, and otherwise one dtype only.
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    z = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if residual is not None:
        z = z + residual
    if isinstance(slope, Tensor):
        # prelu takes one dtype only.
        return F.prelu(z, slope if slope.dtype == z.dtype else slope.to(z.dtype))
    return F.leaky_relu(z, slope)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | float = 0.25,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias and dslope in closed form, and dr if there is a residual. None for a parameter that is None.

    These are differentiable operations of x, dy and the parameters, so double backward works. It does not if
    `statistics` are given, which replace eps. bfloat16 and float16 are computed in float32.
    """
    axes = tuple(range(2, x.dim()))
    per_channel = (1, -1) + (1,) * len(axes)
    wide = torch.promote_types(x.dtype, torch.float32)

    def wider(parameter: Tensor) -> Tensor:
        return parameter.to(wide).reshape(per_channel)

    x_wide, dy_wide = x.to(wide), dy.to(wide)
    if statistics is None:
        centered = x_wide - x_wide.mean(axes, keepdim=True)
        centered = centered - centered.mean(axes, keepdim=True)  # the part of the mean that rounding lost
        constant = x_wide.amax(axes, keepdim=True) == x_wide.amin(axes, keepdim=True)
        variance = centered.square().mean(axes, keepdim=True)
        rstd = _reciprocal_deviation(torch.where(constant, 0.0, variance), eps)
    else:
        mean, rstd = statistics.view(2, *x.shape[:2], *(1,) * len(axes))
        centered = x_wide - mean
    xhat = centered * rstd
    z = xhat if weight is None else xhat * wider(weight)
    z = z if bias is None else z + wider(bias)
    z = z if residual is None else z + residual.to(wide)
    # torch's own backward of the activation, whose second derivative is zeros as in torch, and not None.
    if isinstance(slope, Tensor):
        dz, by_slope = torch.ops.aten._prelu_kernel_backward(dy_wide, z, wider(slope))
    else:
        dz = torch.ops.aten.leaky_relu_backward(dy_wide, z, slope, False)
    dxhat = dz if weight is None else dz * wider(weight)
    dx = rstd * (dxhat - dxhat.mean(axes, keepdim=True) - xhat * (dxhat * xhat).mean(axes, keepdim=True))
    over = (0, *axes)
    dweight = None if weight is None else (dz * xhat).sum(over).to(weight.dtype)
    dbias = None if bias is None else dz.sum(over).to(bias.dtype)
    dslope = None
    if isinstance(slope, Tensor):
        dslope = by_slope.sum(over).to(slope.dtype)
        dslope = dslope.sum(0, True) if slope.numel() == 1 else dslope
    gradients = dx.to(x.dtype), dweight, dbias, dslope
    return gradients if residual is None else (*gradients, dz.to(residual.dtype))


def statistics(x: Tensor, eps: float) -> Tensor:
    """(2, N·C) in float32: mean and rstd of each (n, c), as the kernels keep them for the backward."""
    rows = x.float().flatten(2)
    variance, mean = torch.var_mean(rows, dim=2, correction=0)
    variance = torch.where(rows.amax(2) == rows.amin(2), 0.0, variance)
    return torch.stack((mean.flatten(), _reciprocal_deviation(variance, eps).flatten()))


def _reciprocal_deviation(variance: Tensor, eps: float) -> Tensor:
    """1/√(variance + eps). It and its derivatives are 0 if both are 0, as in torch's own kernels."""
    total = variance + eps
    return torch.rsqrt(torch.where(total == 0, torch.inf, total))
