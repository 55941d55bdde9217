"""Convolutions on small maps under pytest-benchmark: torch's with all taps, and fastenc's without padding-only taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastenc.bench.engine.timing import Work
from fastenc.bench.suites.timed_calls import DEVICE, run
from fastenc.convolution import convolve

WIDE = 1024 if DEVICE.type == "cuda" else 256
# Map size and stride. Some maps leave most taps reading only padding, some use all taps, and one is large.
LAYERS = [(1, 1), (2, 2), (2, 1), (3, 2), (4, 1)]
ON_CUDA = DEVICE.type == "cuda"
METHODS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "all taps": lambda layer, x: layer(x),
    "live taps": lambda layer, x: convolve(layer, x, ON_CUDA),
}


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("size", "stride"), LAYERS, ids=lambda value: str(value))
@pytest.mark.parametrize("method", METHODS)
def test_convolution(benchmark: Any, method: str, size: int, stride: int, backward: bool, batch: int) -> None:
    layer = nn.Conv3d(WIDE, WIDE, 3, stride, padding=1, bias=False, device=DEVICE)
    x = torch.randn(batch, WIDE, size, size, size, device=DEVICE)
    if ON_CUDA:
        layer, x = layer.bfloat16(), x.bfloat16().contiguous(memory_format=torch.channels_last_3d)
    leaves = [x.requires_grad_(), layer.weight]
    dy = torch.randn_like(layer(x).detach())

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = METHODS[method](layer, x)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    mode = "forward+backward" if backward else "forward"
    run(benchmark, f"{WIDE} channels, {size}³, stride {stride}, batch {batch}, {mode}", Work(call))
