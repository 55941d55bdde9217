"""The stem, a 5³ convolution of few channels, and several ways to make its output channels-last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.record import Workload
from . import encoder
from .encoder import Inputs
from .suite import EAGER, Baseline, Runner, Suite

Stem = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]  # takes x, the weight and the padding


def runner(inputs: Inputs, stem: Stem, exact: bool = False) -> Runner:
    """A runner of `stem`: forward under no_grad, or forward and the gradient of the weight."""
    network: Any = inputs.holding(inputs.plain, inputs.parameters)
    network.forward = lambda x: stem(x, network.weight, network.padding)
    return encoder.runner(inputs, network, exact=exact, queued=True)


def _contiguous(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A contiguous convolution, whose output is then converted to channels-last."""
    return encoder.as_channels_last(F.conv3d(x, weight, padding=padding))


def _channels_last(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A channels-last convolution."""
    return F.conv3d(encoder.as_channels_last(x), encoder.as_channels_last(weight), padding=padding)


def _padded(x: Tensor, weight: Tensor, padding: tuple[int, ...], channels: int) -> Tensor:
    """A channels-last convolution after zero padding x to this many channels."""
    wider = (0, 0, 0, 0, 0, 0, 0, channels - x.shape[1])
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
    cost=encoder.cost,
)
