"""A network that is changed after acceleration gives the results of an unaccelerated one with the same changes."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.backends import taken
from support.plain import assert_near
from support.small_models import Changes, assert_like_untouched, small_input, stack, twins
from torch import Tensor, nn

import fastenc

# Changes after acceleration. Each is made to the accelerated and to the untouched network.


def tap(net: nn.Sequential) -> nn.Module:
    return net[:2]


def tap_by_hand(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], net[1])


def norm_replaced(net: nn.Sequential) -> nn.Module:
    net[1] = nn.Identity()
    return net


def norm_replaced_by_a_fresh_one(net: nn.Sequential) -> nn.Module:
    net[1] = nn.InstanceNorm3d(4, eps=0.1)
    return net


def activation_replaced(net: nn.Sequential) -> nn.Module:
    net[2] = nn.Tanh()
    return net


def activation_removed(net: nn.Sequential) -> nn.Module:
    del net[2]
    return net


def activation_copied_out(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], copy.deepcopy(net[2]), net[3])


def activation_twice(net: nn.Sequential) -> nn.Module:
    net.insert(3, net[2])
    return net


def norm_copied_out(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], copy.copy(net[1]), net[3])


def norm_twice(net: nn.Sequential) -> nn.Module:
    net.insert(2, net[1])
    return net


def tap_of_the_middle(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], net[1:3])


HOOKS: dict[str, tuple[int, str, Callable[..., object]]] = {
    "hook": (1, "register_forward_hook", lambda module, args, output: 2 * output),
    "pre_hook": (1, "register_forward_pre_hook", lambda module, args: (args[0].flip(2),)),
    "backward_hook": (1, "register_full_backward_hook", lambda module, dx, dy: (2 * dx[0],)),
    "activation_hook": (2, "register_forward_hook", lambda module, args, output: output + args[0]),
    "activation_pre_hook": (2, "register_forward_pre_hook", lambda module, args: (args[0].neg(),)),
    "activation_pre_hook_in_place": (2, "register_forward_pre_hook", lambda module, args: (args[0].add_(1.0),)),
    "activation_backward_hook": (2, "register_full_backward_hook", lambda module, dx, dy: (2 * dx[0],)),
    "activation_backward_pre_hook": (2, "register_full_backward_pre_hook", lambda module, dy: (3 * dy[0],)),
}


def hooked(name: str) -> Callable[[nn.Sequential], nn.Module]:
    """Adds one of HOOKS."""

    def change(net: nn.Sequential) -> nn.Module:
        index, register, hook = HOOKS[name]
        getattr(net[index], register)(hook)
        return net

    change.__name__ = name
    return change


SURGERY = [
    tap, tap_by_hand, norm_replaced, norm_replaced_by_a_fresh_one, activation_replaced, activation_removed,
    activation_copied_out, activation_twice, norm_copied_out, norm_twice, tap_of_the_middle,
    *map(hooked, HOOKS),
]  # fmt: skip


@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery(surgery: Callable[[nn.Sequential], nn.Module]) -> None:
    net, untouched = twins(stack(nn.LeakyReLU(0.1)))
    net, untouched = surgery(net), surgery(untouched)
    with taken("fused"):
        assert type(net(small_input())) is Tensor, "nothing deferred gets out"
        assert_like_untouched(net, untouched, small_input())
        with torch.no_grad():
            x = small_input()
            assert_near(net(x), untouched(x).double())


def test_hook_on_an_activation_in_place() -> None:
    """By the time a forward hook runs, the activation's input is its output."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1, inplace=True)))
    with taken("fused"):
        change = hooked("activation_hook")
        assert_like_untouched(change(net), change(untouched), small_input())


@pytest.mark.parametrize("inplace", [True, False])
def test_hook_that_keeps_the_norms_output(inplace: bool) -> None:
    """A hook on a module that the norm's output leaves keeps what torch would: z, or what became of it in place."""
    net = nn.Sequential(nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)), nn.ReLU(inplace=inplace))
    net, untouched = twins(net)
    kept: list[Tensor] = []
    for model in net, untouched:
        model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    x = small_input()
    with taken("fused"):
        assert_near(net(x), untouched(x).double())
        with torch.no_grad():
            net[0][1].weight.add_(1.0)
            untouched[0][1].weight.add_(1.0)
        assert type(kept[0]) is Tensor
        assert_near(kept[0], kept[1].double())


@pytest.mark.parametrize("then", ["look", "change", "change a part"])
def test_a_forward_that_becomes_another_one(then: str) -> None:
    net, untouched = twins(Changes())
    net.then = untouched.then = then
    with taken("fused"):
        assert_like_untouched(net, untouched, small_input())
        with torch.no_grad():
            x = small_input()
            assert_near(net(x), untouched(x).double())


@torch.no_grad()
def test_input_overwritten_before_the_activation() -> None:
    net, untouched = twins(Changes("overwrite the input"))
    assert [norm.detail for norm in net.accelerated] == ["its input is used again before the activation"]
    x = small_input()
    with taken("fused"):
        assert_near(net(x), untouched(x).double())
        net = fastenc.accelerate(Changes())
        net.then = "overwrite the input"
        with pytest.raises(RuntimeError, match="changed in place"):
            net(x)


def test_gradient_modes_that_change_in_between() -> None:
    """z without gradients, activated with; and the other way round."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.PReLU()

        def forward(self, x: Tensor, first: bool = True) -> Tensor:
            with torch.set_grad_enabled(first):
                z = self.norm(self.conv(x))
            with torch.set_grad_enabled(not first):
                return self.act(z)

    net, untouched = twins(Modes())
    x = small_input()
    with taken("fused"):
        assert not net(x).requires_grad
        for model in net, untouched:
            model(x, first=False).sum().backward()
    assert net.conv.weight.grad is net.norm.weight.grad is None
    assert_near(net.act.weight.grad, untouched.act.weight.grad)
