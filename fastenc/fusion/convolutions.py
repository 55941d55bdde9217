"""The forwards of convolutions in an accelerated model. They serve two purposes.

A bias that a norm cancels: the norm subtracts the mean, so the bias of a convolution that only an InstanceNorm reads
has no effect and a gradient of zero. torch adds it in a pass over the output, and sums its gradient in another pass.
Here the convolution runs without it (`unbiased.py`), and the gradient is exact zeros.

A weight with axes of length 1, that is one input channel, a group for each channel, or one tap: an accelerated model
gives its convolutions channels-last tensors. The gradient that torch then returns for such a weight has the weight's
order in memory, but other strides on the axes of length 1. nn.parallel.DistributedDataParallel reports the difference.
Here the gradient has the weight's own strides, as it has for contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import route
from .._torch import saved_tensors_hooks
from ..convolution import WeightAlone, is_untouched
from .modules import Forward
from .pending import may_wait
from .unbiased import PendingBias, biased, running, unbiased

Options = tuple[str, ...]
_CONVOLUTION: Options = ("stride", "padding", "dilation", "groups")
_TRANSPOSED: Options = ("stride", "padding", "output_padding", "groups", "dilation")
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Options]] = {
    nn.Conv1d: (nn.functional.conv1d, _CONVOLUTION),
    nn.Conv2d: (nn.functional.conv2d, _CONVOLUTION),
    nn.Conv3d: (nn.functional.conv3d, _CONVOLUTION),
    nn.ConvTranspose1d: (nn.functional.conv_transpose1d, _TRANSPOSED),
    nn.ConvTranspose2d: (nn.functional.conv_transpose2d, _TRANSPOSED),
    nn.ConvTranspose3d: (nn.functional.conv_transpose3d, _TRANSPOSED),
}
CONVOLUTIONS = tuple(_FUNCTIONS)


class Convolution(Forward):
    """A convolution. cancelled: its name in the model, if a norm cancels its bias. mends: the strides of gradients."""

    cancelled = ""
    mends = False

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # torch.nn's name
        module = self.module
        if (
            args or kwargs or not (self.cancelled or self.mends)
            or not is_untouched(module) or module.padding_mode != "zeros" or route.reason(input)
        ):  # fmt: skip
            return self.plainly(input, *args, **kwargs)
        weight, bias = module.weight, module.bias
        differentiates = torch.is_grad_enabled() and weight.requires_grad
        mends = self.mends and differentiates and not is_compiling() and weight.is_contiguous()
        drops = bias is not None and self._cancels() and (differentiates or not torch.is_grad_enabled())
        if not (mends or drops):
            return self.plainly(input)
        if differentiates:
            weight = WeightAlone.apply(weight, bias if drops else None, mends)
        function, options = _FUNCTIONS[type(module)]
        y = function(input, weight, None if drops else bias, *(getattr(module, name) for name in options))
        if not drops:
            return y
        if is_compiling():
            return PendingBias(self.cancelled, partial(biased, bias=bias, axes=weight.dim() - 2), y, ())
        return unbiased(y, bias, weight.dim() - 2)

    def _cancels(self) -> bool:
        """Whether a norm reads the output of this call, and no hook on the way does."""
        if not self.cancelled:
            return False
        if is_compiling():
            return may_wait(self.cancelled)
        return bool(
            (running.scopes or saved_tensors_hooks(True))
            and torch.is_grad_enabled() == running.grad_mode  # a reentrant checkpoint gives the output another history
            and self.cancelled not in running.observed
            and route.hook_reason(self.module) is None
        )


def has_free_strides(module: Any) -> bool:
    """Whether module is a convolution of torch.nn whose weight is both contiguous and channels-last."""
    if type(module) not in _FUNCTIONS or module.weight.dim() < 4:
        return False
    shape = module.weight.shape
    return bool(shape[1] == 1 or shape[2:].numel() == 1)
