"""The fused operation as `torch.library` operators, for the graphs of torch.compile and torch.export.

    fastenc::instance_norm_prelu           x, parameters, residual → y, statistics
    fastenc::instance_norm_prelu_backward  dy, x, parameters, statistics, residual → dx, dweight, dbias, dslope, dr

The residual may be None. The slope is a tensor, or it is None and `number` holds. The statistics are (2, N·C) in
float32: mean and rstd of each (n, c). An operator cannot return None, so a gradient that is not needed is empty.
Both operators end in the launchers of fastenc.kernels, and triton is imported at their first call. If a launch fails
because of the environment, for example without a C compiler, the operator computes the formula of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fastenc.kernels.layout import readable

from . import reference, route
from ._torch import forward_ad
from .saved import save, saved

NAME = "fastenc::instance_norm_prelu"
PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? slope, float number"

_library = torch.library.Library("fastenc", "DEF")
_library.define(
    f"instance_norm_prelu(Tensor x, {PARAMETERS}, float eps, ScalarType? dtype, Tensor? residual=None)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"instance_norm_prelu_backward(Tensor dy, Tensor x, {PARAMETERS}, Tensor statistics, bool[5] needs,"
    " Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    eps: float,
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    """y by the operator, which torch.compile and torch.export keep as one node and differentiate."""
    shared, number = (slope, 0.0) if isinstance(slope, Tensor) else (None, float(slope))
    return torch.ops.fastenc.instance_norm_prelu(x, weight, bias, shared, number, eps, dtype, residual)[0]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    number: float,
    eps: float,
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _refuse(x)
    shared = number if slope is None else slope
    if route.fault(x.device) is None:
        try:
            from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward

            return instance_norm_prelu_forward(x, weight, bias, shared, eps, dtype, residual=residual)
        except Exception as error:
            route.fall_back(error, x.device)
    y = reference.forward(x, weight, bias, shared, eps, residual)
    return _as_declared(y, x, dtype), reference.statistics(x, eps)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    number: float,
    statistics: Tensor,
    needs: Sequence[bool],
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _refuse(x)
    shared = number if slope is None else slope
    gradients = None
    if route.fault(x.device) is None:
        try:
            from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward

            gradients = instance_norm_prelu_backward(dy, x, weight, bias, shared, statistics, needs, residual=residual)
        except Exception as error:
            route.fall_back(error, x.device)
    if gradients is None:
        found = reference.backward(dy, x, weight, bias, shared, residual=residual, statistics=statistics)
        gradients = tuple(part if part is None or part.dim() == 1 else _as_declared(part, x) for part in found)
    dx, *others = gradients
    # The parameters' gradients share the memory of one tensor, which the outputs of an operator must not.
    others[:3] = [None if other is None else other.clone() for other in others[:3]]
    return tuple(
        gradient if need and gradient is not None else x.new_empty(0)
        for gradient, need in zip_longest((dx, *others), needs)  # without a residual there is no fifth gradient
    )


def _refuse(x: Tensor) -> None:
    """Raise if the kernels cannot run on x: a graph exported for another machine, or a tangent that would be lost."""
    if forward_ad._current_level >= 0:
        reason: str | None = route.FORWARD_MODE
    else:
        reason = route.device_reason(x) if route.fault(x.device) is None else None
    if reason is not None:
        raise RuntimeError(f"{NAME} runs as Triton kernels only, but {reason}")


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    number: float,
    eps: float,
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _alike(readable(x), dtype or x.dtype), x.new_empty((2, x.shape[0] * x.shape[1]), dtype=torch.float32)


def _as_declared(tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """tensor in the dtype and layout that the fake operator declared."""
    return _alike(readable(x), dtype or x.dtype).copy_(tensor)


def _alike(x: Tensor, dtype: torch.dtype) -> Tensor:
    """empty_like(x) for a dense x. The fake of empty_like chooses other strides on axes of length 1."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    number: float,
    statistics: Tensor,
    needs: Sequence[bool],
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    # The gradient of a parameter is contiguous, whatever the parameter's strides.
    parameters = [None if each is None else each.new_empty(each.shape) for each in (weight, bias, slope)]
    wanted = (_alike(readable(x), x.dtype), *parameters, None if residual is None else _alike(readable(x), x.dtype))
    return tuple(
        tensor if need and tensor is not None else x.new_empty(0) for tensor, need in zip(wanted, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, slope, ctx.number, ctx.eps, _, residual = inputs
    ctx.mark_non_differentiable(output[1])
    save(ctx, x, weight, bias, slope, output[1], residual)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, slope, statistics, residual = saved(ctx)
    # The backward operator is not differentiable. The formula serves double backward and batched gradients.
    if torch.is_grad_enabled() or route.transformed(dy):
        shared = ctx.number if slope is None else slope
        *gradients, dr = (*reference.backward(dy, x, weight, bias, shared, ctx.eps, residual), None)[:5]
    else:
        needs = [*ctx.needs_input_grad[:4], *(ctx.needs_input_grad[7:] or (False,))]  # torch drops a trailing None
        backward = torch.ops.fastenc.instance_norm_prelu_backward
        found = backward(dy, x, weight, bias, slope, ctx.number, statistics, needs, residual)
        *gradients, dr = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return (*gradients, None, None, None, dr)


_library.impl(NAME, _forward, "CompositeExplicitAutograd")
_library.impl(f"{NAME}_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake_forward, lib=_library)
torch.library.register_fake(f"{NAME}_backward", _fake_backward, lib=_library)
torch.library.register_autograd(NAME, _differentiate, setup_context=_save, lib=_library)
