"""instance_norm_prelu with a residual: y = PReLU(norm(x) + r), both routes, against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import accuracy
from support.backends import taken
from test_custom_ops import Compiled
from torch import Tensor
from torch.library import opcheck

import fastenc
from fastenc.functional import launchers
from fastenc.kernels.layout import MEMORY_FORMAT

OPERATOR = torch.ops.fastenc.instance_norm_prelu.default
BACKWARD = torch.ops.fastenc.instance_norm_prelu_backward.default
LAYOUTS = ("contiguous", "channels_last")
ONE_PASS, SPLIT = (4, 5, 6), (17, 11, 11)  # channels-last; a contiguous row splits beyond 16,384 positions


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=MEMORY_FORMAT[x.dim()]) if layout == "channels_last" else x.contiguous()


def arguments(
    spatial: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32, N: int = 2, C: int = 8
) -> list[Tensor]:
    """x, weight, bias, slope, residual."""
    x, residual = (laid_out(torch.randn(N, C, *spatial).to(dtype), layout) for _ in range(2))
    return [x, torch.randn(C), torch.randn(C), torch.rand(C) - 0.3, residual]


def plain(x: Tensor, weight: Any, bias: Any, slope: Any, residual: Tensor) -> Tensor:
    z = F.instance_norm(x, weight=weight, bias=bias, eps=1e-5) + residual
    return F.prelu(z, slope.to(z.dtype)) if isinstance(slope, Tensor) else F.leaky_relu(z, slope)


def ours(x: Tensor, weight: Any, bias: Any, slope: Any, residual: Tensor) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, residual=residual)


def outcome(op: Callable[..., Tensor], args: list[Any], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradient of every tensor."""
    names = ("x", "weight", "bias", "slope", "residual")
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    wanted = {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
    y = op(*leaves)
    return {
        "y": y.detach(),
        **dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], dy.to(y.dtype)), strict=True)),
    }


def check(args: list[Any], dy: Tensor) -> None:
    """The rule of accuracy.py, and x's layout."""
    x, weight, bias, slope, residual = args
    with taken("triton"):
        found = accuracy.check(x, weight, bias, slope, dy, residual=residual)
    assert found["y"].stride() == found["dx"].stride() == found["dresidual"].stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(2, 1, 1), ONE_PASS, SPLIT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_near_as_torch(dtype: torch.dtype, spatial: tuple[int, ...], layout: str) -> None:
    args = arguments(spatial, layout, dtype)
    check(args, laid_out(torch.randn(args[0].shape).to(dtype), layout))


def test_contiguous_rows_split() -> None:
    args = arguments((33, 17, 32), N=1, C=2)
    check(args, torch.randn(args[0].shape))


@pytest.mark.parametrize("spatial", [ONE_PASS, SPLIT])
@pytest.mark.parametrize("slope", [torch.tensor([0.3]), 0.01, 0.0], ids=str)
def test_other_parameters(slope: Tensor | float, spatial: tuple[int, ...]) -> None:
    x, _, _, _, residual = arguments(spatial, C=3)
    check([x, None, None, slope, residual], torch.randn(x.shape))


def test_residual_of_other_strides() -> None:
    x, weight, bias, slope, residual = arguments(ONE_PASS, "channels_last", C=3)
    for other in (residual.contiguous(), torch.stack([residual, residual], -1)[..., 0], residual[:1].expand(x.shape)):
        args = [x, weight, bias, slope, other]
        dy = torch.randn(x.shape)
        with taken("triton"):
            found = outcome(ours, args, dy)
        expected = outcome(plain, [a.double() for a in args], dy.double())
        for name, value in expected.items():
            assert (found[name].double() - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize(("spatial", "N"), [(ONE_PASS, 2), (SPLIT, 1)])
def test_only_the_gradients_asked_for(spatial: tuple[int, ...], N: int) -> None:
    args = arguments(spatial, "channels_last", N=N)
    dy = laid_out(torch.randn(args[0].shape), "channels_last")
    with taken("triton"):
        full = outcome(ours, args, dy)
        for i, name in ((3, "slope"), (4, "residual")):
            leaves = [a.detach() for a in args]
            leaves[i].requires_grad_()
            (grad,) = torch.autograd.grad(ours(*leaves), leaves[i], dy)
            assert torch.equal(grad, full[name]), name
        forward, backward = launchers()
        _, statistics = forward(*args[:4], 1e-5, residual=args[4])
        dx, *others = backward(dy, *args[:4], statistics, (True, *[False] * 4), residual=args[4])
        assert torch.equal(dx, full["x"])
        assert others == [None] * 4  # dr too, though dz may have waited in dx


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_that_alone_needs_a_gradient(layout: str) -> None:
    args = arguments(ONE_PASS, layout)
    expected = outcome(plain, [a.double() for a in args], torch.ones(args[0].shape).double())
    with taken("triton"):
        y = ours(*args[:4], args[4].requires_grad_())
        (dr,) = torch.autograd.grad(y.sum(), args[4])
    assert (dr.double() - expected["residual"]).norm() <= 1e-5 * expected["residual"].norm()


def test_eager_route_is_bitwise_equal() -> None:
    args = arguments(ONE_PASS)
    dy = torch.randn(args[0].shape)
    expected = outcome(plain, args, dy)
    for name, value in outcome(ours, args, dy).items():
        assert torch.equal(value, expected[name])


def test_double_backward() -> None:
    args = arguments(ONE_PASS, "channels_last")

    def penalty(op: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(op(*leaves).pow(3).sum(), [leaves[0], leaves[4]], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    truth = penalty(plain, [a.double() for a in args])
    with taken("triton"):
        found = penalty(ours, args)
    for mine, value in zip(found, truth, strict=True):
        assert (mine.double() - value).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (1.0, TypeError, "residual must be a torch.Tensor, got float"),
        (torch.zeros(2, 8, 4, 5, 1), ValueError, r"residual must have x's shape \(2, 8, 4, 5, 6\), got"),
        (
            torch.zeros(2, 8, 4, 5, 6).double(),
            ValueError,
            "residual must have x's dtype torch.float32, got torch.float64",
        ),
    ],
)
def test_bad_residual(residual: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ours(*arguments(ONE_PASS)[:4], residual)


@pytest.mark.parametrize(
    ("layout", "asked"),
    [("contiguous", [[True] * 5]), ("channels_last", [[True, *[False] * 4], [False, True, False, False, True]])],
)
def test_operators(layout: str, asked: list[list[bool]]) -> None:
    x, weight, bias, slope, residual = arguments((2, 3, 2), layout, C=3)
    with taken("fused"):
        leaves = [a.requires_grad_() for a in (x, weight, bias, slope)]
        opcheck(OPERATOR, (*leaves, 0.0, 1e-5, None, residual.requires_grad_()))
        if layout == "contiguous":
            opcheck(OPERATOR, (x, None, None, None, 0.1, 1e-5, torch.bfloat16, residual.detach()))
        x, weight, bias, slope, residual = (a.detach() for a in (*leaves, residual))
        _, statistics = OPERATOR(x, weight, bias, slope, 0.0, 1e-5, None, residual)
        for needs in asked:
            opcheck(BACKWARD, (torch.randn(x.shape), x, weight, bias, slope, 0.0, statistics, needs, residual))


def test_compiled() -> None:
    args = arguments(ONE_PASS, "channels_last")
    dy = torch.randn(args[0].shape)
    with taken("fused"):
        compiled = Compiled(ours)
        expected = outcome(ours, args, dy)
        for name, value in outcome(compiled, args, dy).items():
            assert torch.equal(value, expected[name])
