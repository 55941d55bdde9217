"""Gradients of convolution weights in an accelerated model have the strides that they have in the untouched one."""

import pytest
import torch
from support.backends import taken
from support.plain import assert_all_near
from support.small_models import assert_like_untouched, twins
from torch import Tensor, nn

NETS = {
    "one input channel": lambda: (nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 2, 1)),
    "one input channel, 2-D": lambda: (nn.Conv2d(1, 4, (3, 1), bias=False), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3)),
    "depthwise": lambda: (nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4), nn.Conv3d(4, 8, 3, groups=4, stride=2)),
    "one tap": lambda: (nn.Conv3d(1, 4, (1, 3, 3)), nn.InstanceNorm3d(4), nn.Conv3d(4, 5, 1, dilation=2)),
    "transposed to one channel": lambda: (
        nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.ConvTranspose3d(4, 1, 2, 2, output_padding=1),
    ),
    "transposed with groups": lambda: (
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=4, dilation=2),
    ),
}  # fmt: skip


def net_and_x(name: str) -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(*NETS[name]())
    return net, torch.randn(2, 1, *(9, 8, 7)[: net[0].weight.dim() - 2])


@pytest.mark.parametrize("name", NETS)
def test_strides_of_gradients(name: str) -> None:
    net, x = net_and_x(name)
    fast, untouched = twins(net)
    with taken("fused"):
        fast(x).square().sum().backward()
        assert_like_untouched(fast, untouched, x)
    untouched(x).square().sum().backward()
    for found, expected in zip(fast.parameters(), untouched.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert found.grad.stride() == expected.grad.stride()


def test_double_backward() -> None:
    net, x = net_and_x("one input channel")
    fast, untouched = twins(net)
    results = []
    with taken("fused"):
        for model in fast, untouched:
            (dweight,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
            results.append(torch.autograd.grad(dweight.square().sum(), model[0].weight)[0])
    assert_all_near(results[:1], results[1:])
