"""accelerate, on small networks of plain torch: the numbers of the untouched model, in training and under tracers.

"auto" is the eager route, where equal means bitwise; "fused" is the Triton route as on a GPU, interpreted.
"""

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import assert_all_near, assert_near, gradients
from support.small_models import ACTIVATIONS, Shared, assert_like_untouched, fused_calls, small_input, stack, twins
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fastenc


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eager_route_is_bitwise_equal(activation: str, order: int) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation](), order=order))
    x = small_input(order)
    for found, expected in zip(gradients(net, x), gradients(untouched, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused(activation: str, order: int) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation](), nn.Identity(), order=order))
    with taken("fused"):
        with fused_calls() as pairs:
            gradients(net, small_input(order))
        assert pairs.call_count == 1
        assert_like_untouched(net, untouched, small_input(order))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [nn.Dropout(0.4), nn.Dropout1d(0.4), nn.Dropout(0.4, True), nn.Dropout(0.0)])
def test_dropout_commutes(dropout: nn.Module, training: bool) -> None:
    """The same seed drops the same elements; in 1-D, where the layout in which torch draws them stays."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1), dropout, order=1).train(training))
    x = small_input(1)
    with taken("fused"):
        if not (training and dropout.inplace):
            with fused_calls() as pairs:
                gradients(net, x)
            assert pairs.call_count == 1
        torch.manual_seed(3)
        found = gradients(net, x)
    torch.manual_seed(3)
    assert_all_near(found, gradients(untouched, x))


def test_dropped_and_then_not_activated() -> None:
    """A dropout whose activation was taken away still drops what it drops, in the gradients too."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1), nn.Dropout(0.5), order=1))
    net[3], untouched[3] = nn.Tanh(), nn.Tanh()
    x = small_input(1)
    torch.manual_seed(3)
    with taken("fused"):
        found = gradients(net, x)
    torch.manual_seed(3)
    assert_all_near(found, gradients(untouched, x))


def test_shared_activation_and_a_norm_alone() -> None:
    net, untouched = twins(Shared())
    assert [(norm.name, norm.outcome) for norm in net.accelerated] == [
        ("norm1", "fused"), ("norm2", "fused"), ("norm3", "alone"),
    ]  # fmt: skip
    with (
        taken("fused"),
        eager_norms() as norms,
        mock.patch.object(nn.functional, "prelu", wraps=nn.functional.prelu) as p,
    ):
        assert_like_untouched(net, untouched, small_input())
    assert p.call_count == 1 + 3, "one after the convolution, and the untouched model's three"
    assert norms.call_count == 3, "the untouched model's"


def test_aliased_modules() -> None:
    """nnU-Net registers its layers twice."""
    inner = stack(nn.LeakyReLU(inplace=True))
    net = nn.ModuleDict({"norm": inner[1], "all": inner, "act": inner[2]})
    fastenc.accelerate(net["all"])
    assert type(net["norm"]) is type(net["all"][1])
    assert net["norm"] is net["all"][1]
    assert net["act"] is net["all"][2]


# Training and tracing.


def test_double_backward() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))

    def penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *model.parameters()], allow_unused=True))[:-1]

    x = small_input()
    with taken("fused"):
        found = penalty(net, x)
    assert_all_near(found, penalty(untouched.double(), x.double()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant: bool) -> None:
    """The recomputation fuses the same pairs, though it runs the blocks by themselves."""
    net, untouched = twins(nn.Sequential(stack(nn.PReLU(4), order=1), stack(nn.ReLU(), nn.Dropout(0.5), order=1)))

    class Checkpointed(nn.Module):
        def __init__(self, blocks: nn.Module) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    x = small_input(1).requires_grad_()
    with taken("fused"), fused_calls() as pairs:
        torch.manual_seed(3)
        found = Checkpointed(net)
        found(x).square().sum().backward()
    assert pairs.call_count == 4
    torch.manual_seed(3)
    expected = Checkpointed(untouched)
    expected(x).square().sum().backward()
    assert_all_near([p.grad for p in found.parameters()], [p.grad for p in expected.parameters()])


@pytest.mark.parametrize("activation", ["PReLU", "LeakyReLU"])
def test_autocast(activation: str) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation]()))
    x = small_input()
    with torch.autocast("cpu", torch.bfloat16):
        with taken("fused"):
            found = gradients(net, x)
        expected = gradients(untouched, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 2**-5 * b.float().norm() + 1e-2 * expected[-1].norm()


def test_inference_mode() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    with taken("fused"), torch.inference_mode():
        x = small_input()
        with fused_calls() as pairs:
            y = net(x)
        assert pairs.call_count == 1
        assert_near(y, untouched(x).double())
        assert_near(net[:2](x), untouched[:2](x).double())


def compiled(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    return torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)


def exported(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    program = torch.export.export(net, (x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    fused = fastenc.route.reason(x) is None
    assert (torch.ops.aten.instance_norm.default in targets) != fused
    assert (torch.ops.fastenc.instance_norm_prelu.default in targets) == fused
    return program.module()


def symbolic(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    graph = fx.symbolic_trace(net)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 4
    return graph


def jitted(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, x)


@pytest.mark.parametrize("tracer", [compiled, exported, symbolic, jitted])
@pytest.mark.parametrize("route", ["auto", "fused"])
def test_tracers(tracer: Callable[..., Any], route: str) -> None:
    torch.compiler.reset()
    net, untouched = twins(stack(nn.PReLU(4)).eval())
    x = small_input()
    with taken(route):
        assert_near(tracer(net, x)(x), untouched(x).double())


def test_functional_transforms() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    x = small_input()
    with taken("fused"):
        found, expected = (torch.func.vmap(model)(x[:, None]) for model in (net, untouched))
        assert torch.equal(found, expected)


# The layout.


def test_inputs_are_converted_to_channels_last() -> None:
    net = fastenc.accelerate(stack(nn.PReLU(4))[:3])
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    x = small_input()
    with taken("fused"):
        y = net(x)
        assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in seen)
        assert y.is_contiguous()
        assert torch.equal(net(x.contiguous(memory_format=torch.channels_last_3d)), y)
    assert all(parameter.is_contiguous() for parameter in net.parameters())
    seen.clear()
    net(x)
    assert seen[0] is x, "the eager route touches nothing"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", ["sliced", "permuted", "expanded", "channels-last, sliced", "channels-last"])
def test_the_output_has_the_layout_of_the_input(given: str, compiled: bool) -> None:
    whole = torch.randn(2, 2, 7, 6, 6)
    x = {
        "sliced": whole[:, :, 1:6],
        "permuted": whole.transpose(2, 4),
        "expanded": whole[:1].expand(2, -1, -1, -1, -1),
        "channels-last, sliced": whole.contiguous(memory_format=torch.channels_last_3d)[:, :, 1:6],
        "channels-last": whole.movedim(1, -1).contiguous().movedim(-1, 1),
    }[given]
    net, untouched = twins(stack(nn.PReLU(4))[:3])
    seen: list[Tensor] = []
    if not compiled:
        net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with taken("fused"), torch.no_grad():
        y = (torch.compile(net, backend="eager", fullgraph=True) if compiled else net)(x)
    assert_near(y, untouched(x))
    assert y.is_contiguous() != given.startswith("channels-last")
    assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in seen)


def test_arguments_of_any_kind() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack(nn.ReLU())

        def forward(self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
            y = scale * self.net(x)
            return {"y": y if extra is None else y + extra["shift"], "scale": scale, "all": [y, y.sum()]}

    net, untouched = twins(Many())
    x, shift = small_input(), torch.randn(2, 2, 2, 3, 4)
    with taken("fused"):
        for arguments, keywords in (((x,), {}), ((x, 2.0), {"extra": {"shift": shift}}), ((), {"x": x})):
            found, expected = net(*arguments, **keywords), untouched(*arguments, **keywords)
            assert found["scale"] == expected["scale"]
            assert_all_near([found["y"], *found["all"]], [expected["y"], *expected["all"]])
            assert found["y"].stride() == expected["y"].stride()


class Annotated(Tensor):
    """A tensor that carries a note along, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        notes = [argument.note for argument in args if isinstance(argument, Annotated) and hasattr(argument, "note")]
        if isinstance(result, Annotated) and notes:
            result.note = notes[0]
        return result


def test_annotated_tensors() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    x = small_input().as_subclass(Annotated)
    x.note = "kept"
    with taken("fused"):
        with fused_calls() as pairs:
            y = net(x)
        assert pairs.call_count == 1
    assert type(y) is Annotated
    assert y.note == "kept"
    assert_near(
        y.as_subclass(Tensor), untouched(small_input().as_subclass(Annotated).copy_(x)).as_subclass(Tensor).double()
    )
    assert torch.equal(net(x), untouched(x))
