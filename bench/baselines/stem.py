"""The stem, a convolution of one or three channels with a 5³ kernel, in the ways of getting channels-last out of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.agreement import OUTPUT
from ..engine.floor import convolutions
from ..engine.record import Workload
from ..engine.timing import Work
from .suite import EAGER, Candidate, Contest, Peer

Stem = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]


class Subject:
    """x (N, in_planes, *spatial), the stem's weight, padding and dy of the output's shape; all contiguous.

    Raises ValueError for a workload without a network.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        if workload.network is None:
            raise ValueError(f"workload: got {workload} without a network; its stem is needed")
        self.workload, self.device = workload, device
        stem = convolutions(workload.network, workload.shape[2:])[0]
        generator = torch.Generator(device).manual_seed(3)
        self.x = torch.randn(workload.shape, generator=generator, device=device)
        shape = (stem.wide_out, stem.wide_in, *stem.kernel)
        weight = torch.randn(shape, generator=generator, device=device) / weight_scale(shape)
        self.weight = nn.Parameter(weight)
        self.padding = tuple(k // 2 if k > 1 else 0 for k in stem.kernel)
        dy_shape = (workload.shape[0], stem.wide_out, *stem.output)
        self.dy = torch.randn(dy_shape, generator=generator, device=device)


def weight_scale(shape: tuple[int, ...]) -> float:
    """√fan-in of a weight of this shape."""
    return float(torch.Size(shape[1:]).numel()) ** 0.5


def candidate(subject: Subject, stem: Stem, exact: bool = False) -> Candidate:
    """A stem as a candidate: forward under no_grad, or forward and the gradient in the weight."""
    x, weight, padding, dtype = subject.x, subject.weight, subject.padding, getattr(torch, subject.workload.dtype)
    autocast = torch.autocast(
        subject.device.type, dtype, enabled=not exact and subject.workload.precision.endswith(" autocast")
    )
    dy = subject.dy.contiguous(memory_format=torch.channels_last_3d)  # as the units after it hand it back

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            return stem(x, weight, padding)

    def forward_backward() -> tuple[Tensor, Tensor]:
        with autocast:
            y = stem(x, weight, padding)
        (dweight,) = torch.autograd.grad(y, weight, dy.to(y.dtype))
        return y.detach(), dweight

    def numbers() -> dict[str, Tensor]:
        if subject.workload.mode == "forward":
            return {OUTPUT: forward()}
        y, dweight = forward_backward()
        return {OUTPUT: y, "dweight": dweight}

    call = forward if subject.workload.mode == "forward" else forward_backward
    return Candidate(numbers, Work(call, queued=True), lambda: [x, weight, dy])


def _contiguous(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Contiguous throughout, the output then laid out for what follows."""
    return F.conv3d(x, weight, padding=padding).contiguous(memory_format=torch.channels_last_3d)


def _channels_last(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Channels-last throughout."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight.contiguous(memory_format=torch.channels_last_3d), padding=padding)


def _padded(x: Tensor, weight: Tensor, padding: tuple[int, ...], channels: int) -> Tensor:
    """Channels-last throughout, with zero channels added up to `channels`."""
    missing = channels - x.shape[1]
    wider = (0, 0, 0, 0, 0, 0, 0, missing)
    return _channels_last(F.pad(x, wider), F.pad(weight, wider), padding)


def _narrower_than(channels: int) -> Callable[[Workload, torch.device], str | None]:
    def absent(workload: Workload, device: torch.device) -> str | None:
        return None if workload.shape[1] < channels else f"x has {workload.shape[1]} channels already"

    return absent


CONTEST = Contest(
    subject=Subject,
    peers={
        EAGER: Peer(partial(candidate, stem=_contiguous)),
        "channels_last_3d": Peer(partial(candidate, stem=_channels_last)),
        "padded to 4 channels": Peer(partial(candidate, stem=partial(_padded, channels=4)), absent=_narrower_than(4)),
        "padded to 8 channels": Peer(partial(candidate, stem=partial(_padded, channels=8)), absent=_narrower_than(8)),
    },
    exact=partial(candidate, stem=_contiguous, exact=True),
)
