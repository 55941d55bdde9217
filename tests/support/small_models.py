"""Small networks of plain torch around a norm and an activation, accelerated and not, and how to compare the two."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from support.backends import eager_norms
from support.plain import assert_all_near, gradients
from torch import Tensor, nn

import fastenc
from fastenc.fusion import deferred

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "shared PReLU": nn.PReLU,
    "PReLU": lambda: nn.PReLU(4, 0.1),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
}
SIZE = {1: (40,), 2: (6, 7), 3: (4, 5, 6)}


def stack(activation: nn.Module, *between: nn.Module, order: int = 3, affine: bool = True) -> nn.Sequential:
    """A convolution, norm, what is between, activation, a convolution; no parameter at its initial constant."""
    norm = NORM[order](4, affine=affine)
    net = nn.Sequential(CONVOLUTION[order](2, 4, 3), norm, *between, activation, CONVOLUTION[order](4, 2, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def small_input(order: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 2, *SIZE[order], dtype=dtype)


def twins(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """net accelerated, and an untouched copy."""
    untouched = copy.deepcopy(net)
    return fastenc.accelerate(net), untouched


def assert_like_untouched(net: nn.Module, untouched: nn.Module, x: Tensor) -> None:
    """Output and all gradients, float32, near the untouched model's in float64."""
    found = gradients(net, x)
    with fastenc.backend("eager"):
        expected = gradients(copy.deepcopy(untouched).double(), x.double())
    assert_all_near(found, expected)


@contextmanager
def fused_calls() -> Iterator[mock.Mock]:
    """The calls of the fused operation for pairs; no norm and no activation may run by itself."""
    functions = "leaky_relu", "prelu", "relu"
    with (
        mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs,
        mock.patch.multiple(nn.functional, **{name: mock.Mock(side_effect=AssertionError(name)) for name in functions}),
        eager_norms() as norms,
    ):
        yield pairs
    assert norms.call_count == 0


class Shared(nn.Module):
    """One activation after two norms, and after a plain convolution; a norm that leads nowhere; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.act = nn.PReLU()
        self.norm1, self.norm2, self.norm3 = (nn.InstanceNorm3d(4, affine=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(x)))
        return self.act(self.conv3(y)) + self.norm3(x)


class Changes(nn.Module):
    """A forward that becomes another one: `then` says what happens between norm and activation."""

    def __init__(self, then: str = "") -> None:
        super().__init__()
        self.norm, self.act = nn.InstanceNorm3d(2, affine=True), nn.ReLU()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        z = self.norm(x)
        ahead: Tensor | float = 0.0
        if self.then == "look":
            ahead = z.square().mean((2, 3, 4), keepdim=True) + z.view(z.shape).sin()
        elif self.then == "change":
            z.mul_(3.0)
        elif self.then == "change a part":
            z[:, 1:].add_(1.0)
        elif self.then == "overwrite the input":
            x.mul_(3.0)
        return ahead + self.act(z)


class Net(nn.Module):
    """A pair in a forward; `look` is called with the norm's output, before the activation."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 1, bias=False), nn.InstanceNorm3d(4, affine=True)
        self.drop, self.act = nn.Dropout(0.0), activation or nn.LeakyReLU(0.1)
        self.look: Callable[[Tensor], Any] = id

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        self.look(z)
        return self.act(z)
