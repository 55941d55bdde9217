"""What every launcher works out before it launches: from x's shape and strides once, then from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from .layout import layout
from .plan import Plan, make_plan

# Plans for CPU tensors (interpreted or compiled without a GPU) are those of an H100 or H200.
CPU_MULTIPROCESSORS = 132


@lru_cache(maxsize=4096)
def prepared(
    shape: Sequence[int], stride: Sequence[int], itemsize: int, device: int, backward: bool, residual: bool = False
) -> tuple[int, int, int, bool, Plan, dict[str, Any]] | None:
    """N, C, S, whether x is channels-last, the plan and the launch options made of it; None where x is not readable.

    device is `x.get_device()`: the number of the GPU, negative for a CPU.
    """
    found = layout(shape, stride)
    if found is None:
        return None
    N, C = shape[:2]
    S = 1
    for size in shape[2:]:
        S *= size
    channels_last = found == "channels_last"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else CPU_MULTIPROCESSORS
    plan = make_plan(N, C, S, itemsize, channels_last, sms, backward, residual)
    tile = {
        "BLOCK_S": plan.BLOCK_S,
        "BLOCK_C": plan.BLOCK_C,
        "VEC": plan.VEC,
        "CHANNELS_LAST": channels_last,
        "num_warps": plan.num_warps,
    }
    return N, C, S, channels_last, plan, tile


def elsewhere(device: int) -> bool:
    """Whether x's device, `x.get_device()`, is not the current GPU, to which triton launches."""
    return device >= 0 and torch.cuda.current_device() != device
