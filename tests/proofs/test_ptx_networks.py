"""Whole networks on compiled code: forward and backward, recompute, freeze, and other people's networks accelerated.

A network is held to the rule of accuracy.py for all its results together: no farther from itself in float64 than twice
what torch's own operations are in float32, plus a few units in the last place.
"""

import copy

import pytest
import torch
from executed import executed
from support.backends import eager_norms
from support.plain import small_input, small_twins
from torch import Tensor, nn

import fastenc
from fastenc.commands import third_party


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, then the gradients of the mean of its squares in the input and in every parameter that has one."""
    x = x.clone().requires_grad_()
    y = net(x)
    y.double().square().mean().backward()
    found = [y.detach(), x.grad, *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]
    net.zero_grad()
    return found


def near(ours: list[Tensor], torchs: list[Tensor], truth: list[Tensor]) -> None:
    """Each within the rule; what is zero but for rounding, such as a bias before a norm, of the largest of all."""
    ulp = torch.finfo(torch.float32).eps
    floor = ulp * max(value.abs().max().item() for value in truth)
    for i, (mine, theirs, value) in enumerate(zip(ours, torchs, truth, strict=True)):
        limit = 2 * (theirs - value).norm() + 16 * ulp * value.norm() + floor * value.numel() ** 0.5
        assert (mine - value).norm() <= limit, i


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("recompute", [False, True])
def test_encoder(recompute: bool, architecture: int) -> None:
    arguments = {"channel": 8, "layers": [2, 1], "recompute": recompute}
    net = fastenc.EncoderNet3d(**arguments)
    x = torch.randn(2, 1, 18, 17, 15)
    truth, torchs = gradients(copy.deepcopy(net).double(), x.double()), gradients(copy.deepcopy(net), x)
    with executed(architecture, "auto") as machine, eager_norms() as norms:
        ours = gradients(net, x)
    assert norms.call_count == 0
    names = {launch.name for launch in machine.launches}
    assert {name.partition("_")[0] for name in names} == {"forward", "backward"}
    near(ours, torchs, truth)


def test_encoder_is_the_plain_network() -> None:
    net, plain = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    with executed(90, "auto"):
        ours = gradients(net, x)
    near(ours, gradients(plain, x), gradients(plain.double(), x.double()))


def test_recompute_is_bitwise_the_same_network() -> None:
    net = fastenc.EncoderNet3d(8, [1, 1])
    again = fastenc.EncoderNet3d(8, [1, 1], recompute=True)
    again.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 20, 17, 16)
    with executed(90, "auto") as machine:
        saved = gradients(net, x)
        count = len(machine.launches)
        recomputed = gradients(again, x)
    assert len(machine.launches) > 2 * count  # the forward once more
    assert all(map(torch.equal, saved, recomputed))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_freeze(dtype: torch.dtype | None) -> None:
    net, _ = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    with executed(90, "auto") as machine, torch.no_grad():
        y = fastenc.freeze(net, dtype)(x)
        count = len(machine.launches)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            expected = net(x)
    assert 2 * count == len(machine.launches) > 0
    assert torch.equal(y, expected)


def instance_norm_leaky_relu() -> nn.Module:
    """A network as nnU-Net has them: convolution, InstanceNorm3d, LeakyReLU."""
    layers: list[nn.Module] = []
    for planes, stride in ((8, 1), (8, 1), (16, 2)):
        layers += [
            nn.LazyConv3d(planes, 3, stride, 1),
            nn.InstanceNorm3d(planes, affine=True),
            nn.LeakyReLU(0.01, True),
        ]
    net = nn.Sequential(*layers, nn.LazyConv3d(2, 1))
    net(torch.zeros(1, 1, 8, 8, 8))
    return net


NETWORKS = {
    "UNet": third_party.monai()["UNet"],
    "instance norm, leaky ReLU": instance_norm_leaky_relu,
    "PlainConvUNet": third_party.nnunet()["PlainConvUNet"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_accelerated(name: str) -> None:
    net = NETWORKS[name]().eval()
    x = torch.randn(1, 1, 8, 16, 24) if name == "instance norm, leaky ReLU" else torch.randn(1, 1, 8, 8, 8)
    truth, torchs = gradients(copy.deepcopy(net).double(), x.double()), gradients(copy.deepcopy(net), x)
    fastenc.accelerate(net)
    with executed(90, "auto") as machine, eager_norms() as norms:
        ours = gradients(net, x)
    assert norms.call_count == 0
    assert machine.launches
    near(ours, torchs, truth)
