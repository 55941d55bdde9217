"""Parameters and statistics of any strides on the Triton route: the same bits as their contiguous copies give.

Whether contiguous ones are right is held elsewhere. A kernel that assumes a stride of one reads other numbers here.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import taken
from test_custom_ops import BACKWARD, OPERATOR, Compiled
from torch import Tensor, nn
from torch.library import opcheck

import fastenc
from fastenc.functional import launchers

C = 6
ONE_PASS, SPLIT = (3, 4, 5), (17, 17, 16)


def column(values: Tensor) -> Tensor:
    """A column of a table whose other columns hold other numbers."""
    table = torch.full((len(values), 3), 1e30)
    table[:, 1] = values
    return table[:, 1]


def pairs(values: Tensor) -> Tensor:
    """Half of what a layer that predicts two numbers a channel gives: Linear(…).view(C, 2).unbind(1)."""
    return torch.stack([values, -values], dim=1).unbind(1)[0]


def every_other(values: Tensor) -> Tensor:
    return torch.stack([torch.full_like(values, 1e30), values], dim=1).flatten()[1::2]


def expanded(values: Tensor) -> Tensor:
    """One number for all channels: a step of 0."""
    return values[:1].clone().expand(len(values))


def conjugated(values: Tensor) -> Tensor:
    """A view that torch negates when it reads it."""
    return torch.complex(torch.zeros_like(values), -values).conj().imag


ARRANGEMENTS = (column, pairs, every_other, expanded, conjugated)


def given(spatial: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, slope."""
    return [torch.randn(2, C, *spatial).to(dtype), torch.randn(C), torch.randn(C), torch.rand(C)]


def results(call: Callable[..., Tensor], *tensors: Any) -> list[Tensor]:
    """y and the gradient of each tensor; the tensors are leaves as they lie."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("which", [*itertools.combinations(range(1, 4), 1), (1, 2, 3)])
@pytest.mark.parametrize("spatial", [ONE_PASS, SPLIT], ids=["one pass", "split"])
@pytest.mark.parametrize("arrange", ARRANGEMENTS)
def test_function(arrange: Callable[[Tensor], Tensor], spatial: tuple[int, ...], which: tuple[int, ...]) -> None:
    tensors = given(spatial)
    for i in which:
        tensors[i] = arrange(tensors[i])
        assert tensors[i].stride() != (1,)
    with taken("triton"):
        expected = results(fastenc.instance_norm_prelu, *(each.clone().contiguous() for each in tensors))
        assert_equal(results(fastenc.instance_norm_prelu, *tensors), expected)
        residual = tensors[0].transpose(-1, -2).contiguous().transpose(-1, -2)
        with torch.no_grad():
            x, *parameters = tensors
            y = fastenc.instance_norm_prelu(x, *parameters, residual=residual)
            copies = (each.clone().contiguous() for each in parameters)
            assert torch.equal(y, fastenc.instance_norm_prelu(x, *copies, residual=residual.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_low_precision(dtype: torch.dtype) -> None:
    x, *parameters = given(ONE_PASS, dtype)
    strided = [column(each).to(dtype) for each in parameters]
    strided = [torch.stack([each, each + 1], dim=1)[:, 0] for each in strided]
    with taken("triton"):
        expected = results(fastenc.instance_norm_prelu, x, *(each.contiguous() for each in strided))
        assert_equal(results(fastenc.instance_norm_prelu, x, *strided), expected)


def test_a_shared_slope_of_an_odd_step() -> None:
    x, weight, bias, slope = given(SPLIT)
    one = torch.stack([slope, slope], dim=1)[:1, 0]
    assert one.stride() == (2,)
    with taken("triton"):
        expected = results(fastenc.instance_norm_prelu, x, weight, bias, slope[:1].clone())
        assert_equal(results(fastenc.instance_norm_prelu, x, weight, bias, one), expected)


def test_the_gradients_of_what_the_parameters_are_views_of() -> None:
    """A table and a linear layer's output, from which all parameters are taken; a number expanded over the channels."""
    x = given(ONE_PASS)[0]

    def call(x: Tensor, table: Tensor, linear: Tensor, number: Tensor) -> Tensor:
        weight, bias = linear.view(C, 2).unbind(1)
        y = fastenc.instance_norm_prelu(x, weight, bias, table[:, 2])
        return y + fastenc.instance_norm_prelu(x, number.expand(C), table[:, 0], number.expand(C))

    tensors = x, torch.rand(C, 3), torch.randn(2 * C), torch.rand(1)
    with fastenc.backend("eager"):
        truth = results(call, *(each.double() for each in tensors))
    with taken("triton"):
        found = results(call, *tensors)
    for mine, value in zip(found, truth, strict=True):
        assert (mine - value).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize("spatial", [ONE_PASS, SPLIT], ids=["one pass", "split"])
def test_the_launchers(spatial: tuple[int, ...]) -> None:
    """Statistics as a view, the recomputed y, an input written over, an expanded dy written over."""
    x, weight, bias, slope = given(spatial)
    parameters = column(weight), pairs(bias), every_other(slope)
    with taken("triton"):
        forward, backward = launchers()
        y, statistics = forward(x, weight, bias, slope, 1e-5)
        view = torch.stack([statistics, statistics + 1e30], dim=-1)[..., 0]
        assert torch.equal(forward(x, *parameters, 1e-5, statistics=view)[0], y)
        dy = torch.randn(()).expand(x.shape)
        expected = backward(dy.contiguous(), x, weight, bias, slope, statistics)
        number = dy.clone()
        assert_equal(list(backward(dy, x, *parameters, view, in_place=True)), list(expected))
        assert torch.equal(dy, number), "an expanded dy is not memory to write over"
        rows = x[:1].expand(x.shape)
        before = rows.clone(memory_format=torch.channels_last_3d)
        assert torch.equal(
            forward(rows, *parameters, 1e-5, in_place=True)[0], forward(before, weight, bias, slope, 1e-5)[0]
        )
        assert torch.equal(rows, before)


def test_modules() -> None:
    """Parameters of any strides, assigned or swapped: in the fused module, an accelerated model, a network's layer."""
    x, weight, bias, slope = given(ONE_PASS)
    strided = [nn.Parameter(column(each)) for each in (weight, bias, slope)]
    plain = nn.Sequential(nn.InstanceNorm3d(C, affine=True), nn.PReLU(C))
    names = [name for name, _ in plain.named_parameters()]
    fused = fastenc.InstanceNormAct3d(C, nn.PReLU(C), affine=True)
    layer, network = fastenc.ConvModern3d(C, C), fastenc.EncoderNet3d(C, [1, 1], in_planes=C)
    with taken("triton"):
        expected = fastenc.instance_norm_prelu(x, weight, bias, slope)
        plain.load_state_dict(dict(zip(names, strided, strict=True)), assign=True)
        assert plain[0].weight.stride() == (3,)
        assert torch.equal(fastenc.accelerate(plain)(x), expected)
        fused.norm.weight, fused.norm.bias, fused.activation.weight = strided
        assert torch.equal(fused(x), expected)
        for module in (layer, network):
            state = {name: each.detach().clone() for name, each in module.named_parameters()}
            moved = {name: column(each) if each.shape == (C,) else each for name, each in state.items()}
            assert any(each.stride() == (3,) for each in moved.values())
            call = torch.func.functional_call
            with torch.no_grad():
                y = module(x)
                assert torch.equal(call(module, moved, (x,)), y)
            module.load_state_dict(moved, assign=True)
            with torch.no_grad():
                assert torch.equal(module(x), y)


def test_frozen_and_recomputed() -> None:
    network, x = fastenc.EncoderNet3d(C, [1, 1], in_planes=C), given((4, 5, 6))[0]
    with taken("fused"):
        plain, y = results_of(network, x), fastenc.freeze(network)(x)
        state = network.state_dict()
        moved = {name: column(each) if each.shape == (C,) else each for name, each in state.items()}
        network.load_state_dict(moved, assign=True)
        assert torch.equal(fastenc.freeze(network)(x), y)
        for network.recompute in (False, True):
            assert_equal(results_of(network, x), plain)


def results_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    y = network(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(network.parameters()))]


@pytest.mark.parametrize("arrange", [column, expanded])
def test_operators(arrange: Callable[[Tensor], Tensor]) -> None:
    """torch.library's operators: their results, and the strides that their fakes promise to torch.compile."""
    x, *parameters = given(ONE_PASS)
    strided = [arrange(each) for each in parameters]
    copies = [each.clone().contiguous() for each in strided]
    with taken("fused"):
        y, statistics = OPERATOR(x, *copies, 0.0, 1e-5, None)
        assert torch.equal(OPERATOR(x, *strided, 0.0, 1e-5, None)[0], y)
        view = torch.stack([statistics, statistics + 1e30], dim=-1)[..., 0]
        dy = torch.ones(()).expand(x.shape)
        backward = (0.0, view, [True] * 5)
        expected = BACKWARD(dy, x, *copies, 0.0, statistics, [True] * 5)
        assert_equal(list(BACKWARD(dy, x, *strided, *backward)), list(expected))
        opcheck(OPERATOR, (x, *strided, 0.0, 1e-5, None), test_utils="test_faketensor")
        opcheck(BACKWARD, (dy, x, *strided, *backward), test_utils="test_faketensor")
        eager = results(fastenc.instance_norm_prelu, x, *strided)
        assert_equal(results(Compiled(fastenc.instance_norm_prelu), x, *strided), eager)
