"""Which of the two memory layouts the kernels read a volume in. One function decides, from strides alone.

Needs torch only, so that the fakes that torch.compile asks for strides can use it without triton.
"""

import torch
from torch import Tensor

MEMORY_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) lies in memory as (N, *spatial, C). torch names this for 4-D and 5-D tensors only."""
    memory_format = MEMORY_FORMAT.get(x.dim())
    if memory_format is None:
        return x.movedim(1, -1).is_contiguous()
    return x.is_contiguous(memory_format=memory_format)


def readable(x: Tensor) -> tuple[Tensor, bool]:
    """x in a layout that the kernels read, and whether that is channels-last.

    A tensor that is both (C == 1, say) counts as contiguous. One that is neither is copied: to channels-last where
    torch has a format of that name, else to contiguous.
    """
    if x.is_contiguous():
        return x, False
    if is_channels_last(x):
        return x, True
    if x.dim() in MEMORY_FORMAT:
        x = x.contiguous(memory_format=MEMORY_FORMAT[x.dim()])
        return x, not x.is_contiguous()
    return x.contiguous(), False


def like(dy: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """dy, of x's shape, in x's layout: itself where it already is, else a copy."""
    if is_channels_last(dy) if channels_last else dy.is_contiguous():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)
