"""The three ways of the first convolution: the same numbers, the result channels-last, and the choice in force."""

from typing import Any

import pytest
import torch
from support.plain import assert_all_near
from torch import Tensor, nn

from fastenc.kernels.layout import MEMORY_FORMAT
from fastenc.stem import CHOICE, WAYS, stem

LAYER: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (7, 6, 5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_every_way_gives_the_convolution(way: str, channels: int, order: int, last: bool) -> None:
    layer = LAYER[order](channels, 8, 5, padding=2)
    x = torch.randn(2, channels, *SIZE[:order])
    if last and order > 1:
        x = x.contiguous(memory_format=MEMORY_FORMAT[x.dim()])
    before = x.clone()
    results: list[list[Tensor]] = []
    for call in (lambda x: stem(layer, x, way), layer):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
    assert_all_near(*results)
    if order > 1:
        assert results[0][0].is_contiguous(memory_format=MEMORY_FORMAT[order + 2])
    assert torch.equal(x, before)


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast(way: str) -> None:
    layer, x = nn.Conv3d(3, 8, 5, padding=2), torch.randn(2, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, expected = stem(layer, x, way), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_sees_the_call(way: str) -> None:
    layer, x = nn.Conv3d(3, 8, 5, padding=2), torch.randn(2, 3, *SIZE)
    seen: list[torch.Size] = []
    layer.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    torch.testing.assert_close(stem(layer, x, way), layer(x))
    assert seen == [x.shape, x.shape]


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match=r"way.*channels_last.*'wide'"):
        stem(nn.Conv3d(1, 1, 3), torch.randn(1, 1, 3, 3, 3), "wide")
    assert CHOICE in WAYS
