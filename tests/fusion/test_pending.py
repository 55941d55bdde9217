"""What an accelerated norm hands out while torch.compile or torch.export traces: numbers, hooks, surgery.

"fused" is "auto" as it is on a GPU, the kernels interpreted; the operators in the graphs are counted.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from support.backends import taken
from support.plain import assert_all_near, assert_near
from support.small_models import assert_like_untouched, small_input, stack, twins
from test_custom_ops import Compiled, fused_nodes
from test_surgery import SURGERY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastenc
from fastenc.commands import third_party


class Uses(nn.Module):
    """A pair whose forward becomes another one: `use` says what comes between norm and activation."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)
        self.act = activation or nn.LeakyReLU(0.1)
        self.use: Callable[..., Any] | None = None
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        z = self.norm(h)
        return self.act(z) if self.use is None else self.use(self, z, h)


def in_place(change: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    def use(net: Any, z: Any, h: Tensor) -> Any:
        z = change(z, h)
        return net.act(z) + z

    return use


def then(function: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    return lambda net, z, h: net.act(function(z, h))


def times(z: Any, h: Tensor) -> Any:
    z *= 2
    return z


def minus(z: Any, h: Tensor) -> Any:
    z -= h
    return z


def plus(z: Any, h: Tensor) -> Any:
    z += h
    return z


def onto(z: Any, h: Tensor) -> Any:
    h = h.clone()
    h += z
    return h


def part(z: Any, h: Tensor) -> Any:
    z[:, 1:] = 0.5
    return z


def grows(net: Any, z: Any, h: Tensor) -> Any:
    with torch.no_grad():
        y = net.act(z)
    return y + net.act(z)


def kept(net: Any, z: Any, h: Tensor) -> Any:
    net.kept.append(z)
    return net.act(z) + net.kept.pop().mean()


# The use, and how many operators it leaves.
USES: dict[str, tuple[Callable[..., Any], int]] = {
    "z * 2": (then(lambda z, h: z * 2), 0), "2 * z": (then(lambda z, h: 2 * z), 0),
    "1 - z": (then(lambda z, h: 1 - z), 0), "h - z": (then(lambda z, h: h - z), 0),
    "z / h": (then(lambda z, h: z / h), 0), "z ** 2": (then(lambda z, h: z**2), 0), "-z": (then(lambda z, h: -z), 0),
    "abs(z)": (then(lambda z, h: abs(z)), 0), "z[:, 1:]": (then(lambda z, h: z[:, 1:]), 0),
    "z > 0": (then(lambda z, h: torch.where(z > 0, z, h)), 0), "len(z)": (then(lambda z, h: z * len(z)), 0),
    "z.shape": (then(lambda z, h: z.view(z.shape) * z.size(0) * z.dim()), 0),
    "z.mean()": (then(lambda z, h: h + z.mean()), 0), "sigmoid": (then(lambda z, h: torch.sigmoid(z) + 0), 0),
    "add": (then(lambda z, h: torch.add(z, h, alpha=2)), 0), "gelu": (then(lambda z, h: nn.functional.gelu(z)), 0),
    "z *= 2": (in_place(times), 0), "z -= h": (in_place(minus), 0), "z[:, 1:] =": (in_place(part), 0),
    "h += z": (in_place(onto), 0), "z.add_": (in_place(lambda z, h: z.add_(1.0)), 0),
    "z + 1": (then(lambda z, h: z + 1), 0), "z + row": (then(lambda z, h: z + h[:, :, :1, :1, :1]), 0),
    "z + h + h": (then(lambda z, h: z + h + h), 0), "z + z": (then(lambda z, h: z + z), 1),
    "z + h": (then(lambda z, h: z + h), 1), "h + z": (then(lambda z, h: h + z), 1), "z += h": (then(plus), 1),
    "z += h, kept": (in_place(plus), 1), "z.add": (then(lambda z, h: z.add(h)), 0),
    "act(z) + z": (lambda net, z, h: net.act(z) + z, 1), "act(z) twice": (lambda net, z, h: net.act(z) + net.act(z), 2),
    "no_grad": (grows, 0), "kept for a while": (kept, 1), "z itself": (lambda net, z, h: z, 0),
    "in a list": (lambda net, z, h: {"y": [z, net.act(h + 0)]}, 0),
}  # fmt: skip


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU(inplace=True)], ids=["out of place", "in place"])
@pytest.mark.parametrize("use", USES)
def test_any_use_gets_the_right_numbers(use: str, activation: nn.Module) -> None:
    """Under torch.compile and torch.export, after a search that saw nothing of it."""
    net, untouched = twins(nn.Sequential(Uses(activation), nn.Identity()))
    net[0].use = untouched[0].use = USES[use][0]
    x = small_input()
    expected = torch.utils._pytree.tree_leaves(untouched(x))
    with taken("fused"):
        compiled = Compiled(net)
        found = torch.utils._pytree.tree_leaves(compiled(x))
        assert all(type(leaf) is Tensor for leaf in found)
        assert_all_near(found, [leaf.double() for leaf in expected])
        program = torch.export.export(net, (x,))
        assert_all_near(torch.utils._pytree.tree_leaves(program.module()(x)), [leaf.double() for leaf in expected])
    inplace = vars(activation)["inplace"]
    count = 1 if inplace and use == "act(z) twice" else USES[use][1]
    assert (compiled.graphs[0], fused_nodes(program.graph)) == (count, count)


# Hooks and surgery.


# Dynamo calls backward hooks of a graph's outputs only.
@pytest.mark.parametrize("surgery", [each for each in SURGERY if "backward" not in each.__name__])
def test_surgery(surgery: Callable[[nn.Sequential], nn.Module]) -> None:
    net, untouched = twins(stack(nn.LeakyReLU(0.1), nn.Identity()))
    net, untouched = surgery(net), surgery(untouched)
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net, fullgraph=False)
        x = small_input()
        found = compiled(x)
        assert type(found) is Tensor
        assert_near(found, untouched(x).double())


@pytest.mark.parametrize("where", ["norm", "act", "between", "inner", "tail"])
def test_hooks_see_tensors(where: str) -> None:
    """Hooks on the norm, the activation, a module in between, and modules whose boundary the norm's output crosses."""

    class Crosses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True))
            self.tail = nn.Sequential(nn.Identity(), nn.LeakyReLU(0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.inner(x))

    paths = {"norm": "inner.1", "act": "tail.1", "between": "tail.0", "inner": "inner", "tail": "tail"}
    net, untouched = twins(Crosses())
    seen: list[type] = []
    x = small_input()
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
        assert compiled.graphs == [1]
        for model in net, untouched:
            module = model.get_submodule(paths[where])
            module.register_forward_hook(lambda module, args, y: seen.extend((type(args[0]), type(y))))
            module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
        assert compiled.graphs == [0]
    assert set(seen) == {Tensor}


@pytest.mark.parametrize("part", [1, slice(0, 2), slice(1, 3)])
def test_a_part_by_itself(part: Any) -> None:
    """A norm outside the module in which it meets its activation."""
    net, untouched = twins(stack(nn.PReLU(4)))
    x = torch.randn(2, 2 if part == slice(0, 2) else 4, 4, 5, 6)
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net[part])
        assert_near(compiled(x), untouched[part](x).double())
    assert compiled.graphs == [0]


def test_a_graph_that_fails_leaves_nothing_behind() -> None:
    net, _ = twins(stack(nn.PReLU(4)))
    net[2].forward = None
    with taken("fused"):
        with pytest.raises(Exception, match="not callable"):
            torch.export.export(net, (small_input(),))
        compiled = Compiled(net[1])
        assert type(compiled(small_input().repeat(1, 2, 1, 1, 1))) is Tensor


# What is not proven.


class Unproven(nn.Module):
    """A pair in eager mode; `what` makes it one that cannot be proven."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.PReLU()
        self.what, self.kept = what, {"z": [torch.zeros(())]}
        self.own = Keeper()

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "box" and x.shape[0] > 100:
            return x
        h = self.conv(x)
        view = h[:, 1:]
        z = self.norm(h)
        if self.what == "attribute":
            self.last = z
        elif self.what == "list":
            self.kept["z"][0] = z
        elif self.what == "own class":
            self.own.value = z
        elif self.what == "view":
            view.mul_(2.0)
        elif self.what == "module in place":
            nn.functional.relu(view, True)
        return self.act(z) + h


class Keeper:
    """Nothing that torch knows."""

    value: Any = None


@pytest.mark.parametrize("what", ["box", "attribute", "list", "own class", "view", "module in place"])
def test_unfused_where_nothing_is_proven(what: str) -> None:
    net, untouched = twins(nn.Sequential(Unproven(what)))
    assert net.accelerated.count("fused") == 1
    x = small_input()
    with taken("fused"), torch.no_grad():
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
    assert compiled.graphs == [0]
    holder: Any = net[0]
    keeps = {
        "attribute": lambda: holder.last,
        "list": lambda: holder.kept["z"][0],
        "own class": lambda: holder.own.value,
    }
    if what in keeps:
        assert type(keeps[what]()) is Tensor


# Under torch's own machinery.


def test_checkpointed() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = stack(nn.PReLU(4))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    net, untouched = twins(Checkpointed())
    with taken("fused"):
        compiled = Compiled(net)
        assert_like_untouched(compiled, untouched, small_input())  # type: ignore[arg-type]
    assert compiled.graphs == [1, 2], "the backward runs the forward again"


def test_a_graph_break_between_norm_and_activation() -> None:
    net, untouched = twins(nn.Sequential(Uses()))

    def use(net: Any, z: Any, h: Tensor) -> Any:
        torch._dynamo.graph_break()
        return net.act(z)

    net[0].use = untouched[0].use = use
    with taken("fused"):
        compiled = Compiled(net, fullgraph=False)
        assert_like_untouched(compiled, untouched, small_input())  # type: ignore[arg-type]
        compiled = Compiled(net[0].norm, fullgraph=False)
        assert type(compiled(torch.randn(2, 4, 3, 3, 3))) is Tensor


SUPERVISED: dict[str, Callable[[], nn.Module]] = {
    "PlainConvUNet": lambda: PlainConvUNet(
        **third_party.STAGES | {"deep_supervision": True}, n_conv_per_stage=1, n_conv_per_stage_decoder=1
    ),
    "ResidualEncoderUNet": lambda: ResidualEncoderUNet(
        **third_party.STAGES | {"deep_supervision": True}, n_blocks_per_stage=1, n_conv_per_stage_decoder=1
    ),
    "DynUNet, residual": third_party.monai()["DynUNet, residual"],
}


class TracedError(Exception):
    """The graph is all that a test wants."""


SIZES = ((1, 16, 16, 16), (2, 16, 16, 16), (2, 24, 16, 16), (1, 16, 24, 32))


@pytest.mark.parametrize("name", SUPERVISED)
def test_no_recompilation_that_the_untouched_model_lacks(name: str) -> None:
    """Other batches, patches, deep supervision and modes; each graph holds every pair that runs in it."""
    untouched: Any = SUPERVISED[name]()
    net = fastenc.accelerate(copy.deepcopy(untouched))

    def graphs(model: Any) -> list[list[int]]:
        torch.compiler.reset()
        found: list[int] = []

        def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            found.append(sum("instance_norm_prelu" in str(node.target) for node in module.graph.nodes))

            def stop(*inputs: Any) -> Any:
                raise TracedError

            return stop

        compiled = torch.compile(model, backend=look)
        after = []
        for step in (*SIZES, "alone", "supervised", "eval"):
            if isinstance(step, str):
                if hasattr(model, "decoder"):
                    model.decoder.deep_supervision = step == "supervised"
                model.train(step != "eval")
            x = torch.randn(step[0], 1, *step[1:]) if isinstance(step, tuple) else torch.randn(2, 1, 16, 16, 24)
            with pytest.raises(TracedError):
                compiled(x)
            after.append(list(found))
        return after

    expected = graphs(untouched)
    with taken("fused"):
        found = graphs(net)
    assert all(len(a) <= len(b) for a, b in zip(found, expected, strict=True))
    assert set(found[-1]) == {net.accelerated.count("fused")}
