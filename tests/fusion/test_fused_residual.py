"""accelerate where a residual is added between norm and activation: one kernel, and right whatever else is done."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import taken
from support.plain import assert_all_near, assert_near
from torch import Tensor, nn

import fastenc
from fastenc.fusion import deferred

SHAPE = (2, 4, 3, 4, 5)


def in_place(z: Tensor, r: Tensor) -> Tensor:
    z += r
    return z


ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "z += r": in_place, "z + r": lambda z, r: z + r, "r + z": lambda z, r: r + z,
}  # fmt: skip


class Block(nn.Module):
    """The end of a residual block; `look` sees z and the sum."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.InstanceNorm3d(4, affine=True), activation
        self.add = add
        self.look: Callable[[Tensor, Tensor, Tensor], Tensor | None] = lambda z, r, total: None

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        z = self.norm(x)
        total = self.add(z, r)
        extra = self.look(z, r, total)
        y = self.activation(total)
        return y if extra is None else y + extra


def twins(add: str = "z + r", activation: nn.Module | None = None) -> tuple[Block, Block]:
    """Accelerated, and untouched in float64."""
    untouched = Block(ADDITIONS[add], copy.deepcopy(activation or nn.PReLU(4)))
    nn.init.normal_(untouched.norm.weight)
    net = fastenc.accelerate(copy.deepcopy(untouched))
    assert net.accelerated.count("fused") == 1
    return net, untouched.double()


def outcome(net: nn.Module, x: Tensor, r: Tensor) -> list[Tensor]:
    """y and every gradient."""
    leaves = [x.clone().requires_grad_(), r.clone().requires_grad_(), *net.parameters()]
    y = net(*leaves[:2])
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def check(net: nn.Module, untouched: nn.Module, x: Tensor | None = None, r: Tensor | None = None) -> None:
    """With gradients and without."""
    x, r = torch.randn(SHAPE) if x is None else x, torch.randn(SHAPE) if r is None else r
    with taken("fused"):
        assert_all_near(outcome(net, x, r), outcome(untouched, x.double(), r.double()))
        with torch.no_grad():
            assert_near(net(x.clone(), r.clone()), untouched(x.double(), r.double()))


@pytest.mark.parametrize("activation", [nn.PReLU(4), nn.LeakyReLU(0.1, inplace=True), nn.ReLU()], ids=str)
@pytest.mark.parametrize("add", ADDITIONS)
def test_one_kernel(add: str, activation: nn.Module) -> None:
    net, untouched = twins(add, activation)
    with mock.patch.object(deferred, "fused", wraps=deferred.fused) as fused:
        check(net, untouched)
        assert fused.call_count == 2


def test_two_norms_meet() -> None:
    """The left one fuses; the right one is its residual."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.activation = nn.InstanceNorm3d(4), nn.InstanceNorm3d(4), nn.PReLU(4)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.activation(self.left(x) + self.right(r))

    untouched = Two()
    net = fastenc.accelerate(copy.deepcopy(untouched))
    assert [norm.outcome for norm in net.accelerated] == ["fused", "alone"]
    check(net, untouched.double())


RESIDUALS: dict[str, Tensor] = {
    "channels-last": torch.randn(SHAPE).contiguous(memory_format=torch.channels_last_3d),
    "a row": torch.randn(5), "one channel": torch.randn(2, 1, 3, 4, 5), "sliced": torch.randn(2, 8, 3, 4, 5)[:, ::2],
}  # fmt: skip


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("add", ["z += r", "r + z"])
def test_a_residual_that_does_not_fit(add: str, residual: str) -> None:
    untouched = Block(ADDITIONS[add], nn.PReLU(4))
    net = fastenc.accelerate(nn.Sequential(copy.deepcopy(untouched)))[0]  # no root, which would lay out x and r alike
    x, r = torch.randn(SHAPE), RESIDUALS[residual]
    with taken("fused"), torch.no_grad():
        assert net(x, r).stride() == untouched(x, r).stride()
    check(net, untouched.double(), x, r)


LOOKS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "z": lambda z, r, total: z.square(), "sum": lambda z, r, total: total.square(),
    "both": lambda z, r, total: total * z, "added twice": lambda z, r, total: total + r,
    "dropout": lambda z, r, total: nn.functional.dropout(total, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("add", ["z + r", "r + z"])
def test_unfused_when_norm_output_is_read(add: str, look: str) -> None:
    net, untouched = twins(add)
    net.look = untouched.look = LOOKS[look]
    check(net, untouched)


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vmap": lambda z, r: torch.func.vmap(lambda each: z + each)(r[None])[0],
    "jvp": lambda z, r: torch.func.jvp(lambda r: r + z, (r,), (r,))[0],
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_residual_that_is_transformed(transform: str) -> None:
    net, untouched = twins()
    net.add = untouched.add = TRANSFORMS[transform]
    check(net, untouched)


def test_the_norms_output_after_an_addition_in_place() -> None:
    """It is the sum. With a history, reading it raises."""
    net, untouched = twins("z += r")
    net.look = untouched.look = LOOKS["z"]
    x, r = torch.randn(SHAPE), torch.randn(SHAPE)
    with taken("fused"):
        with torch.inference_mode():
            assert_near(net(x, r), untouched(x.double(), r.double()))
        with pytest.raises(RuntimeError, match="in-place activation or addition"):
            net(x, r)


def test_a_residual_that_changes() -> None:
    net, _ = twins()
    net.look = lambda z, r, total: r.zero_()
    with (
        taken("fused"),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="residual of an accelerated norm was changed"),
    ):
        net(torch.randn(SHAPE), torch.randn(SHAPE))


@pytest.mark.parametrize("change", ["x", "weight", "bias"])
@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_changed_before_the_addition(grad: bool, add: str, change: str) -> None:
    """The kernel would read the new numbers, where torch takes the old ones: an error."""
    net = fastenc.accelerate(nn.Sequential(Block(ADDITIONS[add], nn.PReLU(4))))[0]  # no root, which would copy x

    def add_after_a_change(z: Tensor, r: Tensor) -> Tensor:
        with torch.no_grad():
            (x if change == "x" else getattr(net.norm, change)).mul_(2)
        return ADDITIONS[add](z, r)

    net.add = add_after_a_change
    x, r = torch.randn(SHAPE), torch.randn(SHAPE)
    with (
        taken("fused"),
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match="of an accelerated norm was changed in place before its output was used"),
    ):
        net(x, r)


def test_surgery() -> None:
    net, untouched = twins()
    net.activation = untouched.activation = nn.Tanh()
    check(net, untouched)
    net, untouched = twins()
    net.norm = untouched.norm = nn.Identity()
    check(net, untouched)
    net, untouched = twins()
    for module in (net, untouched):
        module.activation.register_forward_hook(lambda module, args, y: 2 * y + args[0])
    check(net, untouched)
    check(fastenc.accelerate(net, undo=True), untouched)


def test_what_is_not_fused() -> None:
    class Used(Block):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            total = self.norm(x) + r
            r.mul_(2)
            return self.activation(total)

    class Dropped(Block):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.activation(nn.functional.dropout(self.norm(x) + r))

    for kind, words in (Used, "what it is added to is used again before"), (Dropped, "its output goes to an addition"):
        (norm,) = fastenc.accelerate(kind(in_place, nn.PReLU(4))).accelerated
        assert norm.outcome == "alone"
        assert words in norm.detail
