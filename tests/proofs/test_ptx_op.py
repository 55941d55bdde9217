"""Every kernel and branch of the plan, executed as compiled for sm_90, some for sm_80 and sm_100, against float64.

The rule is that of accuracy.py: no farther from the formula in float64 than twice torch's own operations, plus a few
units in the last place. The machine adds its own checks: bounds, races, alignment, asynchronous copies. What
torch.empty returns is poison, so that an element that nothing writes shows.
"""

import re
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from executed import DTYPES, LAYOUTS, SMS, branch, executed, laid_out, shapes
from support.accuracy import ULPS, check, double, formula, gradients, hold, magnitudes, unavoidable
from support.cases import Tensors, undetermined
from support.plans import PLANS, planned
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastenc
from fastenc.bench.proofs.interpret import interpreted, kernel_modules
from fastenc.bench.proofs.ptx import Fault, unwritten
from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward
from fastenc.kernels.plan import make_plan

Shape = tuple[int, int, tuple[int, ...]]
LAUNCHED = ("one_pass", "slab", "statistics", "sums", "combine", "apply", "sum_n")  # in the names of kernels
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def grid(residual: bool = False) -> list[Any]:
    """A test's parameters: every dtype and layout, with the shapes that reach its branches."""
    return [
        pytest.param(dtype, layout, shape, id=f"{str(dtype)[6:]}-{layout}-{shape[0]}x{shape[1]}x{prod(shape[2])}")
        for dtype in DTYPES
        for layout in LAYOUTS
        for shape in shapes(dtype.itemsize, layout == "channels_last", residual)
    ]


def arguments(shape: Shape, layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias, slope, dy."""
    N, C, spatial = shape
    x, dy = (laid_out(torch.randn(N, C, *spatial).to(dtype), layout == "channels_last") for _ in range(2))
    return x, torch.randn(C), torch.randn(C), torch.rand(C), dy


def near(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    dy: Tensor,
    residual: Tensor | None = None,
) -> None:
    """Hold the operation and its gradients to the rule of accuracy.py.

    dy is 0 where z is so near to 0 that its sign, hence PReLU's branch, is open.
    """
    given = x, weight, bias, slope, 1e-5, residual
    dy = dy.masked_fill(undetermined(Tensors(dy, *given)), 0)
    ours = gradients(fastenc.instance_norm_prelu, dy, *given)
    with fastenc.backend("eager"):
        torchs = gradients(fastenc.instance_norm_prelu, dy, *given)
    truth = gradients(formula, dy.double(), *map(double, given))
    hold(ours, torchs, truth, magnitudes(dy, *given), unavoidable(dy, *given))


def split_and_whole(layout: str, dtype: torch.dtype = torch.float32, residual: bool = False) -> list[Shape]:
    """Of the shapes with several channels, the smallest whose rows are whole and the largest, whose rows are split."""
    found = [shape for shape in shapes(dtype.itemsize, layout == "channels_last", residual) if shape[1] > 1]
    found = [shape for shape in found if 8 <= prod(shape[2]) < 10_000]
    return [found[0], found[-1]]


@pytest.mark.parametrize(("dtype", "layout", "shape"), grid())
def test_every_branch(dtype: torch.dtype, layout: str, shape: Shape) -> None:
    with executed() as machine:
        near(*arguments(shape, layout, dtype))
    assert machine.launches


@pytest.mark.parametrize(("dtype", "layout", "shape"), grid(residual=True))
def test_every_branch_with_a_residual(dtype: torch.dtype, layout: str, shape: Shape) -> None:
    x, *rest = arguments(shape, layout, dtype)
    with executed():
        near(x, *rest, residual=torch.randn_like(x))


@pytest.mark.parametrize("name", PLANS)
def test_other_plans(name: str) -> None:
    """Branches that only tensors too large to execute would take: right, and in place bitwise the same."""
    shape, layout = PLANS[name].shape
    x, weight, bias, slope, dy = arguments((*shape[:2], shape[2:]), layout)
    with planned(name) as plan, executed():
        assert PLANS[name].reached(plan(x, False, False))
        near(x, weight, bias, slope, dy)
        y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
        again, _ = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, statistics=statistics)
        dx = instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics)[0]
        over_dy = instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics, in_place=True)[0]
        over_x, _ = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, in_place=True)
    assert all(map(torch.equal, (again, over_x, over_dy), (y, y, dx)))


@pytest.mark.parametrize(
    ("dtype", "C", "K"), [(torch.bfloat16, 200, 2), (torch.bfloat16, 600, 1), (torch.float32, 204, 2)]
)
def test_few_chunks_combined_at_a_time(dtype: torch.dtype, C: int, K: int) -> None:
    """Slices as wide as all channels, whose partial results are combined one or two chunks at a time."""
    plan = make_plan(1, C, 1200, dtype.itemsize, True, SMS, True)
    assert (plan.branch, plan.COMBINE_K, plan.chunks > K) == ("split", K, True)
    with executed():
        near(*arguments((1, C, (20, 10, 6)), "channels_last", dtype))


def test_every_kernel_is_executed() -> None:
    """Those that a launcher launches; the others are functions that they share."""
    kernels = {
        kernel.__name__
        for module in kernel_modules()
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction)
        and kernel.__name__.startswith(("forward", "backward"))
        and any(word in kernel.__name__ for word in LAUNCHED)
    }
    found: set[str] = set()
    for layout in LAYOUTS:
        for shape in shapes(4, layout == "channels_last"):
            with executed() as machine:
                x, weight, bias, slope, dy = arguments(shape, layout)
                _, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
                instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics)
            found |= {launch.name for launch in machine.launches}
    assert found == kernels


BARRIER = re.compile(r"bar\.sync\s+0;")


def test_every_barrier() -> None:
    """Without one the machine reports a race, unless the results stay bitwise the same; each kernel that stores to
    shared memory has barriers of the first kind."""
    for shape in split_and_whole("channels_last"):
        x, weight, bias, slope, dy = arguments(shape, "channels_last")
        compiled: dict[str, str] = {}

        def run(edit: Callable[[str, str], str]) -> tuple[Tensor | None, ...]:
            with executed() as machine:
                machine.edit = edit
                y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)  # noqa: B023
                return y, *instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics)  # noqa: B023

        sound = run(compiled.setdefault)
        for kernel, ptx in compiled.items():
            places, reported = list(BARRIER.finditer(ptx)), 0
            for place in places:
                without = ptx[: place.start()] + ptx[place.end() :]
                try:
                    results = run(lambda name, text: without if name == kernel else text)  # noqa: B023
                except Fault:
                    reported += 1
                else:
                    assert all(map(torch.equal, results, sound)), kernel
            assert reported or not places or "st.shared" not in ptx, kernel


@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@layouts
def test_other_architectures(dtype: torch.dtype, layout: str, architecture: int) -> None:
    for shape in split_and_whole(layout, dtype):
        with executed(architecture):
            near(*arguments(shape, layout, dtype))


@layouts
def test_as_interpreted(layout: str) -> None:
    """The two differ by the order of sums and by fused multiply-adds: units in the last place of what is summed."""
    for shape in split_and_whole(layout):
        x, weight, bias, slope, dy = arguments(shape, layout)
        given = x, weight, bias, slope, 1e-5
        with executed():
            compiled = gradients(fastenc.instance_norm_prelu, dy, *given)
        with interpreted(), fastenc.backend("triton"):
            read = gradients(fastenc.instance_norm_prelu, dy, *given)
        scale, statistics = magnitudes(dy, *given), unavoidable(dy, *given)
        for name, value in compiled.items():
            limit = ULPS * torch.finfo(torch.float32).eps * scale[name] + 2 * statistics[name]
            assert (value.double() - read[name].double()).abs().max() <= limit, name


@layouts
@pytest.mark.parametrize("slope", [torch.tensor([0.3]), torch.tensor([-0.7]), 0.01, 0.0, 1.0, -2.0], ids=str)
def test_slope_shared_or_a_number(slope: Tensor | float, layout: str) -> None:
    for shape in split_and_whole(layout, torch.bfloat16):
        x, weight, bias, _, dy = arguments(shape, layout, torch.bfloat16)
        with executed():
            near(x, weight, bias, slope, dy)


@layouts
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(has_weight: bool, has_bias: bool, layout: str) -> None:
    for shape in split_and_whole(layout):
        x, weight, bias, slope, dy = arguments(shape, layout)
        with executed():
            near(x, weight if has_weight else None, bias if has_bias else None, slope[:1], dy)


@layouts
def test_parameters_in_low_precision(layout: str) -> None:
    for shape in split_and_whole(layout, torch.float16):
        x, weight, bias, slope, dy = arguments(shape, layout, torch.float16)
        with executed():
            near(x, weight.half(), bias.half(), slope.half(), dy)


@layouts
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean: float, layout: str) -> None:
    for shape in split_and_whole(layout):
        x, *rest = arguments(shape, layout)
        with executed():
            near(x + mean, *rest)


@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, layout: str) -> None:
    """It spoils its own row, as in torch, and no other."""
    for shape in split_and_whole(layout):
        x, weight, bias, slope, dy = arguments(shape, layout)
        x[-1, -1, -1, -1, -1] = value
        with executed():
            ours = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
        with fastenc.backend("eager"):
            torchs = gradients(fastenc.instance_norm_prelu, dy, x, weight, bias, slope, 1e-5)
        for name in ours:
            assert torch.equal(ours[name].isnan(), torchs[name].isnan()), name


def through_cat(y: Tensor) -> Tensor:
    return torch.cat([y, 2 * y], dim=1)


def through_expand(y: Tensor) -> Tensor:
    return y.sum((2, 3, 4), keepdim=True).expand(-1, -1, 2, -1, -1)


@layouts
@pytest.mark.parametrize("through", [through_cat, through_expand])
def test_gradients_of_any_strides(through: Callable[[Tensor], Tensor], layout: str) -> None:
    for shape in split_and_whole(layout):
        x, *parameters, _ = arguments(shape, layout)
        with executed():
            check(x, *parameters, torch.randn(through(x).shape), through=through)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, layout: str) -> None:
    """y overwrites x and dx overwrites dy: bitwise the same as in separate memory, and every element is written."""
    for shape in split_and_whole(layout, dtype):
        x, weight, bias, slope, dy = arguments(shape, layout, dtype)
        with executed():
            y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
            found = instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics)
            assert not any(unwritten(tensor) for tensor in (y, statistics, *found))
            dx = instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics, in_place=True)[0]
            over, again = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, in_place=True)
        assert (dx.data_ptr(), over.data_ptr()) == (dy.data_ptr(), x.data_ptr())
        assert torch.equal(dx, found[0])
        assert torch.equal(over, y)
        assert torch.equal(again, statistics)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_known_statistics(dtype: torch.dtype, layout: str) -> None:
    """What `recompute` launches: bitwise the same y."""
    for shape in split_and_whole(layout, dtype):
        x, weight, bias, slope, _ = arguments(shape, layout, dtype)
        with executed():
            y, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
            again, _ = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, statistics=statistics)
        assert torch.equal(again, y)


@layouts
def test_another_dtype_of_y(layout: str) -> None:
    """float32 in, bfloat16 out, as under autocast."""
    for shape in split_and_whole(layout):
        x, weight, bias, slope, _ = arguments(shape, layout)
        with executed():
            y, _ = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, dtype=torch.bfloat16)
        truth = formula(*map(double, (x, weight, bias, slope)), 1e-5)
        assert y.dtype == torch.bfloat16
        assert (y - truth).abs().max() <= torch.finfo(torch.bfloat16).eps * truth.abs().max()


@layouts
@pytest.mark.parametrize("needs", ["x", "weight", "bias", "slope", "residual", "x residual", "weight slope"])
def test_only_some_gradients(needs: str, layout: str) -> None:
    """Those that are asked for are what they are among all, summed maybe in another order; the others are None."""
    names = ("x", "weight", "bias", "slope", "residual")
    for shape in split_and_whole(layout, residual=True):
        x, weight, bias, slope, dy = arguments(shape, layout)
        r = torch.randn_like(x)
        scale = magnitudes(dy, x, weight, bias, slope, 1e-5, r)
        with executed():
            _, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, residual=r)
            given = dy, x, weight, bias, slope, statistics
            whole = instance_norm_prelu_backward(*given, residual=r)
            wanted = tuple(name in needs.split() for name in names)
            some = instance_norm_prelu_backward(*given, wanted, residual=r)
        for name, want, one, other in zip(names, wanted, some, whole, strict=True):
            assert (one is not None) == want, name
            if one is not None:
                limit = ULPS * torch.finfo(torch.float32).eps * scale[f"d{name}"]
                assert (one - other).abs().max() <= limit, name


@layouts
@pytest.mark.parametrize("spatial", [(11,), (5, 7), (2, 2, 2, 3)])
def test_other_numbers_of_axes(spatial: tuple[int, ...], layout: str) -> None:
    x = torch.randn(2, 3, *spatial)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with executed():
        near(x, torch.randn(3), torch.randn(3), torch.rand(3), torch.randn(x.shape))


@pytest.mark.parametrize("offset", [1, 3])
@layouts
def test_storage_that_is_not_aligned(offset: int, layout: str) -> None:
    """x begins a few elements into its storage: no vector may be wider than its alignment."""
    for shape in split_and_whole(layout, torch.bfloat16):
        x, weight, bias, slope, dy = arguments(shape, layout, torch.bfloat16)
        shifted = torch.cat([x.new_zeros(offset), x.permute(0, 2, 3, 4, 1).reshape(-1)])[offset:]
        if layout == "channels_last":
            x = shifted.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
        else:
            x = torch.cat([x.new_zeros(offset), x.reshape(-1)])[offset:].view(x.shape)
        with executed():
            near(x, weight, bias, slope, dy)


def test_the_branches_reached() -> None:
    """Whole rows and split ones, one chunk and many, one tile and several: for each direction, layout and size."""
    for itemsize in (2, 4):
        for channels_last in (False, True):
            found = [
                branch(N, C, prod(s), itemsize, channels_last, False) for N, C, s in shapes(itemsize, channels_last)
            ]
            assert len(found) >= 5
            assert {True, False} == {part for key in found for part in key if isinstance(part, bool)}
