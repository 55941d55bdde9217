"""What every launcher works out before it launches: from x's shape and strides once, then from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .layout import layout
from .plan import Plan, make_plan

# Plans for CPU tensors (interpreted or compiled without a GPU) are those of an H100 or H200.
CPU_MULTIPROCESSORS = 132


@lru_cache(maxsize=4096)
def prepared(
    shape: Sequence[int], stride: Sequence[int], itemsize: int, device: int, backward: bool, residual: bool = False
) -> tuple[int, int, int, Plan, dict[str, Any], dict[str, Any]] | None:
    """N, C, S, the plan, launch options made of it, the same with BLOCK_K; None where x is not readable.

    device: `x.get_device()`, the number of the GPU, negative for a CPU.
    """
    found = layout(shape, stride)
    if found is None:
        return None
    N, C, S = shape[0], shape[1], prod(shape[2:])
    channels_last = found == "channels_last"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else CPU_MULTIPROCESSORS
    plan = make_plan(N, C, S, itemsize, channels_last, sms, backward, residual)
    options = {name: getattr(plan, name) for name in ("BLOCK_S", "BLOCK_C", "VEC", "num_warps")}
    options["CHANNELS_LAST"] = channels_last
    return N, C, S, plan, options, {**options, "BLOCK_K": plan.COMBINE_K}


def elsewhere(device: int) -> bool:
    """Whether x's device, `x.get_device()`, is not the current GPU, to which triton launches."""
    return device >= 0 and torch.cuda.current_device() != device


def side_by_side(tensor: Tensor) -> Tensor:
    """tensor with its elements side by side, as a kernel walks them: itself, or a copy."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def parameters_side_by_side(
    weight: Tensor | None, bias: Tensor | None, slope: Tensor | float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, int]:
    """weight, bias and slope as the kernels take them: the slope as a pointer, a number and the step of the pointer.

    A parameter may be a column of a table or an expanded scalar; a kernel reads element c at c.
    """
    if weight is not None:
        weight = side_by_side(weight)
    if bias is not None:
        bias = side_by_side(bias)
    if isinstance(slope, Tensor):
        return weight, bias, side_by_side(slope), 0.0, 1 if slope.numel() > 1 else 0
    return weight, bias, None, float(slope), 0
