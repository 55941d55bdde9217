"""Memory at its peak, as PyTorch's own allocators count it, on a GPU and on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .timing import synchronize


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call allocates at most at one time, above what there was before it.

    On CUDA its allocator's peak counter; on a CPU the running sum of every allocation and release that the profiler
    notes. What cuDNN or oneDNN allocate by themselves is seen by neither.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces every start and stop on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = call()
    del result
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of `tensors`."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
