"""Which of the two memory layouts the kernels read a volume in. One function decides, from shape and strides alone.

Needs torch only, so that the fakes that torch.compile asks for strides can use it without triton.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MEMORY_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout(shape: Sequence[int], stride: Sequence[int]) -> str | None:
    """How x (N, C, *spatial) lies in memory: "contiguous", "channels_last" as (N, *spatial, C), or None, neither.

    A tensor that is both (C == 1, one spatial position) counts as contiguous.
    """
    axes = range(len(shape))
    if _packed(shape, stride, reversed(axes)):
        return "contiguous"
    if _packed(shape, stride, (1, *reversed(axes[2:]), 0)):
        return "channels_last"
    return None


def _packed(shape: Sequence[int], stride: Sequence[int], axes: Iterable[int]) -> bool:
    """Whether the elements lie side by side when `axes` run from the fastest to the slowest."""
    elements = 1
    for axis in axes:
        if shape[axis] != 1:
            if stride[axis] != elements:
                return False
            elements *= shape[axis]
    return True


def readable(x: Tensor) -> Tensor:
    """x in a layout that the kernels read: itself, or a copy, channels-last where torch has a format of that name."""
    if layout(x.shape, x.stride()) is not None:
        return x
    return x.contiguous(memory_format=MEMORY_FORMAT.get(x.dim(), torch.contiguous_format))


def like(dy: Tensor, x: Tensor) -> Tensor:
    """dy, of x's shape, in x's layout: itself where it already is, else a copy."""
    if dy.stride() == x.stride() or layout(dy.shape, dy.stride()) == layout(x.shape, x.stride()):
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)
