"""A layer calls its submodules whenever other code could observe that it does not.

The backend is "auto" as on a GPU, with CPU tensors and interpreted kernels. Only the network's middle layer is tampered
with: it has to run its submodules, the two others have to stay fused.
"""

import re
import types
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import assert_all_near, twins
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations, parametrize, prune

from fastenc import InstanceNormAct3d, explain

pytestmark = pytest.mark.usefixtures("every_weight_is_big_enough")
LAYERS = ["netbody.1.conv_list.0", "netbody.1.conv_scale", "netbody.2.conv_scale"]
MIDDLE = LAYERS[1]


def network_twins() -> tuple[nn.Module, nn.Module]:
    return twins(2, [2, 1], dtype=torch.float32)


def small_input() -> Tensor:
    return torch.randn(2, 1, 6, 5, 7, generator=torch.Generator().manual_seed(1))


def results(net: nn.Module, training: bool = True) -> list[Tensor]:
    """Output, then the gradients of the sum of its squares in the input and in every parameter."""
    x = small_input().requires_grad_()
    y = net.train(training)(x)
    net.zero_grad()
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


def rows(net: nn.Module) -> dict[str, Any]:
    return {row.name: row for row in explain(net, small_input())}


def assert_only_the_middle_layer_is_eager(net: nn.Module) -> None:
    found = rows(net)
    assert list(found) == LAYERS
    for name, row in found.items():
        if name == MIDDLE:
            assert row.route == "eager"
            assert row.reason
        else:
            assert (row.route, row.reason) == ("triton", None), name


# Hooks

HOOKS = {
    "forward": "register_forward_hook",
    "forward pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "backward pre": "register_full_backward_pre_hook",
}
GLOBAL_HOOKS = {
    "forward": modules.register_module_forward_hook,
    "forward pre": modules.register_module_forward_pre_hook,
    "backward": modules.register_module_full_backward_hook,
    "backward pre": modules.register_module_full_backward_pre_hook,
}
LEAVES = (nn.Conv3d, nn.InstanceNorm3d, nn.PReLU, nn.AdaptiveAvgPool3d, nn.Linear)


def logged(log: list[str], name: str) -> Callable[..., None]:
    def hook(*args: object) -> None:
        log.append(name)

    return hook


@pytest.mark.parametrize("place", ["mconv.0", "mconv.1", "mconv.2", "mconv"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_a_submodule(kind: str, place: str) -> None:
    net, plain = network_twins()
    logs: list[list[str]] = []
    outcomes, handles = [], []
    with taken("fused"):
        for network in (net, plain):
            log: list[str] = []
            module = network.get_submodule(f"{MIDDLE}.{place}")
            handles.append(getattr(module, HOOKS[kind])(logged(log, place)))
            outcomes.append(results(network))
            logs.append(log)
        assert logs == [[place], [place]]
        assert_all_near(*outcomes)
        assert_only_the_middle_layer_is_eager(net)

        handles[0].remove()
        logs[0].clear()
        with eager_norms() as calls:
            assert_all_near(results(net), outcomes[1])
        assert calls.call_count == 0
        assert not logs[0]
        assert {row.route for row in rows(net).values()} == {"triton"}


CHANGES: dict[str, tuple[str, Callable[..., object]]] = {
    "output": ("register_forward_hook", lambda module, args, y: 2 * y + 1),
    "input": ("register_forward_pre_hook", lambda module, args: (args[0] * 3 - 1,)),
    "gradient": ("register_full_backward_hook", lambda module, grad_input, grad_output: (grad_input[0] * 3,)),
}


@pytest.mark.parametrize(
    ("changed", "place"),
    [*product(CHANGES, ["mconv.0", "mconv.1", "mconv.2"]), ("output", "mconv"), ("output", "")],
)
def test_hook_that_changes_the_result(changed: str, place: str) -> None:
    net, plain = network_twins()
    register, hook = CHANGES[changed]
    with taken("fused"):
        for network in (net, plain):
            getattr(network.get_submodule(f"{MIDDLE}.{place}".rstrip(".")), register)(hook)
        assert_all_near(results(net), results(plain))


@pytest.mark.parametrize("route", ["auto", "fused"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_everything_fire_in_the_same_order(kind: str, route: str) -> None:
    """What a summary printer or a profiler does; pool, stem and fc are among them."""
    net, plain = network_twins()
    logs: list[list[str]] = []
    with taken(route):
        for network in (net, plain):
            log: list[str] = []
            for name, module in network.named_modules():
                if isinstance(module, LEAVES) or name in LAYERS:
                    getattr(module, HOOKS[kind])(logged(log, name))
            results(network)
            logs.append(log)
    assert len(logs[1]) == 9 + 3 + 4
    assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hook(kind: str) -> None:
    net, plain = network_twins()
    log: list[str] = []

    def hook(module: nn.Module, *args: object) -> None:
        if isinstance(module, LEAVES):
            log.append(type(module).__name__)

    with taken("fused"):
        handle = GLOBAL_HOOKS[kind](hook)
        try:
            found, seen = results(net), log.copy()
            log.clear()
            expected = results(plain)
            assert seen == log
            assert log.count("PReLU") == 3
            assert_all_near(found, expected)
            assert all(row.route == "eager" and row.reason for row in rows(net).values())
        finally:
            handle.remove()
        assert {row.route for row in rows(net).values()} == {"triton"}


def results_without_eager_norms(net: nn.Module) -> list[Tensor]:
    with taken("fused"), eager_norms() as calls:
        found = results(net)
    assert calls.call_count == 0
    return found


@pytest.mark.parametrize("place", ["netbody.0", "netbody.3", "netbody.4", "fc", "netbody.1", MIDDLE])
def test_a_hook_on_other_modules_leaves_the_layers_fused(place: str) -> None:
    net, plain = network_twins()
    log: list[str] = []
    net.get_submodule(place).register_forward_hook(logged(log, place))
    found = results_without_eager_norms(net)
    assert log == [place]
    with taken("fused"):
        assert_all_near(found, results(plain))


@pytest.mark.parametrize("name", ["mconv.0.weight", "mconv.0.bias", "mconv.1.weight", "mconv.2.weight"])
def test_hooks_on_a_parameter(name: str) -> None:
    """These hooks belong to autograd: the layer stays fused, and they fire."""
    net, plain = network_twins()
    log: list[str] = []
    for network in (net, plain):
        parameter = network.get_parameter(f"{MIDDLE}.{name}")
        parameter.register_hook(lambda gradient: 5 * gradient)
    net.get_parameter(f"{MIDDLE}.{name}").register_post_accumulate_grad_hook(logged(log, name))
    found = results_without_eager_norms(net)
    assert log == [name]
    with taken("fused"):
        assert_all_near(found, results(plain))


# Submodules that differ from those that the layer was built with


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ScaledNorm(nn.InstanceNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class ShiftedPReLU(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class DoubledConv(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def running_norm() -> nn.InstanceNorm3d:
    norm = nn.InstanceNorm3d(2, affine=True, track_running_stats=True)
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(2.0)
    return norm


def put(index: int, module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        torch.manual_seed(5)
        layer.mconv[index] = module()

    return change


def parametrized(index: int, name: str) -> Callable[[nn.Module], None]:
    return lambda layer: parametrize.register_parametrization(layer.mconv[index], name, Doubled())


def own_forward(index: int) -> Callable[[nn.Module], None]:
    """What libraries that move weights between devices do: forward replaced on the instance."""

    def change(layer: nn.Module) -> None:
        module = layer.mconv[index]
        module.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, module)

    return change


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer.mconv[2])


def rebuilt(layer: nn.Module) -> None:
    layer.mconv = nn.Sequential(layer.mconv[0], layer.mconv[1], nn.Tanh(), layer.mconv[2])


TAMPERED: dict[str, Callable[[nn.Module], Any]] = {
    "norm weight parametrized": parametrized(0, "weight"),
    "norm bias parametrized": parametrized(0, "bias"),
    "slope parametrized": parametrized(1, "weight"),
    "norm is Identity": put(0, nn.Identity),
    "norm is BatchNorm3d": put(0, lambda: nn.BatchNorm3d(2)),
    "norm is a subclass": put(0, lambda: ScaledNorm(2, affine=True)),
    "norm has running statistics": put(0, running_norm),
    "norm has its own forward": own_forward(0),
    "norm pruned": lambda layer: prune.l1_unstructured(layer.mconv[0], "weight", amount=1),
    "activation pruned": lambda layer: prune.l1_unstructured(layer.mconv[1], "weight", amount=1),
    "activation is Tanh": put(1, nn.Tanh),
    "activation is a subclass": put(1, lambda: ShiftedPReLU(2)),
    "activation has its own forward": own_forward(1),
    "norm compiled by itself": lambda layer: layer.mconv[0].compile(backend="eager"),
}


def checked_change(change: Callable[[nn.Module], Any]) -> nn.Module:
    """The network with its middle layer changed, after a check that its results are those of its changed twin."""
    net, plain = network_twins()
    for network in (net, plain):
        change(network.get_submodule(MIDDLE))
    with taken("fused"):
        assert_all_near(results(net), results(plain))
        assert_all_near(results(net, training=False), results(plain, training=False))
    return net


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_layer_runs_its_submodules(name: str) -> None:
    net = checked_change(TAMPERED[name])
    with taken("fused"):
        assert_only_the_middle_layer_is_eager(net)
    with taken("triton"):
        reason = rows(net)[MIDDLE].reason
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            net(small_input())


def test_parametrization_removed_is_fused_again() -> None:
    net, plain = network_twins()
    for network in (net, plain):
        norm = network.get_submodule(MIDDLE).mconv[0]
        parametrize.register_parametrization(norm, "weight", Doubled())
        parametrize.remove_parametrizations(norm, "weight")
    found = results_without_eager_norms(net)
    with taken("fused"):
        assert_all_near(found, results(plain))


CHANGED: dict[str, Callable[[nn.Module], Any]] = {
    "convolution weight parametrized": parametrized(2, "weight"),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer.mconv[2]),
    "weight_norm by hook": old_weight_norm,
    "convolution is a subclass": put(2, lambda: DoubledConv(2, 2, 3, 2, 1, bias=False)),
    "convolution has its own forward": own_forward(2),
    "convolution is a Sequential": put(2, lambda: nn.Sequential(nn.Conv3d(2, 2, 3, 2, 1), nn.Tanh())),
    "a module is added": rebuilt,
    "a module is appended": lambda layer: layer.mconv.append(nn.Tanh()),
    "activation is ReLU": put(1, nn.ReLU),
    "activation is ReLU in place": put(1, lambda: nn.ReLU(inplace=True)),
    "activation is LeakyReLU": put(1, lambda: nn.LeakyReLU(0.3)),
    "another eps": put(0, lambda: nn.InstanceNorm3d(2, eps=0.5, affine=True)),
    "norm without parameters": put(0, lambda: nn.InstanceNorm3d(2)),
    "one slope": put(1, lambda: nn.PReLU(init=-0.7)),
    "convolution with bias": put(2, lambda: nn.Conv3d(2, 2, 3, 2, 1)),
    "convolution with dilation": put(2, lambda: nn.Conv3d(2, 2, 2, 2, 2, dilation=2)),
    "convolution with groups": put(2, lambda: nn.Conv3d(2, 2, 3, 2, 1, groups=2)),
    "circular convolution": put(2, lambda: nn.Conv3d(2, 2, 3, 2, 1, padding_mode="circular")),
    "padding in words": put(2, lambda: nn.Conv3d(2, 2, 3, 1, "same")),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_layer_gives_the_changed_result(name: str) -> None:
    """Such a layer may stay fused or not, but its result must be right."""
    net = checked_change(CHANGED[name])
    with taken("fused"):
        for layer in (LAYERS[0], LAYERS[2]):
            assert rows(net)[layer].route == "triton"


REPLACED: dict[str, Callable[[nn.Module], None]] = {
    "pool": lambda net: net.netbody.__setitem__(4, nn.AdaptiveMaxPool3d(1)),
    "stem": lambda net: net.netbody.__setitem__(0, DoubledConv(1, 2, 5, padding=2)),
    "last convolution": lambda net: net.netbody.__setitem__(3, DoubledConv(4, 4, 1)),
    "fc": lambda net: setattr(net, "fc", nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
    "block": lambda net: net.netbody.__setitem__(1, nn.Conv3d(2, 2, 1)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_modules_replaced_around_the_layers(name: str) -> None:
    net, plain = network_twins()
    for network in (net, plain):
        torch.manual_seed(5)
        REPLACED[name](network)
    with taken("fused"):
        assert_all_near(results(net), results(plain))


@pytest.mark.parametrize("place", [MIDDLE, "netbody.1"])
def test_a_part_compiled_by_itself_is_called(place: str) -> None:
    """nn.Module.compile changes what a call of that module does, so it has to be called."""
    net, plain = network_twins()
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with taken("fused"):
        net.get_submodule(place).compile(backend=compiler)
        assert_all_near(results(net), results(plain))
    assert graphs


def test_one_layer_used_alone() -> None:
    net, plain = network_twins()
    x = torch.randn(2, 2, 6, 5, 7)
    with taken("fused"), eager_norms() as calls:
        y = net.get_submodule(MIDDLE)(x)
        assert calls.call_count == 0
    torch.testing.assert_close(y, plain.get_submodule(MIDDLE)(x), rtol=1e-4, atol=1e-5)


def doubled(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *arguments: 2.0 * own(self, *arguments)


@pytest.mark.parametrize("at", ["0", "1.conv_scale.mconv.2", "3"])
def test_a_convolution_whose_method_was_replaced(at: str) -> None:
    """_conv_forward, by which code pads in another way."""
    net, plain = network_twins()
    for body in (net.netbody, plain.netbody):
        layer = body.get_submodule(at)
        layer._conv_forward = types.MethodType(doubled(type(layer)._conv_forward), layer)
    with taken("fused"):
        assert_all_near(results(net), results(plain))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.Conv3d, "forward"), (nn.Conv3d, "_conv_forward"), (nn.InstanceNorm3d, "forward"), (nn.PReLU, "forward")],
)
def test_a_class_whose_method_was_replaced(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plain = network_twins()
    pair = InstanceNormAct3d(1, nn.PReLU(1), affine=True)
    monkeypatch.setattr(kind, name, doubled(getattr(kind, name)))
    with taken("fused"):
        assert_all_near(results(net), results(plain))
        x = small_input()
        assert_all_near([pair(x)], [pair.activation(pair.norm(x))])


class Shifting(Tensor):
    """A tensor whose normalisations are larger by 1."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return y + 1.0 if func is nn.functional.instance_norm else y


@pytest.mark.parametrize("at", ["0", "1.conv_scale.mconv.2"])
def test_the_output_of_a_convolution_whose_weight_has_another_class(at: str) -> None:
    """Its output has that class too, whose functions run."""
    net, plain = network_twins()
    for body in (net.netbody, plain.netbody):
        layer = body.get_submodule(at)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Shifting))
    with taken("fused"), torch.no_grad():
        y, expected = net(small_input()), plain(small_input())
    assert_all_near([y.as_subclass(Tensor)], [expected.as_subclass(Tensor)])
