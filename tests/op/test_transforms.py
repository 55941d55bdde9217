"""torch.func and autograd at their deepest: transforms, forward mode, derivatives of derivatives, many at once.

"auto" is the eager route in float64; "fused" is as on a GPU, the kernels interpreted, in float32: eager where PyTorch
is transforming what runs, fused where it transforms what comes after.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import either_route, launches_replaced, taken
from support.plain import assert_all_near, assert_near, gradients, small_input, small_twins
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from fastenc import explain, instance_norm_prelu
from fastenc import route as routes

pytestmark = pytest.mark.usefixtures("every_weight_is_big_enough")


# Function transforms


@either_route
def test_functional_call(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        other = {name: 1.5 * parameter.detach() for name, parameter in plain.named_parameters()}
        x = small_input(dtype=dtype)
        assert_near(functional_call(net, other, (x,)), functional_call(plain, other, (x,)))
        assert_near(net(x), plain(x))


@either_route
def test_vmap_over_samples(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input(batch=3, dtype=dtype)
        assert_near(vmap(lambda sample: net(sample[None])[0])(x), plain(x))


@either_route
def test_vmap_over_ensembles(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        state = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in plain.named_parameters()}
        x = small_input(dtype=dtype)
        found = vmap(lambda parameters: functional_call(net, parameters, (x,)))(state)
        expected = [functional_call(plain, {n: p[i] for n, p in state.items()}, (x,)) for i in (0, 1)]
        assert_near(found, torch.stack(expected))


@either_route
def test_grad_of_each_sample(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input(batch=3, dtype=dtype)
        state = {name: parameter.detach() for name, parameter in net.named_parameters()}

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(net, parameters, (sample[None],)).square().sum()

        found = vmap(grad(loss), in_dims=(None, 0))(state, x)
        for i, sample in enumerate(x):
            assert_all_near([g[i] for g in found.values()], gradients(plain, sample[None])[2:])


@either_route
def test_a_tensor_that_a_transform_left(route: str) -> None:
    """Once torch.func.grad is over, its tensors are no longer transformed. autograd.Function.apply unwraps them."""
    with taken(route) as dtype:
        x, weight = torch.randn(2, 3, 4, 4, 4, dtype=dtype), torch.rand(3, dtype=dtype, requires_grad=True)
        left = []

        def loss(x: Tensor) -> Tensor:
            left.append(2.0 * x)
            return x.sum()

        grad(loss)(x)
        assert_near(instance_norm_prelu(left[0], weight), instance_norm_prelu(2.0 * x, weight))


@either_route
def test_jacrev(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        x = small_input((4, 3, 4), batch=1, dtype=dtype)
        assert_near(jacrev(net)(x), torch.autograd.functional.jacobian(plain, x))


@either_route
def test_jvp(route: str) -> None:
    """Forward mode against the derivative in backward mode, so that a silent zero shows."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x, tangent = small_input(dtype=dtype), small_input(dtype=dtype).flip(2)
        y, moved = jvp(net, (x,), (tangent,))
        assert_near(y, plain(x))
        jacobian = torch.autograd.functional.jacobian(plain, x)
        assert_near(moved, torch.einsum("nkmcdhw,mcdhw->nk", jacobian, tangent))


@either_route
def test_dual_numbers(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x, tangent = small_input(dtype=dtype), small_input(dtype=dtype).flip(3)
        with dual_level():
            found = unpack_dual(net(make_dual(x, tangent)))
        expected = jvp(plain, (x,), (tangent,))
        assert_all_near(found, expected)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda function, x: grad(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: jacrev(function)(x),
    "vmap": lambda function, x: vmap(function)(x[None]),
    "jvp": lambda function, x: jvp(function, (x,), (x,)),
}


def in_dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with dual_level():
        function(make_dual(x, x))


@pytest.mark.parametrize(
    ("transform", "reason"),
    [*((t, routes.TRANSFORM) for t in TRANSFORMS.values()), (in_dual_numbers, routes.FORWARD_MODE)],
    ids=[*TRANSFORMS, "dual numbers"],
)
def test_the_reason_is_said(transform: Callable[..., Any], reason: str) -> None:
    """By explain, asked inside, and by the error where the Triton route was asked for."""
    net, _ = small_twins(torch.float32)
    found: list[Any] = []

    def asked(x: Tensor) -> Tensor:
        found.extend(explain(net, x))
        return net(x)

    with taken("fused"):
        transform(asked, small_input(dtype=torch.float32))
    assert [(row.route, row.reason) for row in found] == [("eager", reason)] * 3
    with taken("triton"), pytest.raises(RuntimeError) as error:
        transform(net, small_input(dtype=torch.float32))
    assert reason in str(error.value)


@either_route
def test_hessian(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        x = small_input((4, 3, 4), batch=1, dtype=dtype)
        expected = torch.autograd.functional.hessian(lambda x: plain(x).square().sum(), x)
        assert_near(hessian(lambda x: net(x).square().sum())(x), expected)


# The forward as ever, the backward transformed


Backward = Callable[[Tensor], tuple[Tensor, ...]]


def with_dual_numbers(backward: Backward, dy: Tensor, moved: Tensor) -> list[Tensor | None]:
    with dual_level():
        return [unpack_dual(gradient).tangent for gradient in backward(make_dual(dy, moved))]


def with_jvp(backward: Backward, dy: Tensor, moved: Tensor) -> list[Tensor | None]:
    return list(jvp(backward, (dy,), (moved,))[1])


@pytest.mark.parametrize("tangents", [with_dual_numbers, with_jvp])
@pytest.mark.parametrize(("route", "recompute"), [("auto", False), ("fused", False), ("fused", True)])
def test_forward_mode_over_the_backward(route: str, recompute: bool, tangents: Callable[..., Any]) -> None:
    """A backward is linear: moving dy moves the gradients by the backward of that move. A kernel would lose it."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        net.recompute = recompute
        x = small_input(dtype=dtype).requires_grad_()
        y = net(x)
        dy, moved = torch.ones_like(y), torch.arange(1.0, 1 + y.numel(), dtype=dtype).view_as(y)

        def backward(dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, [x, *net.parameters()], dy, retain_graph=True)

        found = tangents(backward, dy, moved)
        assert_all_near(found, torch.autograd.grad(plain(x), [x, *plain.parameters()], moved))


@either_route
def test_batched_gradients(route: str) -> None:
    """The backward under vmap, in the input and in every parameter: what a vectorized Jacobian does."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input((4, 4, 4), dtype=dtype).requires_grad_()  # the last map has one live tap
        y, expected = net(x), plain(x)
        many = torch.eye(y.numel(), dtype=dtype).view(-1, *y.shape)
        found = torch.autograd.grad(y, [x, *net.parameters()], many, is_grads_batched=True)
        leaves = [x, *plain.parameters()]
        each = [torch.autograd.grad(expected, leaves, dy, retain_graph=True) for dy in many]
        assert_all_near(found, [torch.stack(gradients) for gradients in zip(*each, strict=True)])


# Derivatives of derivatives, against differences


def test_gradcheck() -> None:
    check_gradients(small_twins(channel=1, layers=[1, 1])[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_on_the_triton_route(recompute: bool) -> None:
    """In float64, the formula in place of each launch: what is checked is how autograd is wired."""
    wide = mock.patch("fastenc.route.DTYPES", frozenset((torch.float64,)))
    with launches_replaced(), wide:
        net, _ = small_twins(channel=1, layers=[1, 1])
        net.recompute = recompute
        assert {row.route for row in explain(net, small_input((4, 3, 4)))} == {"triton"}
        check_gradients(net)


def check_gradients(net: nn.Module) -> None:
    """First and second derivatives in the input and in every parameter, with the settings of PyTorch's own tests."""
    names, values = zip(*net.named_parameters(), strict=True)
    inputs = (small_input((4, 3, 4)).requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))

    def network(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(network, inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(network, inputs, fast_mode=True, check_batched_grad=True)


def test_gradcheck_slow_in_the_input() -> None:
    net, _ = small_twins(channel=1, layers=[1, 1])
    x = small_input((3, 3, 4), batch=1).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(net, (x,))
