"""The first convolution on the Triton route: the convolution's numbers, channels-last, from an input in any layout."""

from typing import Any

import pytest
import torch
from support.plain import assert_all_near
from torch import Tensor, nn

from fastenc.convolution import channels_last, convolve
from fastenc.kernels.layout import MEMORY_FORMAT

LAYER: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (7, 6, 5)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_stem_gives_the_convolution(channels: int, order: int, last: bool) -> None:
    layer = LAYER[order](channels, 8, 5, padding=2)
    x = torch.randn(2, channels, *SIZE[:order])
    if last and order > 1:
        x = x.contiguous(memory_format=MEMORY_FORMAT[x.dim()])
    before = x.clone()
    results: list[list[Tensor]] = []
    for call in (lambda x: convolve(layer, channels_last(x), True), layer):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
    assert_all_near(*results)
    if order > 1:
        assert results[0][0].is_contiguous(memory_format=MEMORY_FORMAT[order + 2])
    assert torch.equal(x, before)


def test_under_autocast() -> None:
    layer, x = nn.Conv3d(3, 8, 5, padding=2), torch.randn(2, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, expected = convolve(layer, channels_last(x), True), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-7 * expected.abs().max().item())
