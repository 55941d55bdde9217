"""The forward of a convolution whose weight has axes of length 1: one input channel, a group for each, or one tap.

An accelerated model gives its convolutions channels-last tensors. The gradient that torch then returns for such a
weight has the weight's order in memory, but other strides on the axes of length 1. nn.parallel.DistributedDataParallel
reports the difference. Here the gradient has the weight's own strides, as it has for contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import route
from .modules import Forward

Options = tuple[str, ...]
_CONVOLUTION: Options = ("stride", "padding", "dilation", "groups")
_TRANSPOSED: Options = ("stride", "padding", "output_padding", "groups", "dilation")
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Options]] = {
    nn.Conv2d: (nn.functional.conv2d, _CONVOLUTION),
    nn.Conv3d: (nn.functional.conv3d, _CONVOLUTION),
    nn.ConvTranspose2d: (nn.functional.conv_transpose2d, _TRANSPOSED),
    nn.ConvTranspose3d: (nn.functional.conv_transpose3d, _TRANSPOSED),
}


class Convolution(Forward):
    """A convolution that returns its weight's gradient in the weight's strides."""

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as torch.nn names it
        module = self.module
        weight = module.weight
        if (
            args or kwargs or is_compiling() or not torch.is_grad_enabled() or not weight.requires_grad
            or module.padding_mode != "zeros" or not weight.is_contiguous() or route.reason(input)
        ):  # fmt: skip
            return self.plainly(input, *args, **kwargs)
        function, options = _FUNCTIONS[type(module)]
        return function(input, _Contiguous.apply(weight), module.bias, *(getattr(module, name) for name in options))


def has_free_strides(module: Any) -> bool:
    """Whether module is a convolution of torch.nn whose weight is both contiguous and channels-last."""
    if type(module) not in _FUNCTIONS:
        return False
    shape = module.weight.shape
    return bool(shape[1] == 1 or shape[2:].numel() == 1)


class _Contiguous(torch.autograd.Function):
    """weight itself, and its gradient with the strides of a contiguous tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (dweight,) = gradients
        return dweight.flatten().view(dweight.shape)
