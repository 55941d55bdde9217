"""The first convolution on the fused route: one or three channels in, where a channels-last convolution is weakest.

Three ways to the same numbers. CHOICE names the one in force. It waits for its measurement: no GPU record exists yet
(`python -m fastenc.bench gpu` times all three), and "channels_last" is a prediction from the bytes, which are least.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastenc.kernels.layout import MEMORY_FORMAT

from . import route
from .convolution import compute_dtype, convolve, convolve_by, prepare

# channels_last: x is laid out channels-last and convolved. padded: with zero channels beside, up to a multiple of what
# tensor cores take. contiguous: x as it comes, contiguous, and the result laid out channels-last.
WAYS = ("channels_last", "padded", "contiguous")
CHOICE = "channels_last"

# Channels that a thread loads as 16 bytes: what cuDNN's channels-last kernels are made for.
CHANNEL_BYTES = 16


def stem(layer: nn.Module, x: Tensor, way: str = CHOICE) -> Tensor:
    """layer(x) with the result channels-last, where torch has such a layout: 2-D and 3-D.

    x (N, C, *spatial) in any layout. A layer that somebody watches, or that is no plain convolution, is called with x
    channels-last.

    Raises ValueError for a way that is not one of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(map(repr, WAYS))}, got {way!r}")
    if route.observed(layer) is not None:
        return layer(channels_last(x))
    if way == "contiguous" and x.dim() in MEMORY_FORMAT:
        return layer(x.contiguous()).contiguous(memory_format=MEMORY_FORMAT[x.dim()])
    x = channels_last(x)
    prepared = prepare(layer, x, True)
    if way == "padded" and prepared is not None:
        weight, bias, how = prepared
        missing = -x.shape[1] % (CHANNEL_BYTES // (compute_dtype(x) or x.dtype).itemsize)
        if missing and how.groups == 1:
            around = (0, 0) * (x.dim() - 2) + (0, missing)
            return convolve_by(F.pad(x, around), F.pad(weight, around), bias, how)
    return convolve(layer, x, True)


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, *spatial) laid out as (N, *spatial, C), where torch's convolutions have that layout: 2-D and 3-D."""
    memory_format = MEMORY_FORMAT.get(x.dim())
    if memory_format is None:
        return x
    if x.shape[1] == 1:
        # One channel is both layouts at once; cuDNN goes by the strides, so spell them out.
        return x.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)
    return x.contiguous(memory_format=memory_format)
