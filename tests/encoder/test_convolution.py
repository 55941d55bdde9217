"""Live taps: the same convolution on fewer taps, whatever the geometry, layout and dtype, forward and backward.

The elements from which a product pays are set to 0 here.
"""

import copy
import re
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import taken
from support.plain import assert_all_near, assert_same, small_input, small_twins
from torch import Tensor, nn

import fastenc
from fastenc import convolution, live_taps
from fastenc.convolution import Convolution, ConvPlan, Cuts, convolve, plan_convolution, plan_for
from fastenc.kernels.layout import MEMORY_FORMAT
from fastenc.live_taps import window_of

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYER: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

pytestmark = pytest.mark.usefixtures("every_weight_is_big_enough")


def alive(size: int, kernel: int, stride: int, padding: int) -> list[int]:
    """The taps that read input, found by visiting every position."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    return sorted({k for k in range(kernel) for o in range(outputs) if 0 <= o * stride - padding + k < size})


@pytest.mark.parametrize(
    ("size", "stride", "taps", "positions"),
    [((1, 1, 1), 1, 1, 1), ((1, 1, 1), 2, 1, 1), ((2, 2, 2), 2, 8, 1), ((2, 2, 2), 1, 27, 8), ((1, 2, 4), 2, 6, 2),
     ((4, 4, 4), 2, 27, 8), ((1, 8, 8), 1, 9, 64)],
)  # fmt: skip
def test_taps_of_a_3_kernel(size: tuple[int, ...], stride: int, taps: int, positions: int) -> None:
    window = window_of(size, (3, 3, 3), (stride,) * 3, (1, 1, 1))
    assert window is not None
    assert (window.taps, prod(window.output)) == (taps, positions)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.integers(0, 5))
def test_window_is_the_hull_of_the_live_taps(size: int, kernel: int, stride: int, padding: int) -> None:
    window = window_of((size,), (kernel,), (stride,), (padding,))
    if size + 2 * padding < kernel or not alive(size, kernel, stride, padding):
        assert window is None
        return
    taps = alive(size, kernel, stride, padding)
    assert window is not None
    assert (window.low[0], window.high[0]) == (taps[0], taps[-1] + 1)


def layouts(x: Tensor, channels_last: bool) -> Tensor:
    memory_format = MEMORY_FORMAT.get(x.dim()) if channels_last else None
    return x if memory_format is None else x.contiguous(memory_format=memory_format)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    order = draw(st.integers(1, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(order))

    found = {"size": axes(1, 4), "kernel": axes(1, 5), "stride": axes(1, 3), "padding": axes(0, 3)}
    sizes = zip(found["size"], found["kernel"], found["padding"], strict=True)
    padding = tuple(max(p, (k - s + 1) // 2) for s, k, p in sizes)  # an output on every axis
    flags = ("bias", "x_last", "weight_last", "fused", "cuda", "forward", "backward")
    return {**found, "padding": padding, "planes": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            "N": draw(st.integers(1, 3)), **{flag: draw(st.booleans()) for flag in flags}}  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries())
def test_any_geometry_against_torch(case: dict[str, Any]) -> None:
    """y, dx, dweight and dbias, their layouts, and exact zeros for dead taps."""
    order, (c_in, c_out) = len(case["size"]), case["planes"]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = layouts(random(case["N"], c_in, *case["size"]), case["x_last"]).requires_grad_()
    weight = layouts(random(c_out, c_in, *case["kernel"]), case["weight_last"]).requires_grad_()
    bias = random(c_out).requires_grad_() if case["bias"] else None
    live_taps.CPU_FORWARD = 0 if case["forward"] else 1 << 40
    live_taps.CPU_BACKWARD = 0 if case["backward"] else 1 << 40
    plan_convolution.cache_clear()
    plan = plan_convolution(
        x.shape, weight.shape, case["stride"], case["padding"], (1,) * order, 1, weight.is_contiguous(),
        "cuda" if case["cuda"] else "cpu", case["fused"],
    )  # fmt: skip
    if plan is None:
        return
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    expected = CONV[order](x, weight, bias, case["stride"], case["padding"])
    y = Convolution.apply(x, weight, bias, plan, None)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    follows = (x.is_contiguous() or case["N"] == 1) and not case["fused"]  # one sample: see test_eager_layout.py
    layout = torch.contiguous_format if follows else MEMORY_FORMAT.get(x.dim(), torch.contiguous_format)
    assert y.is_contiguous(memory_format=layout)
    dy = random(*y.shape)
    found = torch.autograd.grad(y, leaves, dy)
    for gradient, truth, leaf in zip(found, torch.autograd.grad(expected, leaves, dy), leaves, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)
        if leaf is not x:
            assert gradient.stride() == leaf.stride()
    dead = torch.ones(case["kernel"], dtype=torch.bool)
    axes = zip(case["size"], case["kernel"], case["stride"], case["padding"], strict=True)
    dead[torch.meshgrid(*(torch.tensor(alive(*axis), dtype=torch.long) for axis in axes), indexing="ij")] = False
    assert (found[1][:, :, dead] == 0).all()


@pytest.mark.parametrize(
    ("size", "stride", "device", "fused", "taps", "product"),
    [
        ((1, 1, 1), 1, "cpu", False, 1, True),
        ((2, 2, 2), 2, "cpu", False, 27, True),  # the contiguous weight is read whole: that is cheaper than cutting it
        ((2, 2, 2), 1, "cpu", False, 27, True),
        ((1, 4, 4), 1, "cpu", False, 9, False),
        ((4, 4, 4), 1, "cpu", False, None, False),
        ((1, 1, 1), 1, "cuda", True, 1, True),
        ((2, 2, 2), 2, "cuda", True, 8, True),
        ((2, 2, 2), 1, "cuda", True, 0, False),
        ((1, 4, 4), 1, "cuda", True, 9, False),
        ((4, 4, 4), 1, "cuda", True, 0, False),
        ((1, 1, 1), 1, "mps", False, None, False),
    ],
)
def test_which_way(
    size: tuple[int, ...], stride: int, device: str, fused: bool, taps: int | None, product: bool
) -> None:
    """taps None: torch's own call; 0: the ordinary convolution through the library's own Function."""
    plan = plan_convolution((2, 3, *size), (4, 3, 3, 3, 3), (stride,) * 3, (1, 1, 1), (1, 1, 1), 1, True, device, fused)
    if taps is None:
        assert plan is None
        return
    assert plan is not None
    assert (plan.window.taps if plan.window else 0, plan.product_forward) == (taps, product)


WAYS = {"1³": ((1, 1, 1), 1), "2³ strided": ((2, 2, 2), 2), "2³": ((2, 2, 2), 1), "1×3×4": ((1, 3, 4), 1)}


def prepared(name: str, dtype: torch.dtype = torch.float64, N: int = 2) -> tuple[nn.Module, Tensor]:
    size, stride = WAYS[name]
    torch.manual_seed(2)
    layer = nn.Conv3d(3, 4, 3, stride, 1).to(dtype)
    x = torch.randn(N, 3, *size, dtype=dtype)
    assert plan_for(layer, x, False) is not None
    return layer, x


@pytest.mark.parametrize("name", WAYS)
def test_derivatives_of_the_derivatives(name: str) -> None:
    layer, x = prepared(name)
    inputs = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    plan = plan_for(layer, x, False)[2]  # type: ignore[index]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return Convolution.apply(x, weight, bias, plan, None)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("name", WAYS)
def test_only_x_and_the_weight_are_kept(name: str) -> None:
    layer, x = prepared(name)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        convolve(layer, x.requires_grad_(), False)
    assert set(kept) == {x.data_ptr(), layer.weight.data_ptr()}


@pytest.mark.parametrize("name", WAYS)
def test_the_output_is_no_view(name: str) -> None:
    """torch forbids some changes of a view in place, which a convolution's output allows."""
    layer, x = prepared(name)
    with torch.no_grad():
        y = convolve(layer, x, False)
    y.mul_(torch.ones((), dtype=y.dtype, requires_grad=True))
    expected = layer(x).relu_()
    assert_all_near([convolve(layer, x, False).relu_(), y.detach().relu_()], [expected, expected])


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_has_torchs_dtypes_and_numbers(name: str, enabled: bool) -> None:
    """The backward inside or outside the autocast block; 2 ULP of bfloat16 in the largest of the sums."""
    layer, x = prepared(name, torch.float32)
    results = []
    for call in (lambda x: convolve(layer, x, True), layer):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(leaf)
            if enabled:
                y.float().square().sum().backward()
        if not enabled:
            y.float().square().sum().backward()
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
    for found, truth in zip(*results, strict=True):
        assert found.dtype == truth.dtype
        torch.testing.assert_close(found, truth, rtol=0, atol=2 * 2**-7 * truth.abs().max().item())


@pytest.mark.parametrize("name", WAYS)
def test_a_backward_under_autocast_of_a_forward_without(name: str) -> None:
    """Matrix products are on autocast's list; a convolution's backward is not, and stays in float32."""
    layer, x = prepared(name, torch.float32)
    x.requires_grad_()
    results = []
    for y in (convolve(layer, x, False), layer(x)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.ones_like(y)))
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_torchs_own_call() -> None:
    layer = nn.Conv3d(3, 4, 3, padding=1)
    for x in (torch.randn(2, 5, 2, 2, 2), torch.randn(4, 2, 2, 2), torch.randn(2, 3, 2, 2, 2).double(), torch.randn(3)):
        assert plan_for(layer, x, True) is None
        with pytest.raises(RuntimeError):
            convolve(layer, x, True)
    unbatched = torch.randn(3, 2, 2, 2)
    assert torch.equal(convolve(layer, unbatched, True), layer(unbatched))
    assert convolve(layer, torch.randn(0, 3, 2, 2, 2), True).shape == (0, 4, 2, 2, 2)
    for other in (
        nn.Conv3d(3, 4, 3, padding="same"),
        nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate"),
        nn.ConvTranspose3d(3, 4, 3),
        nn.Conv3d(3, 3, 3, padding=1, groups=3),
        nn.Conv3d(3, 4, 2, padding=2, dilation=2),
    ):
        x = torch.randn(2, 3, 2, 2, 2)
        torch.testing.assert_close(convolve(other, x, False), other(x), rtol=0, atol=0)
        torch.testing.assert_close(convolve(other, x, True), other(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["1³", "2³ strided", "2³"])
def test_frozen_cuts_are_made_once_and_refreshed(name: str) -> None:
    layer, x = prepared(name)
    layer.__dict__["cuts"] = Cuts()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(convolve(layer, x, False), layer(x), rtol=1e-11, atol=1e-12)
        (matrix,) = layer.__dict__["cuts"].values()
        layer.weight.mul_(2)
        layer.__dict__["cuts"].refresh(layer.weight)
        assert next(iter(layer.__dict__["cuts"].values())) is matrix
        torch.testing.assert_close(convolve(layer, x, False), layer(x), rtol=1e-11, atol=1e-12)


def test_frozen_cuts_in_two_dtypes() -> None:
    layer, x = prepared("1³")
    layer, x = layer.float(), x.float()
    layer.__dict__["cuts"] = Cuts()
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolve(layer, x, False).dtype == torch.bfloat16
        torch.testing.assert_close(convolve(layer, x, False), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_complex_convolution(size: int) -> None:
    """torch conjugates in its backward, and it has other kernels."""
    layer, x = (
        nn.Conv3d(3, 4, 5, padding=2, dtype=torch.complex64),
        torch.randn(2, 3, *3 * (size,), dtype=torch.complex64),
    )
    results = []
    for run in (lambda x: convolve(layer, x, False), layer):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y.abs().square().sum(), [leaf, *layer.parameters()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["auto", "fused"])
@pytest.mark.parametrize("size", [(4, 4, 4), (3, 2, 9), (2, 8, 8)])
def test_a_network_whose_deep_maps_are_small(
    size: tuple[int, ...], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients equal the plain network's, and the deep convolutions did run as products."""
    plans: list[ConvPlan] = []
    forward = convolution.forward
    monkeypatch.setattr(convolution, "forward", lambda *a, **k: (plans.append(a[3]), forward(*a, **k))[1])
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 2])
        assert_same(net, plain, small_input(size, dtype=dtype))
    assert any(plan.product_forward for plan in plans)


OPTIONS: dict[str, list[Any]] = {
    "stride": [1, 2, [2, 1, 2], [2], (2,), torch.Size((1, 2, 1))],
    "padding": [0, 2, [1, 0, 1], (1,), torch.Size((2, 1, 0)), "same", "valid"],
    "dilation": [1, 2, [1, 2, 1], [2], (2,)],
}
BAD_OPTIONS: dict[str, list[Any]] = {
    "stride": [(1, 1), [1, 1, 1, 1], (), 0, (0, 1, 1), -1, "2", None, [1, None, 1]],
    "padding": [(1, 1), [1, 1, 1, 1], -1, (-1, 0, 0), None, "full", ["1", 1, 1]],
    "dilation": [(1, 1), 0, (1, 0, 1), -2, "1", None],
}


def with_option(name: str, value: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    layer = nn.Conv3d(2, 3, 3, padding=1).to(dtype)
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("size", [(2, 2, 2), (5, 6, 7)])
@pytest.mark.parametrize("route", ["auto", "fused"])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n in OPTIONS for v in OPTIONS[n]], ids=str)
def test_options_set_on_a_built_layer(name: str, value: Any, route: str, size: tuple[int, ...]) -> None:
    """An int, a list, a torch.Size, or one entry for all axes: torch's numbers and gradients; frozen too."""
    with taken(route) as dtype:
        layer = with_option(name, value, dtype)
        x = torch.randn(2, 2, *size, dtype=dtype)
        try:
            layer(x)
        except RuntimeError as error:  # no output of this size
            with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
                convolve(layer, x, route == "fused")
            return
        results = []
        for call in (lambda x: convolve(layer, x, route == "fused"), layer):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
        assert_all_near(*results)
        with torch.no_grad():
            assert_all_near([fastenc.freeze(layer)(x)], [layer(x)])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n in BAD_OPTIONS for v in BAD_OPTIONS[n]], ids=str)
def test_options_that_torch_refuses(name: str, value: Any, fused: bool) -> None:
    """Its own error, word for word."""
    layer, x = with_option(name, value, torch.float32), torch.randn(2, 2, 4, 4, 4)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        layer(x)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        convolve(layer, x, fused)


@pytest.mark.parametrize("route", ["auto", "fused"])
def test_options_inside_a_network(route: str) -> None:
    """The stem, a layer's convolution and the last convolution. explain and a frozen copy run them too."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        for network in (net, plain):
            network.netbody[0].stride = 1
            network.netbody[0].padding = [2, 1, 2]
            network.netbody[1].conv_scale.mconv[2].stride = 2
            network.netbody[2].conv_scale.mconv[2].stride = [1, 2, 1]
            network.netbody[3].dilation = 1
        x = small_input(dtype=dtype)
        assert_same(net, plain, x)
        with torch.no_grad():
            assert torch.equal(fastenc.freeze(net)(x), net(x))
        rows = list(fastenc.explain(net, x))
    assert [row.route for row in rows] == ["triton" if route == "fused" else "eager"] * 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dilation", [2, (1, 2, 1), (3, 3, 3)])
@pytest.mark.parametrize("size", [(2, 2, 2), (1, 2, 2), (3, 3, 3)])
def test_a_dilated_convolution_trained_on_a_small_map(size: tuple[int, ...], dilation: Any, fused: bool) -> None:
    """Its taps meet other positions than those of a dense kernel; weights big enough for a product."""
    layer = nn.Conv3d(3, 4, 3, padding=dilation, dilation=dilation).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results = []
    for call in (lambda x: convolve(layer, x, fused), layer):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert_all_near(*results)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 4), (6, 5, 7)])
def test_no_bfloat16_weight_gradient_of_torchs_own_on_a_cpu(size: tuple[int, ...], fused: bool) -> None:
    """Where a CPU multiplies bfloat16, torch 2.13 leaves parts of it unwritten. Against float64."""
    layer, x = nn.Conv3d(8, 16, 3, padding=1), torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last_3d)
    convolution.plan_convolution.cache_clear()
    given: list[torch.dtype] = []
    backward = torch.ops.aten.convolution_backward

    def seen(*arguments: Any) -> Any:
        given.extend(argument.dtype for argument in arguments[:3])
        return backward(*arguments)

    for autocast in (True, False):
        leaf, own = (x, layer) if autocast else (x.bfloat16(), copy.deepcopy(layer).bfloat16())
        leaf = leaf.clone().requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            mock.patch.object(torch.ops.aten, "convolution_backward", seen),
            mock.patch.multiple(live_taps, CPU_FORWARD=1 << 40, CPU_BACKWARD=1 << 40),
        ):
            y = convolve(own, leaf, fused)
            dy = torch.randn_like(y)
            found = torch.autograd.grad(y, [leaf, *own.parameters()], dy)
        exact = copy.deepcopy(own).double()
        exact_x = leaf.detach().double().requires_grad_()
        expected = torch.autograd.grad(exact(exact_x), [exact_x, *exact.parameters()], dy.double())
        for gradient, truth, like in zip(found, expected, (leaf, *own.parameters()), strict=True):
            assert gradient.dtype == like.dtype
            # operands and result are rounded to 8 bits: 3 roundings of each term, and sums of terms of either sign
            assert ((gradient.double() - truth).norm() / truth.norm()).item() < 3 * 2**-8
    assert set(given) == {torch.float32}
    convolution.plan_convolution.cache_clear()


def test_a_tensor_subclass_is_left_to_torch() -> None:
    class Marked(Tensor):
        pass

    layer, x = prepared("1³")
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked))
    assert plan_for(layer, x, False) is None


def test_a_replica_has_its_weights_as_attributes() -> None:
    """What nn.DataParallel makes for each GPU: modules whose parameters are plain tensors, in no dict of parameters."""
    layer, x = prepared("2³")
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = 1 * layer.weight, 1 * layer.bias
    torch.testing.assert_close(convolve(replica, x, False), layer(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("variable", "taps"), [(None, 0), (":4096:8", 8), (":16:8", 8), (":0:0", 0)])
def test_no_product_where_cublas_would_refuse(variable: str | None, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In deterministic mode without its workspace variable torch raises at a product, where a convolution runs."""
    layer = nn.Conv3d(3, 4, 3, 2, 1)
    x = mock.Mock(wraps=torch.randn(2, 3, 2, 2, 2), device=torch.device("cuda"), shape=torch.Size((2, 3, 2, 2, 2)))
    if variable is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", variable)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    plan = plan_convolution(
        x.shape, layer.weight.shape, (2,) * 3, (1,) * 3, (1,) * 3, 1, True, convolution._device(x), True
    )
    assert plan is not None
    assert (plan.window.taps if plan.window else 0) == taps
