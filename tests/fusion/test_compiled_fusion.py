"""Accelerated networks under torch.compile and torch.export: one operator for each pair that eager mode fuses.

"fused" is "auto" as it is on a GPU, the kernels interpreted; the operators in the graphs are counted.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_near
from support.small_models import assert_like_untouched, small_input, stack, twins
from test_custom_ops import Compiled, fused_nodes
from test_third_party import BROKEN, COUNTS, NETWORKS, assert_as_near, gradients
from test_third_party import twins as network_twins
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fastenc

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "PReLU(4)": lambda: nn.PReLU(4),
    "PReLU(1)": nn.PReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "ReLU": nn.ReLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("between", [(), (nn.Identity(), nn.Dropout3d(0.5, inplace=True))], ids=["nothing", "dropout"])
def test_a_pair_is_one_operator(name: str, between: tuple[nn.Module, ...]) -> None:
    net, untouched = twins(stack(ACTIVATIONS[name](), *between).eval())
    with taken("fused"):
        compiled = Compiled(net)
        assert_like_untouched(compiled, untouched, small_input())  # type: ignore[arg-type]
    assert compiled.graphs == [1, 1]


def test_dropout_in_training_drops_the_same() -> None:
    """In one dimension, where the layout is the same."""
    net, untouched = twins(stack(nn.PReLU(4), nn.Dropout(0.5), order=1))
    x = small_input(order=1)
    with taken("fused"):
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.manual_seed(0)
        found = compiled(x)
    torch.manual_seed(0)
    assert_near(found, untouched(x).double())


@pytest.mark.parametrize("watched", [1, 2, 3])
def test_hooks_unfuse(watched: int) -> None:
    net, untouched = twins(stack(nn.PReLU(4), nn.Dropout(0.0)))
    for each in (net, untouched):
        each[watched].register_forward_hook(lambda module, args, output: 2 * output)
    x = small_input()
    with taken("fused"):
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
    assert compiled.graphs == [0]


def replaced_norm(net: Any) -> None:
    net[1] = nn.Identity()


def replaced_activation(net: Any) -> None:
    net[2] = nn.Sigmoid()


def removed_activation(net: Any) -> None:
    del net[2:]


class Negated(nn.Identity):
    """Nothing, to go by its kind."""

    def forward(self, input: Tensor) -> Tensor:
        return -input


def negated_between(net: Any) -> None:
    net.insert(2, Negated())


@pytest.mark.parametrize("surgery", [replaced_norm, replaced_activation, removed_activation, negated_between])
def test_surgery(surgery: Callable[[Any], None]) -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    x = small_input()
    for each in (net, untouched):
        surgery(each)
    with taken("fused"):
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
    assert compiled.graphs == [0]


class Tapped(nn.Sequential):
    """Gives away what is between its modules."""

    def forward(self, input: Tensor) -> Any:
        z = self[1](self[0](input))
        return self[2](z), z


def test_a_sequential_with_its_own_forward() -> None:
    net, untouched = twins(Tapped(*stack(nn.LeakyReLU(0.1))[:3]))
    x = small_input()
    with taken("fused"):
        compiled = Compiled(net)
        for found, expected in zip(compiled(x), untouched(x), strict=True):
            assert_near(found, expected.double())
    assert compiled.graphs == [0]


class Backwards(nn.Sequential):
    """Runs its modules from the last to the first."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(self._modules.values())  # type: ignore[arg-type]


def test_a_sequential_with_its_own_order() -> None:
    net, untouched = twins(Backwards(*reversed(stack(nn.PReLU(4)))))
    x = small_input()
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
    assert compiled.graphs == [1]


class Wrapped(nn.Module):
    """A pair in a Sequential, and one that meets in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.norm, self.activation = stack(nn.PReLU(4)), nn.InstanceNorm3d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.pair(x)))


@pytest.mark.parametrize("part", ["", "pair"])
def test_undone_and_repeated_after_compiling(part: str) -> None:
    """What was compiled runs the forward of now. torch itself does not compile the forward of a plain nn.Sequential."""
    net, untouched = twins(Wrapped())
    x = small_input()
    expected = untouched.get_submodule(part)(x).double()
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net.get_submodule(part), fullgraph=not part)
        assert_near(compiled(x), expected)
        assert compiled.graphs == ([1] if part else [2])
        fastenc.accelerate(net, undo=True)
        assert_near(compiled(x), expected)
        assert compiled.graphs == ([1] if part else [2, 0])
        fastenc.accelerate(nn.Sequential(net))
        assert_near(compiled(x), expected)


class ByName(nn.Module):
    """Calls its parts by `forward`, as MONAI's DiNTS does, and branches on a value around them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = stack(nn.PReLU(4))
        self.open = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell.forward(x) if self.open[0] else x


def test_calls_of_forward_are_calls_of_the_module() -> None:
    """So the part is the scope, which torch.compile traces even where it cannot trace what calls the part."""
    net, untouched = twins(ByName())
    assert net.accelerated.count("fused") == 1
    with taken("fused"):
        compiled = Compiled(net, fullgraph=False)
        assert_like_untouched(compiled, untouched, small_input())  # type: ignore[arg-type]
    assert sum(compiled.graphs) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """As many operators as eager mode fuses pairs, forward and backward, in one graph where torch makes one."""
    net, untouched, x = network_twins(name)
    torchs = gradients(untouched, x)
    with launches_replaced():
        compiled = Compiled(net, fullgraph=name not in BROKEN)
        ours = gradients(net, x, compiled)
        if name != "DiNTS":  # torch cannot export it
            assert fused_nodes(torch.export.export(net, (x,)).graph) == COUNTS[name][0]
    assert_as_near(ours, torchs, gradients(untouched.double(), x.double()))
    assert net.accelerated.count("fused") == COUNTS[name][0]
    assert sum(compiled.graphs) == 2 * COUNTS[name][0]


@pytest.mark.parametrize("activation", [nn.PReLU(4), nn.LeakyReLU(0.1)])
def test_autocast(activation: nn.Module) -> None:
    """As outside torch.compile, PReLU's result comes in autocast's dtype and LeakyReLU's in its input's."""
    net, _ = twins(nn.Sequential(nn.InstanceNorm3d(4), copy.deepcopy(activation)))
    x = small_input().repeat(1, 2, 1, 1, 1)
    with taken("fused"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        compiled = Compiled(net)
        found, expected = compiled(x), net(x)
    assert compiled.graphs == [1]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_half_a_pair_of_parameters(missing: str) -> None:
    """A bias without a weight, and a weight without a bias."""
    net = stack(nn.PReLU(4))
    setattr(net[1], missing, None)
    net, untouched = twins(net)
    with taken("fused"):
        compiled = Compiled(net)
        assert_like_untouched(compiled, untouched, small_input())  # type: ignore[arg-type]
    assert compiled.graphs == [1, 1]


def test_inputs_are_converted_to_channels_last() -> None:
    net, _ = twins(stack(nn.PReLU(4)))
    seen: list[Tensor] = []

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        convolutions = [node for node in module.graph.nodes if node.target is torch.ops.aten.convolution.default]
        seen.extend(node.args[0].meta["val"] for node in convolutions)
        return module.forward

    torch.compiler.reset()
    with taken("fused"), torch.no_grad():
        y = torch.compile(net, fullgraph=True, backend=aot_autograd(fw_compiler=look))(small_input())
    assert len(seen) == 2
    assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in seen)
    assert y.is_contiguous()


def test_another_size_compiles_nothing() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net, dynamic=True)
        for size in ((5, 6, 7), (9, 8, 10), (12, 5, 6)):
            x = torch.randn(2, 2, *size)
            assert_near(compiled(x), untouched(x).double())
    assert compiled.graphs == [1]


def test_exported() -> None:
    net, untouched = twins(stack(nn.PReLU(4)).eval())
    x = small_input()
    with taken("fused"):
        program = torch.export.export(net, (x,))
        assert fused_nodes(program.graph) == 1
        assert_near(program.module()(x), untouched(x).double())


@pytest.mark.parametrize("slope", [nn.PReLU(4), nn.LeakyReLU(0.1)])
def test_instance_norm_act(slope: nn.Module) -> None:
    net = fastenc.InstanceNormAct3d(4, slope, affine=True)
    x = small_input().repeat(1, 2, 1, 1, 1)
    with taken("fused"):
        compiled = Compiled(net)
        assert_near(compiled(x), slope(net.norm(x)).double())
    assert compiled.graphs == [1]
