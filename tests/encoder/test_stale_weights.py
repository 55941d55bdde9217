"""Weights changed behind autograd's version counters are what the very next call works with.

`.data` and a numpy view leave no version number. Frozen and graphed models alone keep what they took: test_freeze.py.
"""

from collections.abc import Callable

import pytest
import torch
from support.backends import taken
from support.plain import assert_all_near, gradients, small_input, small_twins
from torch import Tensor, nn

import fastenc

CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "clamped": lambda parameter: parameter.data.clamp_(-0.4, 0.4),
    "averaged": lambda parameter: parameter.data.lerp_(torch.full_like(parameter, 0.3), 0.5),
    "by numpy": lambda parameter: parameter.detach().numpy().__imul__(0.7),
}
either_route = pytest.mark.parametrize("route", ["eager", "fused"])


def change_all(change: Callable[[nn.Parameter], object], *modules: nn.Module) -> None:
    """Every parameter changed, and no version counter."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        version = parameter._version
        change(parameter)
        assert parameter._version == version


@pytest.mark.parametrize(("route", "recompute"), [("eager", False), ("fused", False), ("fused", True)])
def test_network(route: str, recompute: bool) -> None:
    """With gradients and without, each of which may keep what the other does not."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        for block in net.netbody[1:3]:
            block.conv_scale.recompute = recompute
        x = small_input(dtype=dtype)
        gradients(net, x)
        for change in CHANGES.values():
            with torch.no_grad():
                net(x)
            change_all(change, net, plain)
            with torch.no_grad():
                assert_all_near([net(x)], [plain(x)])
            assert_all_near(gradients(net, x), gradients(plain, x))


@either_route
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_live_taps(memory_format: torch.memory_format, route: str) -> None:
    """2³ positions at stride 2: a matrix product, whose weight is cut to 8 of 27 taps where it is channels-last."""
    layer = fastenc.ConvModern3d(64, 64, stride=2)
    with taken(route) as dtype:
        layer.to(dtype, memory_format=memory_format)
        plain, x = nn.Sequential(*layer.mconv), torch.randn(2, 64, 2, 2, 2, dtype=dtype)
        gradients(layer, x)
        for change in CHANGES.values():
            change_all(change, layer)
            assert_all_near(gradients(layer, x), gradients(plain, x))


@either_route
def test_operation(route: str) -> None:
    with taken(route) as dtype:
        x = torch.randn(2, 3, 4, 5, dtype=dtype)
        parameters = nn.ParameterList(torch.randn(3, dtype=dtype) for _ in range(3))

        def found() -> list[Tensor]:
            y = fastenc.instance_norm_prelu(x, *parameters)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), list(parameters))]

        found()
        for change in CHANGES.values():
            change_all(change, parameters)
            with torch.no_grad():
                kept = fastenc.instance_norm_prelu(x, *parameters)
            weight, bias, slope = (parameter.detach().clone() for parameter in parameters)
            y = nn.functional.prelu(nn.functional.instance_norm(x, weight=weight, bias=bias), slope)
            assert_all_near([kept, found()[0]], [y, y])
