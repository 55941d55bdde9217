"""A single sample on the eager route: never channels-last where torch's own convolution is contiguous.

On a CPU, torch's backward of instance_norm is wrong by 100 % if the batch is 1 and dy is channels-last.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastenc
from fastenc import convolution, live_taps

LAST = torch.channels_last_3d


@pytest.fixture(params=[False, True], ids=["chosen by size", "always a product"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param:
        for name in ("CPU_ONE_POSITION", "CPU_FORWARD", "CPU_BACKWARD"):
            monkeypatch.setattr(live_taps, name, 0)
    convolution.plan_convolution.cache_clear()
    yield
    convolution.plan_convolution.cache_clear()


ARRANGED: dict[str, Callable[[int, int, tuple[int, ...]], Tensor]] = {
    "contiguous": lambda N, C, size: torch.randn(N, C, *size),
    "channels-last": lambda N, C, size: torch.randn(N, C, *size).contiguous(memory_format=LAST),
    "transposed": lambda N, C, size: torch.randn(N, C, *size[::-1]).transpose(2, 4),
    "every other channel": lambda N, C, size: torch.randn(N, 2 * C, *size)[:, ::2],
    "channels-last, half the channels": lambda N, C, size: torch.randn(N, 2 * C, *size).contiguous(memory_format=LAST)[
        :, :C
    ],
    "expanded": lambda N, C, size: torch.randn(1, C, 1, 1, 1).expand(N, C, *size),
}


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("arrangement", ARRANGED)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (2, 3, 4), (1, 5, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(stride: int, size: tuple[int, ...], arrangement: str) -> None:
    x = ARRANGED[arrangement](1, 4, size)
    for memory_format in (torch.contiguous_format, LAST):
        layer = nn.Conv3d(4, 5, 3, stride, 1).to(memory_format=memory_format)
        results = []
        for call in (layer, lambda x, layer=layer: convolution.convolve(layer, x, False)):
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            results.append((y, *torch.autograd.grad(y, leaf, torch.randn(y.shape).contiguous(memory_format=LAST))))
        for torchs, ours in zip(*results, strict=True):
            assert ours.is_contiguous() or not torchs.is_contiguous()


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("arrangement", ["contiguous", "transposed", "every other channel"])
@pytest.mark.parametrize("size", [(1, 5, 6), (2, 3, 4)])
def test_a_network(size: tuple[int, ...], arrangement: str) -> None:
    """The gradients of one sample are those of two samples alike, each of half the weight."""
    net = nn.Sequential(*(fastenc.ConvModern3d(4, 4) for _ in range(3)))
    x = ARRANGED[arrangement](1, 4, size)
    found = []
    for copies in (1, 2):
        leaf = x.detach().requires_grad_()
        y = net(torch.cat([leaf] * copies)) if copies > 1 else net(leaf)
        dy = torch.linspace(-1, 1, y[0].numel()).view(1, *y.shape[1:]).expand_as(y) / copies
        found.append(torch.autograd.grad(y, [leaf, *net.parameters()], dy))
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-4 * (two.norm() + 1)
