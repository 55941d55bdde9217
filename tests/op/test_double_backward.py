"""Second derivatives on the Triton route: torch's numbers, and zeros wherever torch gives zeros."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import launches_replaced, taken
from support.plain import small_input, small_twins
from torch import Tensor, nn

import fastenc

SHAPE = (2, 3, 4, 2, 3)
Second = dict[tuple[str, str], Tensor | None]


def seconds(op: Callable[..., Tensor], values: Mapping[str, Any], dtype: torch.dtype) -> Second:
    """The derivative of every gradient of op in every tensor and in dy; None where autograd finds no path."""
    leaves = {n: v.detach().to(dtype).requires_grad_() if isinstance(v, Tensor) else v for n, v in values.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    y = op(**leaves)
    dy = torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y).requires_grad_()
    first = torch.autograd.grad(y, [*wanted.values()], dy, create_graph=True, allow_unused=True)
    wanted["dy"] = dy
    found: Second = {}
    for of, gradient in zip(wanted, first, strict=False):
        if gradient is None or not gradient.requires_grad:
            found |= {(of, name): None for name in wanted}
            continue
        total = (gradient * torch.linspace(0.5, 1.5, gradient.numel(), dtype=dtype).view_as(gradient)).sum()
        second = torch.autograd.grad(total, [*wanted.values()], allow_unused=True, retain_graph=True)
        found |= {(of, name): each for name, each in zip(wanted, second, strict=True)}
    return found


def assert_alike(found: Second, truth: Second, what: object = "") -> None:
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        mine = found[key]
        assert (mine is None) == (value is None), (what, key, "torch has", value)
        if value is not None and mine is not None:
            assert (mine.double() - value).norm() <= 1e-4 * value.norm(), (what, key)


def plain(x: Tensor, weight: Any, bias: Any, slope: Any, residual: Any) -> Tensor:
    z = F.instance_norm(x, weight=weight, bias=bias)
    z = z if residual is None else z + residual
    return F.prelu(z, slope) if isinstance(slope, Tensor) else F.leaky_relu(z, slope)


def function(x: Tensor, weight: Any, bias: Any, slope: Any, residual: Any) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, residual=residual)


def operator(x: Tensor, weight: Any, bias: Any, slope: Any, residual: Any) -> Tensor:
    shared, number = (slope, 0.0) if isinstance(slope, Tensor) else (None, slope)
    return torch.ops.fastenc.instance_norm_prelu(x, weight, bias, shared, number, 1e-5, None, residual)[0]


@pytest.mark.parametrize("slope", [0.1, torch.rand(3) - 0.3, torch.rand(1)], ids=["number", "per channel", "shared"])
@pytest.mark.parametrize("op", [function, operator])
def test_every_second_derivative(op: Callable[..., Tensor], slope: Tensor | float) -> None:
    """Of a bias without a weight torch finds no second derivative, though there is one: left out."""
    x, residual = torch.randn(SHAPE), torch.randn(SHAPE)
    weight, bias = torch.rand(3) + 0.5, torch.randn(3)
    for affine, r in product(((weight, bias), (weight, None), (None, None)), (None, residual)):
        values = {"x": x, "weight": affine[0], "bias": affine[1], "slope": slope, "residual": r}
        truth = seconds(plain, values, torch.float64)
        with taken("fused"):
            assert_alike(seconds(op, values, torch.float32), truth, values)


def of_module(net: nn.Module, *fixed: Tensor) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """net as a function of its input and parameters, by name."""
    names = {name.replace(".", "_"): name for name, _ in net.named_parameters()}

    def call(x: Tensor, **parameters: Tensor) -> Tensor:
        given = {names[name]: parameter for name, parameter in parameters.items()}
        return torch.func.functional_call(net, given, (x, *(each.to(x.dtype) for each in fixed)))

    return call, {name: net.get_parameter(names[name]) for name in names}


@pytest.mark.parametrize("activation", [nn.PReLU(3), nn.PReLU(), nn.LeakyReLU(0.1), nn.ReLU()], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_a_module(affine: bool, activation: nn.Module) -> None:
    untouched = nn.Sequential(nn.InstanceNorm3d(3, affine=affine), activation)
    ours = fastenc.InstanceNormAct3d(3, activation, affine=affine)
    x = torch.randn(SHAPE)
    op, parameters = of_module(untouched)
    truth = [*seconds(op, {"x": x, **parameters}, torch.float64).values()]
    op, parameters = of_module(ours)
    with taken("triton"):
        found = [*seconds(op, {"x": x, **parameters}, torch.float32).values()]
    assert_alike(dict(enumerate(found)), dict(enumerate(truth)))  # type: ignore[arg-type]


class Residual(nn.Module):
    """A pair in a Sequential, or in its own forward, which may add the input."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.add, self.norm, self.activation = add, nn.InstanceNorm3d(3, affine=True), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return self.activation(z + x if self.add else z)


@pytest.mark.parametrize("add", [False, True])
def test_an_accelerated_pair(add: bool) -> None:
    net = Residual(add)
    x = torch.randn(SHAPE)

    def second() -> Second:
        leaf = x.to(net.norm.weight.dtype).requires_grad_()
        leaves = [leaf, *net.parameters()]
        y = net(leaf)
        first = torch.autograd.grad(y, leaves, torch.linspace(-1, 2, y.numel()).view_as(y).to(y), create_graph=True)
        found: Second = {}
        for i, gradient in enumerate(first):
            second = torch.autograd.grad(gradient.sin().sum(), leaves, allow_unused=True, retain_graph=True)
            found |= {(str(i), str(j)): each for j, each in enumerate(second)}
        return found

    truth = second() if net.double() else {}
    net.float()
    fastenc.accelerate(net)
    with taken("fused"):
        assert_alike(second(), truth)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_network(recompute: bool) -> None:
    """Every gradient in every parameter, the launches replaced by the formula."""
    net, untouched = small_twins(torch.float32, channel=1, layers=[1, 1])
    net.recompute = recompute
    x = small_input((4, 3, 4), dtype=torch.float32)
    op, parameters = of_module(untouched)
    truth = seconds(op, {"x": x, **parameters}, torch.float64)
    op, parameters = of_module(net)
    with launches_replaced():
        found = seconds(op, {"x": x, **parameters}, torch.float32)
    floor = 1e-6 * max(value.norm().item() for value in truth.values() if value is not None)
    for key, value in truth.items():
        mine = found[key]
        if value is None:  # here a path that carries zeros may exist
            assert mine is None or not mine.any(), key
        else:
            assert mine is not None, key
            assert (mine.double() - value).norm() <= 1e-3 * value.norm() + floor, key
