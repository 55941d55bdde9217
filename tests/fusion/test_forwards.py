"""Forwards that do with a norm's output what few forwards do: the numbers of the untouched network, or an error.

Every one of them is a black box, so that each of its norms waits for an activation.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_all_near, assert_near
from support.small_models import fused_calls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastenc

Forward = Callable[["Unit", Tensor], Any]


class Unit(nn.Module):
    def __init__(self, run: Forward, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 3, 3, padding=1), nn.InstanceNorm3d(3, affine=True)
        self.other, self.activation = nn.InstanceNorm3d(3), copy.deepcopy(activation) or nn.PReLU(3)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x if x.sum() < 1e30 else -x)

    def z(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def twins(run: Forward, activation: nn.Module | None = None) -> tuple[Unit, Unit]:
    untouched = Unit(run, activation)
    nn.init.normal_(untouched.norm.weight)
    net = fastenc.accelerate(copy.deepcopy(untouched))
    assert net.accelerated.count("fused") == 2
    return net, untouched


def outcome(net: nn.Module, x: Tensor) -> list[Tensor]:
    """y and every gradient."""
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
    net.zero_grad()
    return found


def small_input() -> Tensor:
    return torch.randn(2, 3, 3, 4, 5)


def hooked(z: Tensor) -> Tensor:
    z.register_hook(lambda dz: 3 * dz)
    return z


def own_gradient(net: Unit, x: Tensor) -> Tensor:
    """y, and what reaches z as it is kept there."""
    z = net.z(x)
    z.retain_grad()
    y = net.activation(z)
    y.sum().backward(retain_graph=True)
    return y + z.grad


def leaf(net: Unit, x: Tensor) -> Tensor:
    """A frozen stage, whose output is the first to have a gradient."""
    net.norm.requires_grad_(False)
    with torch.no_grad():
        h = net.conv(x)
    z = net.norm(h).requires_grad_()
    net.activation(z).square().sum().backward(inputs=[z])
    return z.grad + net.activation(net.other(x))


class Doubled(torch.autograd.Function):
    """z, whose gradient goes to x, twice as large, and to nothing else."""

    @staticmethod
    def forward(ctx: Any, net: Unit, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return net.z(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, 2 * gradients[0]


FORWARDS: dict[str, Forward] = {
    "number + z": lambda net, x: net.activation(1.5 + net.z(x)),
    "sum": lambda net, x: net.activation(sum([net.z(x), net.other(x)])),
    "hook on z": lambda net, x: net.activation(hooked(net.z(x))),
    "hook on z + r": lambda net, x: net.activation(hooked(net.z(x) + x)),
    "hook, then + r": lambda net, x: net.activation(hooked(net.z(x)) + x),
    "retain_grad": own_gradient,
    "requires_grad_": leaf,
    "reentrant checkpoint that ends in z": lambda net, x: net.activation(checkpoint(net.z, x, use_reentrant=True)),
    "history of another Function": lambda net, x: net.activation(Doubled.apply(net, x)),
    "history of another Function, then + r": lambda net, x: net.activation(Doubled.apply(net, x) + x),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_numbers_of_the_untouched_network(name: str) -> None:
    net, untouched = twins(FORWARDS[name])
    x = small_input()
    with launches_replaced():
        found = outcome(net, x)
    assert_all_near(found, outcome(untouched.double(), x.double()))


@torch.no_grad()
def test_copies_of_deferred_outputs() -> None:
    net, untouched = twins(
        lambda net, x: [z := net.z(x), copy.deepcopy(z), torch.tensor(z.tolist()), net.activation(z)]
    )
    x = small_input()
    with launches_replaced():
        for found, expected in zip(net(x), untouched(x), strict=True):
            assert type(found) is Tensor
            assert_near(found, expected.double())
        net.run = lambda net, x: net.z(x).data_ptr()
        assert net(x) != 0, "what a third-party kernel reads"


def test_hook_after_fusion_raises() -> None:
    """Where the untouched network's gradient would go another way, it is an error, not another number."""
    x = small_input().requires_grad_()

    def hook_after_activation(net: Unit, x: Tensor) -> Tensor:
        z = net.z(x)
        y = net.activation(z)
        return y + hooked(z)

    with launches_replaced():
        with pytest.raises(RuntimeError, match="register it right behind the norm"):
            twins(hook_after_activation)[0](x)
        net, _ = twins(lambda net, x: net.z(x).square())
        y = net(x).sum()
        with torch.no_grad():
            net.norm.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            y.backward()


CHECKPOINTED: dict[str, Forward] = {
    "PReLU": lambda net, x: net.activation(net.z(x)),
    "residual": lambda net, x: net.activation(net.z(x) + x),
    "two": lambda net, x: net.activation(net.other(net.activation(net.z(x)))),
}


@pytest.mark.parametrize("activation", [nn.PReLU(3), nn.ReLU(inplace=True)], ids=str)
@pytest.mark.parametrize("scope", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_functions(name: str, use_reentrant: bool, scope: bool, activation: nn.Module) -> None:
    """The recomputation, which runs outside the forward of any module, saves what the forward saved."""

    def run(net: Unit, x: Tensor) -> Tensor:
        return checkpoint(lambda x: CHECKPOINTED[name](net, x), x, use_reentrant=use_reentrant)

    net, untouched = twins(run, activation)
    x = small_input()
    with launches_replaced():
        found = outcome(net if scope else Direct(net), x)
    assert_all_near(found, outcome(untouched.double(), x.double()))


class Direct(nn.Module):
    """Goes past __call__ of its net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward(x)


def test_view_of_a_tensor() -> None:
    """A channels-last tensor has none: said once, and tensors stay contiguous, whichever layout they come in."""
    net, untouched = twins(lambda net, x: net.activation(net.z(x)).view(len(x), -1))
    x = small_input()
    with launches_replaced():
        with pytest.warns(RuntimeWarning, match="calls view on a tensor"):
            found = outcome(net, x)
        assert_all_near(found, outcome(copy.deepcopy(untouched).double(), x.double()))
    net = copy.deepcopy(net)
    with taken("fused"):
        last = x.contiguous(memory_format=torch.channels_last_3d)
        with fused_calls() as pairs, torch.no_grad():
            y = net(last)
        assert pairs.call_count == 1
    assert_near(y, untouched(x).double())
    with launches_replaced(), pytest.raises(RuntimeError, match="is invalid for input of size"):
        twins(lambda net, x: net.z(x).view(7, -1))[0](x)


def test_view_where_running_statistics_would_count_twice() -> None:
    norm = nn.BatchNorm3d(3)

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.activation(net.z(norm(x))).view(len(x), -1)

    net, untouched = twins(forward)
    net.norm0 = untouched.norm0 = norm
    x = small_input()
    with launches_replaced():
        with pytest.raises(RuntimeError, match=r"Unit calls view on a tensor.*once in eval mode"):
            net(x)
        with pytest.warns(RuntimeWarning, match="calls view on a tensor"):
            net.eval()(x)
        before = int(norm.num_batches_tracked)
        assert_near(net.train()(x), untouched(x).double())
        assert int(norm.num_batches_tracked) == before + 2


def test_a_list_that_the_forward_fills() -> None:
    class Fills(Unit):
        def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
            features.append(self.activation(self.z(x)))
            return features[-1]

    features: list[Tensor] = []
    with launches_replaced():
        y = fastenc.accelerate(Fills(lambda net, x: x))(small_input(), features)
    assert_near(features[0], y.double())
