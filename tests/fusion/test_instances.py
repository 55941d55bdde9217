"""accelerate replaces forwards on instances: classes, attributes and copies are as torch has them."""

import copy
import io
import pickle
import subprocess
import sys
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

import pytest
import torch
from support.backends import taken
from support.plain import assert_all_near, assert_near, gradients
from support.small_models import Net, assert_like_untouched, fused_calls, small_input, stack, twins
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastenc
from fastenc.fusion import SUMMARY

T = TypeVar("T")


class Plain(ABC):  # noqa: B024
    """No metaclass conflict, another layout."""


class Slots:
    __slots__ = ()


class AbcNet(Plain, Net):
    pass


class GenericNet(Generic[T], Net):
    pass


class SlotsNet(Slots, Net):
    pass


class Tagged(Net):
    registry: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        assert cls.__name__ not in cls.registry
        cls.registry[cls.__name__] = cls


class TaggedNet(Tagged, tag="u"):
    pass


@pytest.mark.parametrize("kind", [AbcNet, GenericNet, SlotsNet, TaggedNet])
def test_classes_of_every_layout(kind: type[Net]) -> None:
    net, untouched = twins(kind())
    assert [type(module) for module in net.modules()] == [type(module) for module in untouched.modules()]
    assert net.accelerated.count("fused") == 1
    with taken("fused"):
        with fused_calls() as search:
            net(small_input())
        assert search.call_count == 1
        assert_like_untouched(net, untouched, small_input())
    assert set(vars(fastenc.accelerate(net, undo=True))) == set(vars(untouched))


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.drop(input=self.norm(input=self.conv(input=x))))


def test_calls_by_keyword() -> None:
    net, untouched = twins(ByKeyword())
    with taken("fused"):
        with fused_calls() as search:
            net(x=small_input())
        assert search.call_count == 1
        assert_like_untouched(net, untouched, small_input())
    assert_near(net(x=(x := small_input())), untouched(x).double())


def test_the_search_sees_operands_by_keyword() -> None:
    class Used(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            z = self.norm(input=h)
            h.mul_(2.0)
            return self.act(z) + h

    (norm,) = fastenc.accelerate(Used()).accelerated
    assert norm.detail == "its input is used again before the activation"


def test_an_attribute_called_accelerated() -> None:
    class Scales(Net):
        def __init__(self, accelerated: Any) -> None:
            super().__init__()
            self.accelerated = accelerated

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.accelerated(y) if isinstance(self.accelerated, nn.Module) else self.accelerated * y

    for own in (3.0, nn.Conv3d(4, 4, 1), nn.Parameter(torch.ones(4, 1, 1, 1))):
        net, untouched = twins(Scales(own))
        assert type(net.accelerated) is type(own)
        assert vars(net)[SUMMARY].count("fused") == 1
        assert_like_untouched(net, untouched, small_input())
        fastenc.accelerate(nn.Sequential(net), undo=True)
        assert set(vars(net)) == set(vars(untouched))
        assert_like_untouched(net, untouched, small_input())


def test_undo_of_parametrized_modules() -> None:
    class Absolute(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.abs()

    net, untouched = twins(stack(nn.PReLU(4, -0.2)))
    for model in net, untouched:
        parametrize.register_parametrization(model[2], "weight", Absolute())
        parametrize.register_parametrization(model[1], "weight", Absolute())
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
    fastenc.accelerate(net, undo=True)
    for at in (1, 2):
        parametrize.remove_parametrizations(net[at], "weight")
    assert [type(module) for module in net] == [nn.Conv3d, nn.InstanceNorm3d, nn.PReLU, nn.Conv3d]
    assert all("forward" not in vars(module) for module in net.modules())


def test_a_forward_that_the_user_had_set() -> None:
    """On the model it runs as before; a norm or an activation that has one is left."""
    net, untouched = twins(nn.Sequential(Net()))
    for model in net, untouched:
        model[0].forward = lambda x, net=model[0]: 2 * Net.forward(net, x)
    own = vars(net[0])["forward"]
    fastenc.accelerate(net)
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
    fastenc.accelerate(net, undo=True)
    assert vars(net[0])["forward"] is own
    for part, detail in (("norm", "its forward was replaced"), ("act", "goes to a LeakyReLU whose forward was repl")):
        net, untouched = Net(), Net()
        untouched.load_state_dict(net.state_dict())
        for model in net, untouched:
            module = model.get_submodule(part)
            module.forward = lambda x, module=module: type(module).forward(module, x).square()
        (norm,) = fastenc.accelerate(net).accelerated
        assert detail in norm.detail
        with taken("fused"), torch.no_grad():
            assert_near(net(x), untouched(x).double())


@pytest.mark.parametrize("part", ["norm", "act", ""])
def test_a_forward_that_the_user_wraps_later(part: str) -> None:
    net, untouched = twins(Net())
    for model in net, untouched:
        module = model.get_submodule(part)
        module.forward = lambda x, forward=module.forward: forward(x) + 1
    with taken("fused"), torch.no_grad():
        for _ in range(2):
            assert_near(net(x := small_input()), untouched(x).double())
            fastenc.accelerate(net, undo=True)


def test_a_class_that_the_user_gives_later() -> None:
    class Squared(nn.LeakyReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    class Halved(nn.InstanceNorm3d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    net, untouched = twins(Net())
    for model in net, untouched:
        model.act.__class__ = Squared
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
        for model in net, untouched:
            model.norm.__class__ = Halved
        assert_near(net(x), untouched(x).double())


def test_all_or_nothing() -> None:
    """An error at any point leaves the model as it was, untouched or accelerated."""
    from fastenc.fusion import modules, search

    x = small_input()
    for net in (Net(), fastenc.accelerate(Net())):
        before = [dict(vars(module)) for module in net.modules()]
        for where, name in ((search, "find"), (modules.Activation, "install"), (modules.FusionScope, "install")):
            with mock.patch.object(where, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                fastenc.accelerate(net)
        assert [dict(vars(module)) for module in net.modules()] == before
        net(x)


# Copies.


def replica(net: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them."""
    twins = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = twins[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return twins[net]


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def shallow(net: nn.Module) -> nn.Module:
    twin = copy.copy(net)
    twin._modules = {name: copy.copy(child) for name, child in net._modules.items()}
    for child in twin.children():
        child._parameters = {n: None if p is None else p.detach().clone() for n, p in child._parameters.items()}
    return twin


@pytest.mark.parametrize(
    "copied", [replica, shallow, copy.deepcopy, saved, lambda net: pickle.loads(pickle.dumps(net))]
)
def test_copies_run_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    """On the copy's parameters, which are not the original's any more; undo of one does not reach the other."""
    net, untouched = twins(stack(nn.PReLU(4), nn.Dropout(0.0)))
    other = copied(net)
    assert type(other) is nn.Sequential
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        x = small_input()
        expected = untouched(x).double()
        with taken("fused"):
            for _ in range(2):
                with fused_calls() as search:
                    assert_near(other(x), expected)
                assert search.call_count == 1
                fastenc.accelerate(net, undo=True)
    assert "forward" not in vars(fastenc.accelerate(other, undo=True)[1])


def test_loads_in_a_new_process(tmp_path: Path) -> None:
    net = fastenc.accelerate(stack(nn.PReLU(4)))
    torch.save(net, tmp_path / "net.pt")
    code = (
        "import torch; net = torch.load('net.pt', weights_only=False); print(net.accelerated.count('fused')); "
        "assert net[1].forward.module is net[1]; net(torch.randn(2, 2, 4, 5, 6))"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


def test_loads_weights_only() -> None:
    """What torch lists as unsafe, allow-listed by name, is enough."""
    net = fastenc.accelerate(stack(nn.PReLU(4), nn.Dropout(0.1)).eval())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    names = [name.rpartition(".") for name in torch.serialization.get_unsafe_globals_in_checkpoint(buffer)]
    buffer.seek(0)
    with torch.serialization.safe_globals([getattr(sys.modules[module], name) for module, _, name in names]):
        other = torch.load(buffer, weights_only=True)
    with taken("fused"), fused_calls() as search, torch.no_grad():
        assert torch.equal(other(x := small_input()), net(x))
    assert search.call_count == 2


# Tools that go by the type of a module.


def test_hooks_by_type() -> None:
    """As DeepLift, thop and ptflops put them: on every module whose type is torch's own."""
    net, untouched = twins(stack(nn.ReLU(), nn.Dropout(0.0)))
    kinds = {nn.Conv3d: 1.0, nn.InstanceNorm3d: 2.0, nn.ReLU: 3.0, nn.Dropout: 4.0}
    results = []
    for model in net, untouched:
        seen: list[Any] = []
        for module in model.modules():
            if type(module) in kinds:
                module.register_forward_hook(
                    lambda module, args, y, seen=seen: seen.append(
                        (type(module), kinds[type(module)] * args[0].numel())
                    )
                )
            if type(module) is nn.ReLU:
                module.register_full_backward_hook(lambda module, dx, dy: (0.5 * dy[0],))
        x = torch.linspace(-1, 1, 240).view(2, 2, 3, 4, 5)
        with taken("fused"):
            results.append((gradients(model, x), seen))
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) == 5
    assert_all_near(results[0][0], [gradient.double() for gradient in results[1][0]])
