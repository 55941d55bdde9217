"""What every launcher asks of the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

# Plans for CPU tensors (interpreted or compiled without a GPU) are those of an H100 or H200.
CPU_MULTIPROCESSORS = 132

_NOTHING = nullcontext()


@lru_cache(maxsize=64)
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    return _cuda_multiprocessors(x.get_device()) if x.is_cuda else CPU_MULTIPROCESSORS


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one, to which triton launches; costs nothing where it already is."""
    if not x.is_cuda or torch.cuda.current_device() == x.get_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def slope_arguments(slope: Tensor | float) -> tuple[Tensor | None, float, int]:
    """What a kernel takes for a slope: pointer, number, and the step from one channel's slope to the next."""
    if isinstance(slope, Tensor):
        return slope, 0.0, int(slope.numel() > 1)
    return None, float(slope), 0
