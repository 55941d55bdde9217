"""Timing one call: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 0.02  # much longer than the resolution of an event, much shorter than changes of the clock rate
LONG_SECONDS = 0.2
MOST_CALLS = 16  # of a sample, because all their inputs are in memory at the same time
CYCLES_PER_SECOND = 2e9  # at least any GPU's clock rate, so that a pause in cycles is never too short


@dataclass(frozen=True)
class Work:
    """What is timed: `call(*prepare())`, without the time of `prepare`.

    queued: keep the device busy until all calls of a sample are in its queue, so that the sample is the device's time
        alone. Otherwise the sample is what a user waits for, including host time during which the device is idle.
    """

    call: Callable[..., object]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    queued: bool = False


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(work: Work, calls: int, device: torch.device) -> float:
    """Seconds per call over `calls` calls in a row. All results stay alive, so each is written to its own memory."""
    inputs = [work.prepare() for _ in range(calls)]
    synchronize(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        results = [work.call(*arguments) for arguments in inputs]
        seconds = time.perf_counter() - begin
        del results
        return seconds / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if work.queued:
        torch.cuda._sleep(int(_host_seconds(work, device) * calls * 2 * CYCLES_PER_SECOND))
    start.record()
    results = [work.call(*arguments) for arguments in inputs]
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) * 1e-3 / calls


def _host_seconds(work: Work, device: torch.device) -> float:
    """Seconds that the host needs to put one call in the queue."""
    arguments = work.prepare()
    synchronize(device)
    begin = time.perf_counter()
    work.call(*arguments)
    seconds = time.perf_counter() - begin
    synchronize(device)
    return seconds


def calls_per_sample(work: Work, device: torch.device) -> int:
    """Warm `work` up until a call is no faster than the previous one; return how many calls make one sample.

    One call is enough if it takes long, because the cost of a first call is small in comparison.
    """
    seconds, before = sample(work, 1, device), math.inf
    for _ in range(10):
        if seconds > 0.95 * before or seconds > LONG_SECONDS:
            break
        before, seconds = seconds, sample(work, 1, device)
    calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))
    if calls > 1:
        sample(work, calls, device)  # grows the allocator's pool to the size that these calls need
    return calls
