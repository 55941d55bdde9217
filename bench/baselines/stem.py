"""The stem, a 5³ convolution of few channels, and several ways to make its output channels-last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.agreement import OUTPUT
from ..engine.floor import convolutions
from ..engine.record import Workload
from ..engine.timing import Work
from .suite import EAGER, Baseline, Runner, Suite

Stem = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]


class Inputs:
    """What all baselines of one workload share.

    Attributes:
        x: (N, in_planes, *spatial), float32, contiguous.
        weight, padding: the stem's.
        dy: the gradient of the output, float32, contiguous.

    Raises:
        ValueError: the workload has no network.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        if workload.network is None:
            raise ValueError(f"workload must have a network, got {workload}")
        self.workload, self.device = workload, device
        stem = convolutions(workload.network, workload.shape[2:])[0]
        generator = torch.Generator(device).manual_seed(3)
        self.x = torch.randn(workload.shape, generator=generator, device=device)
        shape = (stem.wide_out, stem.wide_in, *stem.kernel)
        weight = torch.randn(shape, generator=generator, device=device) / prod(shape[1:]) ** 0.5
        self.weight = nn.Parameter(weight)
        self.padding = tuple(k // 2 if k > 1 else 0 for k in stem.kernel)
        dy_shape = (workload.shape[0], stem.wide_out, *stem.output)
        self.dy = torch.randn(dy_shape, generator=generator, device=device)


def runner(inputs: Inputs, stem: Stem, exact: bool = False) -> Runner:
    """A runner of `stem`: forward under no_grad, or forward and the gradient of the weight."""
    x, weight, padding, dtype = inputs.x, inputs.weight, inputs.padding, getattr(torch, inputs.workload.dtype)
    autocast = torch.autocast(
        inputs.device.type, dtype, enabled=not exact and inputs.workload.precision.endswith(" autocast")
    )
    dy = inputs.dy.contiguous(memory_format=torch.channels_last_3d)  # the layout in which the next layer returns it

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            return stem(x, weight, padding)

    def forward_backward() -> tuple[Tensor, Tensor]:
        with autocast:
            y = stem(x, weight, padding)
        (dweight,) = torch.autograd.grad(y, weight, dy.to(y.dtype))
        return y.detach(), dweight

    def numbers() -> dict[str, Tensor]:
        if inputs.workload.mode == "forward":
            return {OUTPUT: forward()}
        y, dweight = forward_backward()
        return {OUTPUT: y, "dweight": dweight}

    call = forward if inputs.workload.mode == "forward" else forward_backward
    return Runner(numbers, Work(call, queued=True), lambda: [x, weight, dy])


def _contiguous(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A contiguous convolution, whose output is then converted to channels-last."""
    return F.conv3d(x, weight, padding=padding).contiguous(memory_format=torch.channels_last_3d)


def _channels_last(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A channels-last convolution."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight.contiguous(memory_format=torch.channels_last_3d), padding=padding)


def _padded(x: Tensor, weight: Tensor, padding: tuple[int, ...], channels: int) -> Tensor:
    """A channels-last convolution after zero padding x to this many channels."""
    missing = channels - x.shape[1]
    wider = (0, 0, 0, 0, 0, 0, 0, missing)
    return _channels_last(F.pad(x, wider), F.pad(weight, wider), padding)


def _narrower_than(channels: int) -> Callable[[Workload, torch.device], str | None]:
    """`Baseline.absent` of a baseline that pads x to this many channels."""
    return lambda workload, device: (
        None if workload.shape[1] < channels else f"x already has {workload.shape[1]} channels"
    )


SUITE = Suite(
    inputs=Inputs,
    baselines={
        EAGER: Baseline(partial(runner, stem=_contiguous)),
        "channels_last_3d": Baseline(partial(runner, stem=_channels_last)),
        "padded to 4 channels": Baseline(partial(runner, stem=partial(_padded, channels=4)), absent=_narrower_than(4)),
        "padded to 8 channels": Baseline(partial(runner, stem=partial(_padded, channels=8)), absent=_narrower_than(8)),
    },
    exact=partial(runner, stem=_contiguous, exact=True),
)
