"""The convolution next to the fused operation: its memory format, its padding-only taps, its backward.

A tap of the kernel that meets only padding contributes nothing. Most taps are such on the small maps at the deep end of
an encoder: 26 of 27 on a 1³ map, 19 of 27 on a 2³ map at stride 2. `convolve` runs the same convolution on the other
taps, the live ones. Where few positions are left it is a matrix product. Under autograd only x and the Parameter are
kept. No copy of the weight outlives a call, whether it was cast, converted to channels-last or cut.
"""

from __future__ import annotations

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
from ._torch import CONV_FORWARD
from .live_taps import ConvPlan, Window, plan_convolution

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PLAIN = frozenset(CONVOLUTIONS.values())  # and no subclass, which may do more
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# As torch defines them: other code may have replaced them since fastenc was imported.
_METHODS = {kind: (kind.forward, getattr(kind, CONV_FORWARD, None)) for kind in (*PLAIN, *_TRANSPOSED)}
_TENSORS = frozenset((nn.Parameter, Tensor))


class Cuts(dict[tuple[Window, torch.dtype, bool], Tensor]):
    """The matrices that a frozen convolution keeps of its weight, by window, dtype and order of the columns."""

    def matrix(self, weight: Tensor, window: Window, dtype: torch.dtype, last: bool) -> Tensor:
        """The window's taps of weight, made once and outside inference mode, so that `refresh` can write to them."""
        found = self.get((window, dtype, last))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self[window, dtype, last] = _matrix(weight, window, dtype, last)
        return found

    def refresh(self, weight: Tensor) -> None:
        """Copy weight's numbers into the same memory again."""
        for (window, dtype, last), matrix in self.items():
            matrix.copy_(_matrix(weight, window, dtype, last))


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, *spatial) in channels-last memory format if it is 2-D or 3-D. torch has none for 1-D: x itself."""
    memory_format = MEMORY_FORMAT.get(x.dim())
    if memory_format is None:
        return x
    if x.shape[1] == 1:
        # A tensor of one channel has both layouts. cuDNN looks at the strides, so they are set here.
        return x.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)
    return x.contiguous(memory_format=memory_format)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions treat x as channels-last. They look at the order of its strides."""
    if x.dim() not in MEMORY_FORMAT or x.is_contiguous():
        return False
    stride = [x.stride(axis) for axis in (1, *range(x.dim() - 1, 1, -1), 0)]
    return stride[0] > 0 and all(a <= b for a, b in pairwise(stride))


def is_untouched(layer: Any) -> bool:
    """Whether layer computes what torch's convolution of exactly its class does: none of its methods was replaced."""
    kind = type(layer)
    if kind not in _METHODS or CONV_FORWARD in layer.__dict__:
        return False
    forward, inner = _METHODS[kind]
    return kind.forward is forward and getattr(kind, CONV_FORWARD, None) is inner


def plan_for(layer: Any, x: Tensor, fused: bool) -> tuple[Tensor, Tensor | None, ConvPlan] | None:
    """The weight, bias and plan of layer for x. None if layer(x) is to be called, which may raise torch's own error."""
    if is_compiling():  # the choice depends on the size, and a graph must hold for every size
        return None
    if type(layer) not in PLAIN or not is_untouched(layer):
        return None
    if layer.padding_mode != "zeros" or type(layer.padding) is str:
        return None
    weight, bias = layer.weight, layer.bias  # a replica of nn.DataParallel has them as attributes, not as parameters
    if type(weight) not in _TENSORS or x.device != weight.device:
        return None
    if (x.dtype != weight.dtype and autocast_dtype(x) is None) or (not fused and x.is_complex()):
        return None
    device = _device(x) if torch.are_deterministic_algorithms_enabled() else x.device.type
    # torch 2.13 leaves parts of a bfloat16 Conv3d's weight gradient unwritten on a CPU that multiplies bfloat16.
    mended = x.is_cpu and x.dim() == 5 and (autocast_dtype(x) or x.dtype) is torch.bfloat16
    rest = layer.groups, weight.is_contiguous(), device, fused, "cuts" in layer.__dict__, mended
    try:
        plan = plan_convolution(x.shape, weight.shape, layer.stride, layer.padding, layer.dilation, *rest)
    except TypeError:  # an option was set to a list, which torch takes too, and which cannot be hashed
        return None
    return None if plan is None else (weight, bias, plan)


def _device(x: Tensor) -> str:
    """The kind of x's device in deterministic mode. An unknown kind if a matrix product would raise there.

    In that mode torch raises at a matrix product on CUDA unless this variable is set. A convolution does not need it.
    """
    if x.is_cuda and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        return "cuda, no cuBLAS"
    return x.device.type


def convolve(layer: Any, x: Tensor, fused: bool) -> Tensor:
    """The first result of `convolved`."""
    return convolved(layer, x, fused)[0]


def convolved(layer: Any, x: Tensor, fused: bool, cancelled: bool = False) -> tuple[Tensor, bool]:
    """layer(x), for a caller that has checked for hooks, and whether it is fresh: made here, and seen by no other code.

    A layer that is not exactly an nn.Conv1d, 2d or 3d is called. On the fused route x and the result are channels-last
    in 2-D and 3-D. cancelled: an InstanceNorm is next, which subtracts any bias, so the layer may run without its own.
    """
    prepared = plan_for(layer, x, fused)
    if prepared is None:
        return layer(x), False
    weight, bias, plan = prepared
    if cancelled and bias is not None:
        if torch.is_grad_enabled():
            weight = WeightAlone.apply(weight, bias, False)
        bias = None
    dtype = autocast_dtype(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Convolution.apply(x, weight, bias, plan, dtype), True
    return forward(x, weight, bias, plan, dtype, layer.__dict__.get("cuts")), True


class WeightAlone(torch.autograd.Function):
    """weight, for a convolution that runs without its bias. The bias's gradient is zeros.

    mends: weight's gradient gets the strides of a contiguous tensor.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, mends: bool) -> Tensor:
        ctx.bias = None if bias is None or not bias.requires_grad else (bias.shape, bias.dtype)
        ctx.mends = mends
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dweight,) = gradients
        dbias = None
        if ctx.bias is not None:
            shape, dtype = ctx.bias
            dbias = dweight.new_zeros(shape, dtype=dtype)
        return (dweight.flatten().view(dweight.shape) if ctx.mends else dweight), dbias, None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs a convolution or PReLU of x. None if autocast does not change it."""
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # the last takes five times as long to ask
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


class Convolution(torch.autograd.Function):
    """A convolution that saves x and the Parameter for its backward, and no copies of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: ConvPlan, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.dtype, ctx.bias_dtype = plan, dtype, None if bias is None else bias.dtype
        return forward(x, weight, bias, plan, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        gradients = backward(dy, x, weight, ctx.bias_dtype, ctx.plan, ctx.dtype, ctx.needs_input_grad[:3])
        return (*gradients, None, None)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvPlan,
    dtype: torch.dtype | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """The convolution of x (N, in, *size) with weight (out, in, *kernel) by `plan`, in `dtype`, or x's if None.

    y is channels-last if `plan` is fused, and otherwise has x's layout. cuts: the matrices of a frozen weight.
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
        return y.contiguous(memory_format=layout)  # no copy on CUDA; some CPU convolutions support one layout only
    window = plan.window
    assert window is not None
    last = _channels_are_last(x, weight, plan)
    columns = _columns(x, window, plan.stride, last)
    make = _matrix if cuts is None else cuts.matrix
    matrix = make(weight, window, dtype, last)
    # A CPU reads the weight faster as the left factor: 11 ms instead of 17 for 1024×27648 by 16 columns on two cores.
    rows = torch.mm(matrix, columns.t()).t() if x.device.type == "cpu" else torch.mm(columns, matrix.t())
    return _as_output(rows if bias is None else rows + bias, x, plan)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    plan: ConvPlan,
    dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias, each if `needs` asks for it, in the dtype and layout of x, weight and bias.

    bias_dtype: None without a bias. dx depends on the shape, dtype and layout of x, but not on its numbers.
    """
    # A transformed dy, for example many gradients at once, needs torch's own backward, on all taps.
    transformed = route.transformed(dy)
    if plan.product_backward and not transformed:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _product_backward(dy, x, weight, bias_dtype, plan, dtype or x.dtype, needs)
        return _product_backward(dy, x, weight, bias_dtype, plan, dtype or x.dtype, needs)
    compute = dtype or x.dtype
    cut = plan.cuts and not transformed
    laid_out = weight.to(compute) if transformed else _laid_out(weight, _layout(x, plan), plan, compute)
    operands = dy, x.to(compute), laid_out
    if compute is torch.bfloat16 and x.is_cpu and x.dim() == 5:  # see `plan_for`
        operands = dy.float(), operands[1].float(), operands[2].float()
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        *operands, None if bias_dtype is None else [weight.shape[0]], plan.stride,
        plan.cut_padding if cut else plan.padding, plan.dilation, False, (0,) * len(plan.stride), plan.groups, needs,
    )  # fmt: skip
    if needs[0]:
        dx = dx.to(x.dtype)
    if needs[1]:
        dweight = dweight.to(weight.dtype) if transformed else _gradient(dweight, weight, plan.window if cut else None)
    return dx, dweight, dbias.to(bias_dtype) if needs[2] and bias_dtype is not None else None


def _product_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
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
    if needs[2] and bias_dtype is not None:
        dbias = rows.sum(0).to(bias_dtype)
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
    """Whether the channels of one tap are adjacent in a row of columns. Otherwise the taps of one channel are.

    Chosen so that the weight is not copied, or, if it is copied anyway, so that x is not.
    """
    if weight.is_contiguous() and plan.window is not None and plan.window.taps == prod(weight.shape[2:]):
        return False
    return not weight.is_contiguous() or not x.is_contiguous()


def _matrix(weight: Tensor, window: Window, dtype: torch.dtype, last: bool) -> Tensor:
    """The window's taps of weight (out, in, *kernel) as [out, in·taps], or [out, taps·in] if `last`."""
    cut = weight[window.slices]
    return (cut.movedim(1, -1) if last else cut).to(dtype, memory_format=torch.contiguous_format).flatten(1)


def _columns(x: Tensor, window: Window, stride: tuple[int, ...], last: bool) -> Tensor:
    """The elements of x under the window's taps: [N·positions, in·taps], or [N·positions, taps·in] if `last`."""
    axes = len(stride)
    if any(before or after for before, after in window.padding):
        x = F.pad(x, [pad for pair in reversed(window.padding) for pad in pair])
    for axis in range(axes):
        x = x.unfold(2 + axis, window.high[axis] - window.low[axis], stride[axis])
    positions, taps = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    x = x.permute(0, *positions, *taps, 1) if last else x.permute(0, *positions, 1, *taps)
    return x.reshape(-1, x.shape[1 + axes :].numel())


def _scattered(dcolumns: Tensor, x: Tensor, window: Window, stride: tuple[int, ...], last: bool) -> Tensor:
    """For each element of x, the sum of dcolumns over the columns that hold it: the transpose of `_columns`."""
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
            d = d.movedim(-1, 2 + axis).flatten(2 + axis, 3 + axis)  # each element is in one column
        else:
            d = torch.ops.aten.unfold_backward(d, sizes, 2 + axis, taps[axis], stride[axis])
    if any(before or after for before, after in window.padding):
        d = F.pad(d, [-pad for pair in reversed(window.padding) for pad in pair])
    return d


def _as_output(rows: Tensor, x: Tensor, plan: ConvPlan) -> Tensor:
    """Rows [N·positions, out] as (N, out, *output): a tensor of the same memory, because views forbid some changes."""
    assert plan.window is not None
    output = plan.window.output
    if prod(output) == 1:
        y = rows.contiguous().view(*rows.shape, *output)
    else:
        y = rows.unflatten(0, (x.shape[0], *output)).movedim(-1, 1).contiguous(memory_format=_layout(x, plan))
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())


def _layout(x: Tensor, plan: ConvPlan) -> torch.memory_format:
    """The memory format of all tensors of a convolution of x.

    On the eager route it is x's, except that a single sample is contiguous. On a CPU, torch's backward of instance_norm
    returns a wrong dx for a channels-last dy, and its own convolution of such an x may return a contiguous y.
    """
    if plan.fused or (x.shape[0] > 1 and is_channels_last(x)):
        return MEMORY_FORMAT.get(x.dim(), torch.contiguous_format)
    return torch.contiguous_format


def _gradient(part: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """The gradient of the whole weight, in its dtype and layout. It is zero outside the window's taps."""
    if part.shape == weight.shape:
        if part.dtype == weight.dtype and part.stride() == weight.stride():
            return part
        return torch.empty_like(weight).copy_(part)
    assert window is not None
    whole = torch.zeros_like(weight)
    whole[window.slices].copy_(part)
    return whole
