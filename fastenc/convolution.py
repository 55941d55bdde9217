"""The convolution beside the fused operation: its memory format, its live taps, and what it keeps for the backward.

A tap of the kernel that meets only padding contributes nothing. On the small maps at the deep end of an encoder most
taps are dead: 26 of 27 on a 1³ map, 19 of 27 on a 2³ map at stride 2. `convolve` runs the same convolution on the taps
that are alive, and as a matrix product where few positions are left. Under autograd it keeps x and the Parameter alone:
no weight that was cast, laid out or cut outlives a call.
"""

from __future__ import annotations

import operator
import os
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastenc.kernels.layout import MEMORY_FORMAT

from . import route
from .live_taps import ConvPlan, Window, plan_convolution
from .saved import save, saved

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PLAIN = frozenset(CONVOLUTIONS.values())  # and no subclass, which may do more
_TENSORS = frozenset((nn.Parameter, Tensor))


class Cuts(dict[tuple[Window, bool], Tensor]):
    """A frozen convolution's weight as matrices, by window and order of the columns: made once, kept."""

    def matrix(self, weight: Tensor, window: Window, dtype: torch.dtype, last: bool) -> Tensor:
        """The window's taps of weight, made at the first call; `refresh` cannot write to what inference mode made."""
        found = self.get((window, last))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self[window, last] = _matrix(weight, window, dtype, last)
        return found

    def refresh(self, weight: Tensor) -> None:
        """Take weight's numbers again, into the same memory."""
        for (window, last), matrix in self.items():
            matrix.copy_(_matrix(weight, window, matrix.dtype, last))


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, *spatial) laid out as (N, *spatial, C), where torch's convolutions have that layout: 2-D and 3-D."""
    memory_format = MEMORY_FORMAT.get(x.dim())
    if memory_format is None:
        return x
    if x.shape[1] == 1:
        # One channel is both layouts at once; cuDNN goes by the strides, so spell them out.
        return x.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)
    return x.contiguous(memory_format=memory_format)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions take x for channels-last: they go by the order of its strides."""
    if x.dim() not in MEMORY_FORMAT or x.is_contiguous():
        return False
    stride = [x.stride(axis) for axis in (1, *range(x.dim() - 1, 1, -1), 0)]
    return stride[0] > 0 and all(a <= b for a, b in pairwise(stride))


def plan_for(layer: Any, x: Tensor, fused: bool) -> tuple[Tensor, Tensor | None, ConvPlan] | None:
    """weight, bias and way of layer for x; None where layer(x) is to be called: torch's own way, or its own error."""
    if is_compiling():  # a choice by the size would be baked in, and a graph must hold at every size
        return None
    if type(layer) not in PLAIN or layer.padding_mode != "zeros" or type(layer.padding) is str:
        return None
    weight, bias = layer.weight, layer.bias  # a replica of nn.DataParallel has them as attributes, not as parameters
    if type(weight) not in _TENSORS or x.device != weight.device:
        return None
    if x.dtype != weight.dtype and compute_dtype(x) is None:
        return None
    device = _device(x) if torch.are_deterministic_algorithms_enabled() else x.device.type
    rest = layer.groups, weight.is_contiguous(), device, fused, "cuts" in layer.__dict__
    try:
        plan = plan_convolution(x.shape, weight.shape, layer.stride, layer.padding, layer.dilation, *rest)
    except TypeError:  # an option was set to an int or a list, which torch takes too
        options = [_per_axis(option, x.dim() - 2) for option in (layer.stride, layer.padding, layer.dilation)]
        plan = None if None in options else plan_convolution(x.shape, weight.shape, *options, *rest)
    return None if plan is None else (weight, bias, plan)


def _per_axis(option: Any, axes: int) -> tuple[int, ...] | None:
    """A convolution's option as one int for each axis, read as torch reads it; None if torch refuses it."""
    try:
        values = tuple(map(operator.index, option if isinstance(option, (list, tuple)) else (option,)))
    except TypeError:
        return None
    values = values * axes if len(values) == 1 else values
    return tuple(map(int, values)) if len(values) == axes else None


def _device(x: Tensor) -> str:
    """The kind of x's device in deterministic mode; an unknown kind where cuBLAS would refuse a product.

    In that mode torch raises at a matrix product on CUDA unless this variable is set. A convolution does not need it.
    """
    if x.is_cuda and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        return "cuda, no cuBLAS"
    return x.device.type


def convolve(layer: Any, x: Tensor, fused: bool) -> Tensor:
    """layer(x), for a caller that has asked `route` whether a hook could observe it.

    A layer that is no plain nn.Conv1d, 2d or 3d is called. On the fused route x is channels-last where torch has such a
    layout, and so is the result.
    """
    prepared = plan_for(layer, x, fused)
    if prepared is None:
        return layer(x)
    weight, bias, plan = prepared
    dtype = compute_dtype(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Convolution.apply(x, weight, bias, plan, dtype)
    return forward(x, weight, bias, plan, dtype, layer.__dict__.get("cuts"))


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs a convolution of x in, None where it leaves it alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class Convolution(torch.autograd.Function):
    """A convolution that keeps x and the Parameter for its backward, and no copy made of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: ConvPlan, dtype: torch.dtype | None
    ) -> Tensor:
        save(ctx, x, weight, bias)
        ctx.plan, ctx.dtype = plan, dtype
        return forward(x, weight, bias, plan, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, bias = saved(ctx)
        gradients = backward(dy, x, weight, bias, ctx.plan, ctx.dtype, ctx.needs_input_grad[:3])
        return (*gradients, None, None)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvPlan,
    dtype: torch.dtype | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """The convolution of x (N, in, *size) with weight (out, in, *kernel) by `plan`, in `dtype` (x's where None).

    y is channels-last where `plan` is fused, else in x's layout. cuts: where a frozen weight keeps its matrices.
    """
    if dtype is None:
        dtype = x.dtype
    else:
        x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if not plan.product_forward:
        layout = _layout(x, plan)
        weight = _laid_out(weight, layout, plan, dtype)
        padding = plan.cut_padding if plan.cuts else plan.padding
        y = torch.convolution(
            x, weight, bias, plan.stride, padding, plan.dilation, False, (0,) * len(padding), plan.groups
        )
        return y.contiguous(memory_format=layout)  # cuDNN's y is; some convolutions of a CPU know one layout only
    window = plan.window
    assert window is not None
    last = _channels_are_last(x, weight, plan)
    columns = _columns(x, window, plan.stride, last)
    make = _matrix if cuts is None else cuts.matrix
    matrix = make(weight, window, dtype, last)
    # A CPU reads the weight faster as the left factor: 11 ms instead of 17 for 1024×27648 by 16 columns on two cores.
    rows = torch.mm(matrix, columns.t()).t() if x.device.type == "cpu" else torch.mm(columns, matrix.t())
    return _as_volume(rows if bias is None else rows + bias, x, plan)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvPlan,
    dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias, each where `needs` asks for it, in the dtype and memory layout of what they belong to.

    Of x the gradient of x needs the shape, dtype and layout only.
    """
    # Transformed, it is torch's own backward on all taps, which takes many gradients at once. What follows can be
    # differentiated as it stands.
    transformed = route.transformed(dy)
    if plan.product_backward and not transformed:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _product_backward(dy, x, weight, bias, plan, dtype or x.dtype, needs)
        return _product_backward(dy, x, weight, bias, plan, dtype or x.dtype, needs)
    compute = dtype or x.dtype
    cut = plan.cuts and not transformed
    laid_out = weight.to(compute) if transformed else _laid_out(weight, _layout(x, plan), plan, compute)
    operands = dy, x.to(compute), laid_out
    if compute is torch.bfloat16 and x.is_cpu and x.dim() == 5:
        # torch 2.13 leaves parts of a bfloat16 Conv3d's weight gradient unwritten on a CPU that multiplies bfloat16.
        operands = dy.float(), operands[1].float(), operands[2].float()
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        *operands, None if bias is None else list(bias.shape), plan.stride,
        plan.cut_padding if cut else plan.padding, plan.dilation, False, (0,) * len(plan.stride), plan.groups, needs,
    )  # fmt: skip
    if needs[0]:
        dx = dx.to(x.dtype)
    if needs[1]:
        dweight = dweight.to(weight.dtype) if transformed else _gradient(dweight, weight, plan.window if cut else None)
    return dx, dweight, dbias.to(bias.dtype) if needs[2] and bias is not None else None


def _product_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvPlan,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    window = plan.window
    assert window is not None
    rows = dy.to(dtype).movedim(1, -1).reshape(-1, weight.shape[0])
    last = _channels_are_last(x, weight, plan)
    dx = dweight = dbias = None
    if needs[0]:
        dcolumns = torch.mm(rows, _matrix(weight, window, dtype, last))
        dx = _scattered(dcolumns, x, window, plan.stride, last).to(x.dtype).contiguous(memory_format=_layout(x, plan))
    if needs[1]:
        dmatrix = torch.mm(rows.t(), _columns(x.to(dtype), window, plan.stride, last))
        taps = [high - low for low, high in zip(window.low, window.high, strict=True)]
        shape = [weight.shape[0], *taps, weight.shape[1]] if last else [*weight.shape[:2], *taps]
        dmatrix = dmatrix.view(shape)
        dweight = _gradient(dmatrix.movedim(-1, 1) if last else dmatrix, weight, window)
    if needs[2] and bias is not None:
        dbias = rows.sum(0).to(bias.dtype)
    return dx, dweight, dbias


def _laid_out(weight: Tensor, layout: torch.memory_format, plan: ConvPlan, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, cut to the window, and channels-last where x is: one copy at most."""
    if plan.cuts:
        assert plan.window is not None
        weight = weight[plan.window.slices]
    if plan.fused or plan.cuts:
        return weight.to(dtype, memory_format=layout)
    return weight.to(dtype)


def _channels_are_last(x: Tensor, weight: Tensor, plan: ConvPlan) -> bool:
    """Whether a row of columns holds the channels of one tap beside each other, or the taps of one channel.

    The order that spares a copy of the weight; where it is copied anyway, the one that spares a copy of x.
    """
    if weight.is_contiguous() and plan.window is not None and plan.window.taps == prod(weight.shape[2:]):
        return False
    return not weight.is_contiguous() or not x.is_contiguous()


def _matrix(weight: Tensor, window: Window, dtype: torch.dtype, last: bool) -> Tensor:
    """The window's taps of weight (out, in, *kernel) as [out, in·taps], or [out, taps·in] where `last`."""
    cut = weight[window.slices]
    return (cut.movedim(1, -1) if last else cut).to(dtype, memory_format=torch.contiguous_format).flatten(1)


def _columns(x: Tensor, window: Window, stride: tuple[int, ...], last: bool) -> Tensor:
    """What the window's taps meet: [N·positions, in·taps], or [N·positions, taps·in] where `last`."""
    axes = len(stride)
    if any(before or after for before, after in window.padding):
        x = F.pad(x, [pad for pair in reversed(window.padding) for pad in pair])
    for axis in range(axes):
        x = x.unfold(2 + axis, window.high[axis] - window.low[axis], stride[axis])
    positions, taps = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    x = x.permute(0, *positions, *taps, 1) if last else x.permute(0, *positions, 1, *taps)
    return x.reshape(-1, x.shape[1 + axes :].numel())


def _scattered(dcolumns: Tensor, x: Tensor, window: Window, stride: tuple[int, ...], last: bool) -> Tensor:
    """The sum of dcolumns over all columns that an element of x stands in: `_columns` transposed."""
    axes = len(stride)
    taps = [high - low for low, high in zip(window.low, window.high, strict=True)]
    padded = [size + before + after for size, (before, after) in zip(x.shape[2:], window.padding, strict=True)]
    N, C = x.shape[:2]
    if last:
        d = dcolumns.view(N, *window.output, *taps, C).permute(0, -1, *range(1, 1 + 2 * axes))
    else:
        d = dcolumns.view(N, *window.output, C, *taps).movedim(1 + axes, 1)
    for axis in reversed(range(axes)):
        sizes = [N, C, *window.output[:axis], *padded[axis:], *taps[:axis]]
        if window.output[axis] == 1 and padded[axis] == taps[axis]:
            d = d.movedim(-1, 2 + axis).flatten(2 + axis, 3 + axis)  # every element stands in one column
        else:
            d = torch.ops.aten.unfold_backward(d, sizes, 2 + axis, taps[axis], stride[axis])
    if any(before or after for before, after in window.padding):
        d = F.pad(d, [-pad for pair in reversed(window.padding) for pad in pair])
    return d


def _as_volume(rows: Tensor, x: Tensor, plan: ConvPlan) -> Tensor:
    """Rows [N·positions, out] as (N, out, *output)."""
    assert plan.window is not None
    output = plan.window.output
    if prod(output) == 1:
        return rows.contiguous().view(*rows.shape, *output)
    return rows.unflatten(0, (x.shape[0], *output)).movedim(-1, 1).contiguous(memory_format=_layout(x, plan))


def _layout(x: Tensor, plan: ConvPlan) -> torch.memory_format:
    """The memory format of all tensors of a convolution of x.

    On the eager route it is x's, but a single sample is contiguous: of a channels-last dy, torch's backward of
    instance_norm on a CPU makes a wrong dx, and torch's own convolution of such an x may return contiguous tensors.
    """
    if plan.fused or (x.shape[0] > 1 and is_channels_last(x)):
        return MEMORY_FORMAT.get(x.dim(), torch.contiguous_format)
    return torch.contiguous_format


def _gradient(part: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """The gradient of the whole weight in its dtype and layout, from that of the window's taps: zero elsewhere."""
    if part.shape == weight.shape:
        if part.dtype == weight.dtype and part.stride() == weight.stride():
            return part
        return torch.empty_like(weight).copy_(part)
    assert window is not None
    whole = torch.zeros_like(weight)
    whole[window.slices].copy_(part)
    return whole
