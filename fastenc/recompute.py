"""A unit that saves one tensor for its backward instead of two: its input.

Eager PyTorch saves three: the inputs of the norm, of the activation and of the convolution. The fused operation needs
the first and the last. Here the backward recomputes the last, the activated tensor, bitwise. It uses that tensor for
the gradient of the convolution's weight and frees it. Then it computes the gradient of the convolution's input and
writes dx over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import convolution, reference, route
from .convolution import ConvPlan
from .functional import launched_forward, launchers
from .saved import save, saved


class RecomputedUnit(torch.autograd.Function):
    """norm → activation → convolution by `plan`, on the Triton route. Saves x, the statistics and the Parameters.

    dtypes: those to which autocast casts the activated tensor and the convolution, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | float,
        eps: float,
        convolution_weight: Tensor,
        convolution_bias: Tensor | None,
        plan: ConvPlan,
        dtypes: tuple[torch.dtype | None, torch.dtype | None],
    ) -> Tensor:
        y, statistics = launched_forward(x, weight, bias, slope, None, eps, dtypes[0])
        shared = slope if isinstance(slope, Tensor) else None
        save(ctx, x, weight, bias, shared, convolution_weight, statistics)
        ctx.bias_dtype = None if convolution_bias is None else convolution_bias.dtype
        ctx.slope, ctx.eps, ctx.plan, ctx.dtypes = None if shared is not None else slope, eps, plan, dtypes
        return convolution.forward(y, convolution_weight, convolution_bias, plan, dtypes[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        *tensors, statistics = saved(ctx)
        if statistics is None or torch.is_grad_enabled() or route.transformed(dout):
            return _by_the_formula(ctx, dout, tensors)
        return _by_the_kernels(ctx, dout, tensors, statistics)


def _by_the_kernels(ctx: Any, dout: Tensor, tensors: list[Any], statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, slope, convolution_weight = tensors
    slope = ctx.slope if slope is None else slope
    plan, (dtype, compute_dtype) = ctx.plan, ctx.dtypes
    needs = ctx.needs_input_grad
    dweight = dbias = None
    # Only launches fall back to the formula. An error of the convolution is not the kernels' fault.
    if needs[5] or needs[6]:
        try:
            y = launchers()[0](x, weight, bias, slope, ctx.eps, dtype, statistics=statistics)[0]
        except Exception as error:
            route.fall_back(error, x.device)
            return _by_the_formula(ctx, dout, tensors)
        _, dweight, dbias = convolution.backward(
            dout, y, convolution_weight, ctx.bias_dtype, plan, compute_dtype, (False, needs[5], needs[6])
        )
        del y
    if not any(needs[:4]):
        return None, None, None, None, None, dweight, dbias, None, None
    # The second argument gives shape, dtype and layout only. x has those of the activated tensor, except for the dtype
    # under autocast.
    like = x if dtype in (None, x.dtype) else torch.empty_like(x, dtype=dtype)
    dy = convolution.backward(
        dout, like, convolution_weight, ctx.bias_dtype, plan, compute_dtype, (True, False, False)
    )[0]
    try:
        gradients = launchers()[1](dy, x, weight, bias, slope, statistics, needs[:4], in_place=True)
    except Exception as error:
        route.fall_back(error, x.device)
        return _by_the_formula(ctx, dout, tensors)
    return (*gradients, None, dweight, dbias, None, None)


def _by_the_formula(ctx: Any, dout: Tensor, tensors: list[Any]) -> tuple[Tensor | None, ...]:
    """The gradients by plain operations, which support double backward and batched gradients."""
    x, weight, bias, slope, convolution_weight = tensors
    slope = ctx.slope if slope is None else slope
    plan, (dtype, compute_dtype) = ctx.plan, ctx.dtypes
    needs = ctx.needs_input_grad
    with torch.autocast(x.device.type, enabled=False):
        y = reference.forward(x, weight, bias, slope, ctx.eps)
        dy, dweight, dbias = convolution.backward(
            dout, y if dtype is None else y.to(dtype), convolution_weight, ctx.bias_dtype, plan, compute_dtype,
            (any(needs[:4]), needs[5], needs[6]),
        )  # fmt: skip
        gradients = (None,) * 4 if dy is None else reference.backward(dy, x, weight, bias, slope, ctx.eps)
    return (*gradients, None, dweight, dbias, None, None)
