"""On the fused route, tensors stay channels-last from the first convolution to the last, and Parameters contiguous.

As on a GPU, with CPU tensors: strides of what every convolution is given and gives, and a trace without copies.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import taken
from support.plain import small_twins, twins
from torch import Tensor, nn
from torch.profiler import profile

import fastenc
from fastenc import convolution
from fastenc.kernels.layout import MEMORY_FORMAT

LAST = torch.channels_last_3d
SIZE = (9, 8, 11)
ARGUMENTS: dict[str, Any] = {"channel": 4, "layers": [2, 1], "in_planes": 3, "out_length": 5}


def net_and_input(**changes: Any) -> tuple[nn.Module, Tensor]:
    net, _ = small_twins(torch.float32, **{**ARGUMENTS, **changes})
    return net, torch.randn(2, 3, *SIZE)


class Convolutions:
    """What each call of torch's convolution, and of its backward, was given and gave."""

    def __init__(self) -> None:
        self.forward: list[dict[str, Tensor]] = []
        self.backward: list[dict[str, Tensor | None]] = []


@pytest.fixture
def convolutions() -> Iterator[Convolutions]:
    seen = Convolutions()
    forward, backward = torch.convolution, torch.ops.aten.convolution_backward

    def run(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        y = forward(x, weight, *rest)
        seen.forward.append({"x": x, "weight": weight, "y": y})
        return y

    def run_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        gradients = backward(dy, x, weight, *rest)
        seen.backward.append({"dy": dy, "x": x, "weight": weight, "dx": gradients[0], "dweight": gradients[1]})
        return gradients

    with (
        mock.patch.object(torch, "convolution", run),
        mock.patch.object(torch.ops.aten, "convolution_backward", run_backward),
    ):
        yield seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.contiguous_format, LAST])
def test_every_convolution_sees_and_makes_channels_last(
    given: torch.memory_format, autocast: bool, recompute: bool, convolutions: Convolutions
) -> None:
    net, x = net_and_input()
    net.recompute = recompute
    x = x.contiguous(memory_format=given).requires_grad_()
    with taken("fused"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        leaves = [x, *net.parameters()]
        gradients = dict(zip(leaves, torch.autograd.grad(y.float().square().sum(), leaves), strict=True))
    assert len(convolutions.forward) == 5
    assert len(convolutions.backward) == (5 if not recompute else 8)  # a layer's weight, then its input
    expected = torch.bfloat16 if autocast else torch.float32
    # Without bfloat16 in its instruction set a CPU convolves it in its own contiguous layout.
    made = ("y", "dy", "dx", "dweight") if autocast and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    for call in convolutions.forward:
        for name, tensor in call.items():
            assert name in made or tensor.is_contiguous(memory_format=LAST), name
            assert tensor.dtype == expected
    for i, backward in enumerate(convolutions.backward):
        for name, gradient in backward.items():
            if name in made:
                continue
            if gradient is not None and not (i == 0 and name == "dy"):  # that one comes expanded from the pool
                assert gradient.is_contiguous(memory_format=LAST), name
    for name, parameter in net.named_parameters():
        assert parameter.is_contiguous(), name
        assert gradients[parameter].is_contiguous(), (
            name
        )  # as it leaves the convolution, not as autograd may lay it out
        assert gradients[parameter].dtype == torch.float32
    assert gradients[x].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_cast_and_converted_in_one_op(dtype: torch.dtype) -> None:
    layer = nn.Conv3d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, *SIZE, dtype=dtype).contiguous(memory_format=LAST)
    plan = convolution.plan_convolution(
        x.shape, layer.weight.shape, (1,) * 3, (1,) * 3, (1,) * 3, 1, True, "cuda", True
    )
    assert plan is not None
    with profile() as profiler:
        weight = convolution._laid_out(layer.weight, LAST, plan, dtype)
    assert [event.name for event in profiler.events()].count("aten::copy_") == 1
    assert weight.dtype == dtype
    assert weight.is_contiguous(memory_format=LAST)


def test_the_users_channels_last_weights_are_kept(convolutions: Convolutions) -> None:
    """PyTorch's own idiom: then there is nothing to lay out, and the gradients come in the same layout."""
    net, x = net_and_input()
    net.to(memory_format=LAST)
    with taken("fused"):
        net(x).square().sum().backward()
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv3d)]
    assert [call["weight"].data_ptr() for call in convolutions.forward] == [w.data_ptr() for w in weights]
    assert all(w.grad.is_contiguous(memory_format=LAST) for w in weights)


def _do_nothing(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty(2, x.shape[0] * x.shape[1])


def _do_nothing_backward(dy: Tensor, x: Tensor, *parameters: Any, **options: Any) -> tuple[Tensor, ...]:
    assert dy.stride() == x.stride(), "dy would be copied"
    return torch.empty_like(x), *(torch.empty_like(parameter) for parameter in parameters[:3])


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tensor_is_copied_between_the_convolutions(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of forward and backward without the launches contains no clone, copy or contiguous of a large tensor.

    Between the stem and the last convolution: these two lay out the input and what the pool gives back.
    """
    for room in ("functional", "recompute"):
        monkeypatch.setattr(f"fastenc.{room}.launchers", lambda: (_do_nothing, _do_nothing_backward))
    net, x = net_and_input()
    net.recompute = recompute
    layers = nn.Sequential(*(layer for block in net.netbody[1:3] for layer in (*block.conv_list, block.conv_scale)))
    x = torch.randn(2, 4, *SIZE).contiguous(memory_format=LAST).requires_grad_()
    with taken("fused"):
        out = layers(x)
        dy = torch.randn_like(out)
        with profile(record_shapes=True) as profiler:
            layers(x).backward(dy)
    smallest = out.numel()
    weights = [list(p.shape) for p in layers.parameters() if p.dim() == 5]
    copying = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::empty_strided"}
    seen = {event.name for event in profiler.events()}
    assert "aten::convolution_backward" in seen
    for event in profiler.events():
        for shape in event.input_shapes if event.name in copying else ():
            is_large = len(shape) == 5 and torch.Size(shape).numel() >= smallest and shape not in weights
            assert not is_large, (event.name, shape)


def test_a_map_comes_in_the_inputs_format() -> None:
    net, x = net_and_input(out_length=None)
    with taken("fused"):
        assert net(x).is_contiguous()
        y = net(x.contiguous(memory_format=LAST))
    assert y.is_contiguous(memory_format=LAST)
    assert not y.is_contiguous()


def given(name: str, order: int, planes: int) -> Tensor:
    """An input of `order` spatial axes in a layout of this name."""
    x = torch.randn(2, planes, *(8, 6, 10)[:order])
    if name == "sliced":
        return torch.randn(2, planes, *(16, 12, 20)[:order])[(..., *(slice(None, None, 2),) * order)]
    if name == "expanded":
        return x[:1].expand_as(x)
    if name == "transposed":
        return torch.randn(2, (8, 6, 10)[order - 1], *(8, 6, 10)[: order - 1], planes).transpose(1, -1)
    if name == "channels moved":
        return torch.randn(2, *(8, 6, 10)[:order], planes).movedim(-1, 1)
    if name == "cropped":
        return given("channels moved", order, planes)[:, :, 1:]
    return x


LAYOUTS = ("contiguous", "sliced", "expanded", "transposed", "channels moved", "cropped")


def assert_laid_out(y: Tensor, layout: str, expected: Tensor) -> None:
    """Channels-last for a channels-last input, and else contiguous, as torch's own result is."""
    last = layout in ("channels moved", "cropped") and y.dim() in MEMORY_FORMAT
    assert y.is_contiguous() != last
    assert y.is_contiguous(memory_format=MEMORY_FORMAT.get(y.dim(), torch.contiguous_format)) == (last or y.dim() == 3)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer_order", ["new", "old"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_layers_map_has_its_inputs_layout(order: int, layout: str, layer_order: str, recompute: bool) -> None:
    layer = getattr(fastenc, f"ConvModern{order}d")(3, 4, layer_order=layer_order)
    layer.recompute = recompute
    x = given(layout, order, 3)
    with taken("fused"):
        assert_laid_out(layer(x), layout, layer.mconv(x))
        with torch.no_grad():
            assert_laid_out(layer(x), layout, layer.mconv(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_networks_map_has_its_inputs_layout(order: int, layout: str) -> None:
    net, plain = twins(4, [1, 1], 3, 3, None, order=order, dtype=torch.float32)
    x = given(layout, order, 3)
    with taken("fused"):
        assert_laid_out(net(x), layout, plain(x))


@pytest.mark.usefixtures("every_weight_is_big_enough")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1, 8), (4, 4, 4), (8, 6, 10)])
def test_the_eager_route_makes_nothing_channels_last(
    size: tuple[int, ...], layout: str, convolutions: Convolutions
) -> None:
    """Torch has bugs on channels-last tensors on a CPU; plain PyTorch does not meet them, nor does this route.

    All that a convolution and a norm are given and give, forward and backward, follows the user's input.
    """
    last = layout in ("channels moved", "cropped")
    x = given(layout, 3, 3)
    corner = tuple(slice(0, length) for length in size)
    x = x[(slice(None), slice(None), *corner)]
    norms: list[Tensor] = []
    instance_norm = nn.functional.instance_norm

    def norm(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        y = instance_norm(x, *rest, **options)
        norms.append(x)
        if y.requires_grad:
            y.register_hook(norms.append)
        return y

    net, _ = twins(4, [2, 1], 3, 3, None, dtype=torch.float32)
    units = nn.Sequential(fastenc.ConvModern3d(3, 4, layer_order="old"), net.netbody[1].conv_list[0])
    with taken("auto"), mock.patch.object(nn.functional, "instance_norm", norm):
        y = (net if min(size) > 1 else units)(x.requires_grad_())
        y.sum().backward()
    seen = [tensor for call in (*convolutions.forward, *convolutions.backward) for tensor in call.values()]
    for tensor in [y, *norms, *(tensor for tensor in seen if tensor is not None)]:
        assert last or not convolution.is_channels_last(tensor)


def test_a_single_sample_is_convolved_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *args: seen.append(args[:2]) or plain(*args))
    with taken("fused"), torch.no_grad():
        y = fastenc.ConvModern3d(4, 6)(torch.randn(1, 4, 5, 6, 7).contiguous(memory_format=LAST))
    ((x, weight),) = seen
    assert all(map(convolution.is_channels_last, (x, weight, y)))
