"""Peak memory on a GPU or a CPU, as PyTorch's allocators count it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .timing import synchronize


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes allocated during a call, above the level before it.

    On CUDA this is the allocator's peak counter; on a CPU, the running sum of the allocations and releases that the
    profiler records. Memory that cuDNN or oneDNN allocate themselves is not counted.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler prints each start and stop to stderr
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
    """The bytes of the storages of `tensors`; a shared storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
