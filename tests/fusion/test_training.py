"""Ten training steps of third-party networks, accelerated and untouched, eager and compiled, and a checkpoint."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_near
from test_custom_ops import Compiled
from test_third_party import BROKEN, LARGE, NETWORKS, network, tensor, twins
from torch import Tensor, nn

# Rounding grows from step to step: torch's own losses in float32 were up to 1.7e-5 from those in float64, relatively,
# with steps 2.5 times as large. That is 280 times float32's rounding; 280 times float64's is 3e-14.
AGREE = {torch.float32: 5e-5, torch.float64: 1e-12}

# In float64, torch's convolutions of these take minutes.
IN_FLOAT32 = ("SwinUNETR", "VNet, instance norm", "ResEnc M, L, XL")


def losses(
    net: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None, rate: float = 0.05, steps: int = 10
) -> Tensor:
    """Of training net, or what it was compiled to, towards a fixed target."""
    torch.manual_seed(5)
    target = torch.randn(x.shape).to(x)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    found = []
    for _ in range(steps):
        y = tensor((run or net)(x))
        loss = sum((part[:, :1] - target).square().mean() for part in (y.unbind(1) if y.dim() > 5 else [y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@network
def test_training(name: str) -> None:
    """Without active dropout, whose mask follows the layout. At 0.05 VNet's losses grow, and their differences too.

    In float64, where the formula stands for each launch: in float32, rounding may decide a sign that later losses
    depend on. One of UNETR's norms sees 8 positions, where that moves a loss by 7e-4.
    """
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float64
    net, untouched, x = (each.to(dtype) for each in twins(name))
    twin = copy.deepcopy(net)
    expected = losses(untouched, x, rate=0.02)
    assert expected[-1] < 0.98 * expected[0]
    bound = AGREE[dtype] * expected
    with launches_replaced(), mock.patch("fastenc.route.DTYPES", frozenset((dtype,))):
        assert ((losses(net, x, rate=0.02) - expected).abs() <= bound).all()
        compiled = Compiled(twin, fullgraph=name not in BROKEN)
        assert ((losses(twin, x, compiled, rate=0.02) - expected).abs() <= bound).all()
    plain = NETWORKS[name]().eval().to(dtype)
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(tensor(plain(x)), tensor(net(x)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in LARGE])
def test_training_on_the_eager_route(name: str) -> None:
    """Bitwise, with active dropout."""
    net, untouched, x = twins(name)
    assert torch.equal(losses(net.train(), x), losses(untouched.train(), x))


@pytest.mark.parametrize("name", ["UNet", "DynUNet, residual", "PlainConvUNet"])
def test_training_with_the_kernels(name: str) -> None:
    """Interpreted, eager and compiled, against float64."""
    net, untouched, x = twins(name)
    twin = copy.deepcopy(net)
    expected = losses(untouched.double(), x.double())
    assert expected[-1] < 0.95 * expected[0]
    with taken("fused"):
        assert_near(losses(net, x), expected)
        assert_near(losses(twin, x, Compiled(twin)), expected)
