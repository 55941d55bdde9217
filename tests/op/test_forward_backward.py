"""instance_norm_prelu on the Triton route, interpreted, against the formula in float64, by the rule of accuracy.py."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support.accuracy import check, double, formula, gradients, hold, magnitudes
from support.plans import PLANS, planned
from torch import Tensor

import fastenc
from fastenc.bench.proofs.interpret import Traffic, interpreted
from fastenc.kernels.layout import MEMORY_FORMAT

SPATIAL = {2: (2, 1, 1), 3: (3, 1, 1), 7: (7, 1, 1), 120: (4, 5, 6), 1000: (10, 10, 10), 4097: (17, 241, 1)}
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN, so that an element that is never written, or is read too early, shows."""

    def poison(empty: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", partial(poison, torch.empty))
    monkeypatch.setattr(torch, "empty_like", partial(poison, torch.empty_like))


@pytest.fixture(autouse=True)
def _triton_route() -> Iterator[None]:
    with interpreted(), fastenc.backend("triton"):
        yield


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=MEMORY_FORMAT[x.dim()]) if layout == "channels_last" else x.contiguous()


def arguments(N: int, C: int, S: int, layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shape = (N, C, *SPATIAL.get(S, (S, 1, 1)))
    x, dy = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
    return x, torch.randn(C), torch.randn(C), torch.rand(C), dy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("S", "C"), list(itertools.product(SPATIAL, (1, 3, 8, 24, 64))))
def test_float32(S: int, C: int, layout: str) -> None:
    N = 1 if (S + C) % 2 else 3
    check(*arguments(N, C, S, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("N", "C", "S"), [(3, 1, 7), (1, 3, 1000), (3, 8, 120), (1, 24, 1000), (3, 64, 2), (2, 24, 4097), (2, 40, 3)]
)
def test_low_precision(N: int, C: int, S: int, layout: str, dtype: torch.dtype) -> None:
    check(*arguments(N, C, S, layout, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 2])
def test_parameters_in_low_precision(N: int, layout: str, dtype: torch.dtype) -> None:
    x, weight, bias, slope, dy = arguments(N, 24, 120, layout, dtype)
    check(x, weight.to(dtype), bias.to(dtype), slope.to(dtype), dy)


def test_a_shared_slope_in_float32_with_parameters_in_low_precision() -> None:
    """Its gradient is as near as float32 is, which torch's is not."""
    x, weight, bias, slope, dy = arguments(2, 24, 120, "channels_last", torch.bfloat16)
    given = x, weight.bfloat16(), bias.bfloat16(), slope[:1], 1e-5
    found = gradients(fastenc.instance_norm_prelu, dy, *given)["dslope"]
    truth = gradients(formula, dy.double(), *map(double, given))["dslope"]
    hold({"dslope": found}, {"dslope": truth.float()}, {"dslope": truth}, magnitudes(dy, *given))


@pytest.mark.parametrize("N", [17, 20, 33])
def test_gradients_of_a_big_batch(N: int) -> None:
    """More samples than the sum over n takes at a time."""
    check(*arguments(N, 3, 7, "channels_last"))


@pytest.mark.parametrize("low", list(itertools.product([True, False], repeat=3)))
def test_each_parameters_gradient_is_as_exact_as_its_dtype(low: tuple[bool, ...]) -> None:
    """Parameters in float32 together with others in low precision: only the gradients of the latter are rounded."""
    x, *parameters, dy = arguments(2, 8, 120, "channels_last", torch.bfloat16)
    parameters = [
        each.bfloat16().to(torch.bfloat16 if is_low else torch.float32)
        for each, is_low in zip(parameters, low, strict=True)
    ]
    given = x, *parameters, 1e-5
    found = gradients(fastenc.instance_norm_prelu, dy, *given)
    truth = gradients(formula, dy.double(), *map(double, given))
    for name, parameter in zip(("dweight", "dbias", "dslope"), parameters, strict=True):
        assert found[name].dtype == parameter.dtype
        exact = {name: truth[name].to(parameter.dtype)}
        hold({name: found[name]}, exact, {name: truth[name]}, magnitudes(dy, *given))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_split_in_many_chunks(layout: str) -> None:
    shape = (2, 3, 33, 33, 37)
    x, dy = (laid_out(torch.randn(shape), layout) for _ in range(2))
    check(x, torch.randn(3), torch.randn(3), torch.rand(3), dy)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_other_plans(name: str, residual: bool) -> None:
    """Branches that only tensors too large to interpret would take."""
    spatial, layout = PLANS[name].shape
    x, dy, r = (laid_out(torch.randn(spatial), layout) for _ in range(3))
    with planned(name) as plan:
        forward, backward = plan(x, False, residual), plan(x, True, residual)
        assert PLANS[name].reached(forward), forward
        assert residual or PLANS[name].reached(backward), backward
        check(x, torch.randn(8), torch.randn(8), torch.rand(8), dy, residual=r if residual else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
@pytest.mark.parametrize("slope", [torch.tensor([0.3]), torch.tensor([-0.7]), 0.01, 0.0, 1.0, -2.0, 3], ids=str)
def test_slope_shared_or_a_number(slope: Tensor | float, S: int, layout: str) -> None:
    x, weight, bias, _, dy = arguments(2, 8, S, layout)
    check(x, weight, bias, slope, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(has_weight: bool, has_bias: bool, S: int, layout: str) -> None:
    x, weight, bias, slope, dy = arguments(2, 3, S, layout)
    check(x, weight if has_weight else None, bias if has_bias else None, slope, dy)
    check(x, weight if has_weight else None, bias if has_bias else None, slope[:1], dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
def test_slopes_negative_zero_and_above_one(S: int, layout: str) -> None:
    x, weight, bias, _, dy = arguments(2, 3, S, layout)
    check(x, weight, bias, torch.tensor([-1.5, 0.0, 2.5]), dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [7, 120, 1000, 4097])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean: float, S: int, layout: str) -> None:
    x, weight, bias, slope, dy = arguments(2, 8, S, layout)
    check(x + mean, weight, bias, slope, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_over_many_chunks(layout: str) -> None:
    x = laid_out(torch.randn(1, 2, 41, 40, 41) + 1e4, layout)
    check(x, torch.randn(2), torch.randn(2), torch.rand(2), laid_out(torch.randn(x.shape), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
def test_tiny_variance_and_constant_channel(S: int, layout: str) -> None:
    x, weight, bias, slope, dy = arguments(2, 3, S, layout)
    x[:, 0] = 1000.1
    x[:, 1] *= 1e-4
    check(x, weight, bias, slope, dy)


@pytest.mark.parametrize("S", [120, 1000])
def test_behind_a_channel_without_variance(S: int) -> None:
    """1/√eps multiplies the rounding of dz's mean: where all dz are alike, that mean is the nearest float32."""
    x, weight, bias, slope, _ = arguments(2, 24, S, "channels_last")
    dy = torch.rand(1, 24, 1, 1, 1).expand_as(x)
    dx = gradients(fastenc.instance_norm_prelu, dy, torch.ones_like(x), weight, bias, slope, 1e-5)["dx"]
    largest = dy.double() * weight.double().abs().view(1, -1, 1, 1, 1) / 1e-5**0.5
    assert (dx.double().abs() <= 0.5 * torch.finfo(torch.float32).eps * largest).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("S", "C"), [(7, 3), (120, 8), (4097, 3)])
@pytest.mark.parametrize("value", [0.0, 2.0, 0.1, -1000.1, 1e-25, 1e-42, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_variance_and_no_eps(dtype: torch.dtype, value: float, S: int, C: int, layout: str) -> None:
    """A constant channel is normalised to 0, and its gradient is 0, as in torch; the others are held to the rule."""
    x, weight, bias, slope, dy = arguments(2, C, S, layout, dtype)
    x[0, 0], x[1, -1] = value, value
    given = x, weight, bias, slope, 0.0
    ours = gradients(fastenc.instance_norm_prelu, dy, *given)
    with fastenc.backend("eager"):
        torchs = gradients(fastenc.instance_norm_prelu, dy, *given)
        by_formula = dict(
            zip(("dx", "dweight", "dbias", "dslope"), fastenc.reference.backward(dy, *given), strict=True)
        )
    assert not ours["dx"][0, 0].any()
    assert not by_formula["dx"][1, -1].any()
    terms = magnitudes(dy, x, weight, bias, slope, 1.0)  # what a sum rounds by, where it cancels; any eps but 0
    for name, theirs in torchs.items():
        assert theirs.isfinite().all()
        for mine in (ours[name], by_formula.get(name, theirs)):
            limit = 4 * torch.finfo(dtype).eps * (S**0.25 * theirs.norm() + terms[name])
            assert (mine - theirs).norm() <= limit, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [41, 3333])
def test_no_variance_where_a_rows_length_has_no_exact_reciprocal(S: int, layout: str) -> None:
    """41 · fl(1/41) is not 1: the mean of a constant row is rounded, and that rounding must not become a variance."""
    x, weight, bias, slope, dy = arguments(1, 32, S, layout)
    x[:] = (torch.logspace(-3, 4, 32) * torch.rand(32)).view(1, 32, 1, 1, 1)
    dx = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 0.0)["dx"]
    assert not dx.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-42])
def test_a_variance_that_underflows(magnitude: float, S: int, layout: str) -> None:
    """In float32 it is 0, so that y is PReLU(bias), as on a GPU; torch sums in float64 on a CPU."""
    x, weight, bias, slope, dy = arguments(2, 3, S, layout)
    found = gradients(fastenc.instance_norm_prelu, dy, magnitude * x, weight, bias, slope, 0.0)
    flat = gradients(fastenc.instance_norm_prelu, dy, torch.zeros_like(x), weight, bias, slope, 0.0)
    assert all(torch.equal(found[name], flat[name]) for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
def test_a_variance_that_overflows(S: int, layout: str) -> None:
    """It is infinite, so that y is PReLU(bias), as on a GPU."""
    x, weight, bias, slope, _ = arguments(2, 3, S, layout)
    y = fastenc.instance_norm_prelu(1e30 * x, weight, bias, slope)
    z = bias.view(1, 3, 1, 1, 1)
    assert torch.equal(y, torch.where(z > 0, z, slope.view(z.shape) * z).expand(x.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("S", [120, 4097])
def test_not_finite(S: int, value: float, layout: str) -> None:
    """A NaN or an infinity spoils its own row, as in torch, and no other."""
    x, weight, bias, slope, dy = arguments(2, 3, S, layout)
    x[1, 2].view(-1)[S // 2] = value if layout == "contiguous" else 0.0
    x[1, 2, SPATIAL[S][0] - 1, 0, 0] = value
    ours = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
    with fastenc.backend("eager"):
        torchs = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
    for name in ours:
        assert torch.equal(ours[name].isnan(), torchs[name].isnan()), name


def test_at_exactly_zero_the_slope_branch() -> None:
    """z = 0 where weight and bias are 0: the gradient is the slope's, as in torch."""
    x, dy = torch.randn(1, 2, 3, 3, 3), torch.ones(1, 2, 3, 3, 3)
    zero, slope = torch.zeros(2), torch.tensor([0.5, -3.0])
    assert torch.equal(gradients(fastenc.instance_norm_prelu, dy, x, zero, zero, slope, 1e-5)["dbias"], 27 * slope)


def through_cat(y: Tensor) -> Tensor:
    return torch.cat([y, 2 * y], dim=1)


def through_narrow(y: Tensor) -> Tensor:
    return y.narrow(2, 1, 2)


def through_expand(y: Tensor) -> Tensor:
    return y.sum((2, 3, 4), keepdim=True).expand(-1, -1, 2, -1, -1)


def through_permute(y: Tensor) -> Tensor:
    return y.permute(3, 1, 4, 0, 2).contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("through", [through_cat, through_narrow, through_expand, through_permute, Tensor.clone])
@pytest.mark.parametrize("spatial", [(4, 5, 6), (17, 16, 16)], ids=["one pass", "split"])
def test_gradients_of_any_strides(spatial: tuple[int, ...], through: Callable[[Tensor], Tensor], layout: str) -> None:
    x = laid_out(torch.randn(2, 3, *spatial), layout)
    parameters = torch.randn(3), torch.randn(3), torch.rand(3)
    check(x, *parameters, torch.randn(through(x).shape), through=through)


@pytest.mark.parametrize("shape", [(2, 3, 11), (2, 3, 5, 7), (2, 3, 2, 3, 4), (2, 3, 2, 2, 2, 3)])
@pytest.mark.parametrize("arrange", ["contiguous", "transposed", "sliced", "expanded", "offset"])
def test_inputs_of_any_strides(shape: tuple[int, ...], arrange: str) -> None:
    x = torch.randn(shape)
    if arrange == "transposed":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif arrange == "sliced":
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif arrange == "expanded":
        x = x[:1].expand(shape)
    elif arrange == "offset":
        x = torch.randn(x.numel() + 1)[1:].view(shape)
    parameters = torch.randn(3), torch.randn(3), torch.rand(3)
    dy = torch.randn(shape)
    before = x.clone()
    check(x, *parameters, dy)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("S", [120, 4097])
def test_keeps_the_layout(S: int, layout: str) -> None:
    x, weight, bias, slope, dy = arguments(2, 3, S, layout)
    found = check(x, weight, bias, slope, dy)
    assert found["y"].stride() == found["dx"].stride() == x.stride()


def test_only_the_gradients_asked_for() -> None:
    x, weight, bias, slope, dy = arguments(2, 8, 4097, "channels_last")
    full = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
    moved = {}
    for wanted in ("x", "weight", "slope"):
        leaves = {"x": x, "weight": weight, "bias": bias, "slope": slope}
        leaves[wanted] = leaves[wanted].detach().requires_grad_()
        y = fastenc.instance_norm_prelu(**leaves)
        with Traffic() as traffic:
            (grad,) = torch.autograd.grad(y, [leaves[wanted]], dy)
        moved[wanted] = traffic.sectors
        assert torch.equal(grad, full[f"d{wanted}"])
    assert moved["weight"] < 0.5 * moved["x"], "without dx, neither is dx written nor are x and dy read again"


def test_without_gradients_as_with() -> None:
    x, weight, bias, slope, _ = arguments(2, 8, 120, "contiguous")
    with torch.no_grad():
        y = fastenc.instance_norm_prelu(x, weight, bias, slope)
    assert not y.requires_grad
    assert torch.equal(y, fastenc.instance_norm_prelu(x, weight.requires_grad_(), bias, slope))


@pytest.mark.parametrize("slope", [torch.tensor([0.25, 0.1, -0.5]), 0.01], ids=["prelu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype, slope: Tensor | float) -> None:
    x, weight, bias, _, dy = arguments(2, 3, 120, "contiguous", dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
        with fastenc.backend("eager"):
            torchs = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in torchs.items()}
    terms = magnitudes(dy, x, weight, bias, slope, 1e-5)  # what a sum rounds by, where it cancels
    for name in ours:
        limit = 2**-7 * max(torchs[name].float().norm(), terms[name])
        assert (ours[name].float() - torchs[name].float()).norm() <= limit, name


def test_double_backward() -> None:
    """A gradient penalty: derivatives of the gradients, in float32, against float64 through the formula."""
    x, weight, bias, slope, _ = arguments(2, 3, 120, "channels_last")
    v = torch.randn_like(x)

    def penalty(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves, 1e-5)
        (dx,) = torch.autograd.grad((y * v.to(y.dtype)).square().sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), leaves))

    ours = penalty(fastenc.instance_norm_prelu, x, weight, bias, slope)
    truth = penalty(formula, *map(double, (x, weight, bias, slope)))
    for mine, value in zip(ours, truth, strict=True):
        assert (mine.double() - value).norm() <= 1e-5 * value.norm()
