"""instance_norm_prelu on a GPU against PyTorch in float64.

How far a result may be off is derived, in `limits`: twice what PyTorch's own kernels are off at the same dtype, plus a
few roundings of the result's dtype, plus what float32 statistics cannot avoid. A mean kept in float32 is off by up to
|mean|·2⁻²⁴, so x̂ = (x − mean)·rstd is off by DELTA = |mean|·rstd·2⁻²³ (the mean and the difference round once each),
and a sum of M terms in float32 by a few 2⁻²⁴ of the sum of their sizes when it is taken in blocks.

Where z is within that of 0 its sign, and with it the branch of PReLU, is not determined: dy is 0 there. With a residual
r, PyTorch rounds z to its dtype before the sum z + r, which takes z's place: that much more is not determined.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastenc

DEVICE = "cuda"
ULP32 = 2.0**-23
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPATIAL = {
    2: (2, 1, 1),
    3: (1, 3, 1),
    7: (7, 1, 1),
    120: (4, 5, 6),
    1000: (10, 10, 10),
    4097: (17, 241, 1),
    29760: (31, 32, 30),
    35937: (33, 33, 33),
    2**21: (128, 128, 128),
}
SHAPES = [
    *((1, 3, S) for S in SPATIAL),
    *((3, 64, S) for S in SPATIAL if S < 2**21),
    *((N, C, S) for N, (C, S) in zip((1, 3) * 3, product((1, 8, 24), (7, 1000)), strict=True)),
    (2, 24, 29760),
    (1, 1, 35937),
]
RESIDUAL_SHAPES = [(3, 64, 120), (2, 8, 2), (2, 24, 1000), (3, 64, 4097), (2, 24, 29760), (1, 3, 35937), (1, 3, 2**21)]
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _poisoned(deterministic: None) -> None:
    """Every output is NaN before a kernel writes it."""


@dataclass(frozen=True)
class Problem:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | float
    dy: Tensor
    eps: float = 1e-5
    residual: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(t: Tensor | float | None) -> Tensor | float | None:
            return t.to(dtype) if isinstance(t, Tensor) else t

        tensors = self.x, self.weight, self.bias, self.slope, self.dy
        return Problem(*(cast(t) for t in tensors), self.eps, cast(self.residual))


def random_problem(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    mean: float = 0.5,
    parameters: torch.dtype | None = None,
    residual: bool = False,
) -> Problem:
    """x of the given mean and deviation 2; slopes negative, zero, between 0 and 1, and above 1, channel by channel."""
    generator = torch.Generator(DEVICE).manual_seed(hash((shape, mean)) % 2**32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    C = shape[1]
    x = (2 * normal(*shape) + mean).to(dtype)
    dy, r = normal(*shape).to(dtype), normal(*shape).to(dtype)
    if x.dim() == 5:
        x, dy, r = (t.contiguous(memory_format=MEMORY_FORMATS[layout]) for t in (x, dy, r))
    slope = torch.tensor([0.25, -0.5, 0.0, 1.5], device=DEVICE).repeat(C // 4 + 1)[:C]
    weight, bias = 1 + 0.3 * normal(C), 0.3 * normal(C)
    weight, bias, slope = (p.to(parameters or dtype) for p in (weight, bias, slope))
    return settle(Problem(x, weight, bias, slope, dy, residual=r if residual else None))


def statistics(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """mean and rstd of each (n, c), and z, with the residual, in float64."""
    x = problem.x.double()
    axes = tuple(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    rstd = ((x - mean).square().mean(axes, keepdim=True) + problem.eps).rsqrt()
    z = (x - mean) * rstd
    for parameter, combine in ((problem.weight, torch.mul), (problem.bias, torch.add)):
        if parameter is not None:
            z = combine(z, parameter.double().view(1, -1, *[1] * len(axes)))
    return mean, rstd, z if problem.residual is None else z + problem.residual.double()


def delta(problem: Problem) -> float:
    """DELTA, the largest of all rows, and at least one rounding of the largest x̂."""
    mean, rstd, _ = statistics(problem)
    xhat = ((problem.x.double() - mean) * rstd).abs().max().item()
    return ULP32 * max((mean.abs() * rstd).max().item(), xhat)


def undetermined(problem: Problem) -> Tensor:
    """Where the sign of z is not determined."""
    z = statistics(problem)[2]
    weight = 1.0 if problem.weight is None else problem.weight.abs().max().item()
    rounding = ULP32 if problem.residual is None else torch.finfo(problem.x.dtype).eps
    return z.abs() <= 4 * delta(problem) * weight + 4 * rounding * z.abs().max().item()


def settle(problem: Problem) -> Problem:
    """The problem with dy 0 where the branch is not determined."""
    return replace(problem, dy=problem.dy.masked_fill(undetermined(problem), 0))


def plain(x: Tensor, weight: Any, bias: Any, slope: Any, eps: float, residual: Tensor | None = None) -> Tensor:
    """The PyTorch lines that the operation replaces. torch.prelu needs slope in x's dtype, cuDNN at most five axes."""
    tensor = x if x.dim() <= 5 else x.flatten(2)
    z = F.instance_norm(tensor, weight=weight, bias=bias, eps=eps).view_as(x)
    z = z if residual is None else z + residual
    return F.prelu(z, slope.to(z.dtype)) if isinstance(slope, Tensor) else F.leaky_relu(z, slope)


def run(op: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    """y and the gradients of whatever there is."""
    leaves = {k: getattr(problem, k) for k in ("x", "weight", "bias", "slope", "residual")}
    leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in leaves.items()}
    y = op(**leaves, eps=problem.eps)
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor)}
    gradients = torch.autograd.grad(y, list(wanted.values()), problem.dy)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}}


def largest_channel(terms: Tensor) -> float:
    """The largest sum of |terms| over n and positions of any one channel."""
    return terms.abs().sum(dim=[0, *range(2, terms.dim())]).max().item()


def limits(problem: Problem, exact: dict[str, Tensor], torch_own: dict[str, Tensor]) -> dict[str, float]:
    """How far the largest element of each result may be off, see the top of this file."""
    d = delta(problem)
    mean, rstd, z = statistics(problem)
    xhat = (problem.x.double() - mean) * rstd
    shape = (1, -1, *[1] * (xhat.dim() - 2))
    weight = 1.0 if problem.weight is None else problem.weight.double().abs().max().item()
    slope = torch.as_tensor(problem.slope, dtype=torch.float64, device=DEVICE).reshape(-1).view(shape)
    steepest = max(1.0, slope.abs().max().item())
    dy = problem.dy.double()
    dz = torch.where(z > 0, dy, slope * dy)
    g = (rstd * weight * dz).abs().max().item() * max(1.0, xhat.abs().max().item())
    unavoidable = {
        "y": d * weight * steepest,
        "dx": 2 * d * g,
        "dweight": 4 * ULP32 * largest_channel(dz * xhat) + d * largest_channel(dz),
        "dbias": 4 * ULP32 * largest_channel(dz),
        "dslope": 4 * ULP32 * largest_channel(dy * z) + d * weight * largest_channel(dy),
        "dresidual": 0.0,  # it is dz
    }
    if isinstance(problem.slope, Tensor) and problem.slope.numel() == 1:
        unavoidable["dslope"] *= z.shape[1]
    rounding = {k: torch.finfo(torch_own[k].dtype).eps for k in exact}
    return {
        k: 2 * off(torch_own[k], exact[k]) + 4 * rounding[k] * exact[k].abs().max().item() + unavoidable[k]
        for k in exact
    }


def off(result: Tensor, exact: Tensor) -> float:
    """The largest difference; not finite where the result is not."""
    return (result.double() - exact).abs().max().item()


def check(problem: Problem) -> dict[str, Tensor]:
    """Compare every result of the op on `problem` with float64; returns the results."""
    exact = run(plain, problem.to(torch.float64))
    allowed = limits(problem, exact, run(plain, problem))
    results = run(fastenc.instance_norm_prelu, problem)
    assert results.keys() == exact.keys()
    wrong = [
        f"{k} is off by {off(results[k], exact[k]):.2e}, {allowed[k]:.2e} allowed"
        for k in exact
        if not off(results[k], exact[k]) <= allowed[k]
    ]
    assert not wrong, "; ".join(wrong)
    return results


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_backward(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    N, C, S = shape
    problem = random_problem((N, C, *SPATIAL[S]), dtype, layout)
    results = check(problem)
    assert results["y"].dtype == results["dx"].dtype == dtype
    assert results["y"].is_contiguous(memory_format=MEMORY_FORMATS[layout])
    assert results["dx"].is_contiguous(memory_format=MEMORY_FORMATS[layout])


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RESIDUAL_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_residual(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    N, C, S = shape
    results = check(random_problem((N, C, *SPATIAL[S]), dtype, layout, residual=True))
    for name in ("y", "dx", "dresidual"):
        assert results[name].dtype == dtype
        assert results[name].is_contiguous(memory_format=MEMORY_FORMATS[layout])


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 4097, 29760, 2**21])
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_mean_far_from_zero(mean: float, S: int, layout: str) -> None:
    check(random_problem((1, 8, *SPATIAL[S]), torch.float32, layout, mean))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S", [7, 1000, 35937])
def test_constant_channel(S: int, dtype: torch.dtype, layout: str) -> None:
    problem = random_problem((2, 8, *SPATIAL[S]), dtype, layout)
    problem.x[:, 3] = 1.25
    check(settle(problem))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("S", [120, 35937])
def test_float32_parameters_with_low_precision(S: int, dtype: torch.dtype, layout: str) -> None:
    results = check(random_problem((2, 24, *SPATIAL[S]), dtype, layout, parameters=torch.float32))
    assert {results[k].dtype for k in ("dweight", "dbias", "dslope")} == {torch.float32}


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 35937])
@pytest.mark.parametrize(
    ("absent", "slope"),
    [
        ((), "shared"),
        ((), 1.0),
        (("weight",), "per channel"),
        (("weight",), -0.3),
        (("bias",), "shared"),
        (("bias",), 2.0),
        (("weight", "bias"), "per channel"),
        (("weight", "bias"), 0.01),
        (("weight", "bias"), 0.0),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_parameters_absent_or_shared(absent: tuple[str, ...], slope: str | float, S: int, layout: str) -> None:
    problem = replace(random_problem((2, 8, *SPATIAL[S]), torch.float32, layout), **dict.fromkeys(absent))
    if slope == "shared":
        problem = replace(problem, slope=torch.tensor([0.2], device=DEVICE))
    elif slope != "per channel":
        problem = replace(problem, slope=slope)
    check(settle(problem))


@pytest.mark.parametrize("shape", [(2, 8, 4097), (2, 8, 33, 31), (2, 3, 5, 4, 3, 2)], ids=str)
def test_other_numbers_of_axes(shape: tuple[int, ...]) -> None:
    check(random_problem(shape))


def half_of_a_cat(dy: Tensor) -> Tensor:
    return torch.cat([torch.full_like(dy, torch.nan), dy], 1).narrow(1, dy.shape[1], dy.shape[1])


def other_layout(dy: Tensor) -> Tensor:
    contiguous = dy.is_contiguous()
    return dy.contiguous(memory_format=torch.channels_last_3d if contiguous else torch.contiguous_format)


def every_second(dy: Tensor) -> Tensor:
    return torch.stack([dy, torch.full_like(dy, torch.nan)], -1)[..., 0]


def permuted(dy: Tensor) -> Tensor:
    return dy.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 29760])
@pytest.mark.parametrize("stride", [half_of_a_cat, other_layout, every_second, permuted])
def test_gradient_of_any_strides(stride: Callable[[Tensor], Tensor], S: int, layout: str) -> None:
    problem = random_problem((2, 8, *SPATIAL[S]), torch.float32, layout)
    strided = replace(problem, dy=stride(problem.dy))
    assert strided.dy.stride() != problem.dy.stride()
    check(strided)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 29760])
@pytest.mark.parametrize("stride", [half_of_a_cat, other_layout, every_second, permuted])
def test_residual_of_any_strides(stride: Callable[[Tensor], Tensor], S: int, layout: str) -> None:
    problem = random_problem((2, 8, *SPATIAL[S]), torch.float32, layout, residual=True)
    strided = replace(problem, residual=stride(problem.residual))
    assert strided.residual.stride() != problem.residual.stride()
    check(strided)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 29760])
def test_expanded_gradient(S: int, layout: str) -> None:
    """What `y.sum().backward()` sends: one number, expanded. Slope 1, because that dy cannot be 0 in places."""
    problem = random_problem((2, 8, *SPATIAL[S]), torch.float32, layout)
    check(replace(problem, slope=1.0, dy=torch.ones((), device=DEVICE).expand(problem.x.shape)))


@pytest.mark.parametrize("x_of", [every_second, permuted], ids=["every second", "permuted"])
def test_input_of_any_strides(x_of: Callable[[Tensor], Tensor]) -> None:
    problem = random_problem((2, 8, *SPATIAL[1000]))
    check(replace(problem, x=x_of(problem.x)))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 35937])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "slope", "residual"])
def test_one_gradient_alone_is_the_same(wanted: str, S: int, layout: str) -> None:
    names = ["x", "weight", "bias", "slope", *(["residual"] if wanted == "residual" else [])]
    problem = random_problem((2, 8, *SPATIAL[S]), torch.float32, layout, residual=wanted == "residual")
    leaves = {k: getattr(problem, k).detach() for k in names}
    leaf = leaves[wanted].requires_grad_()
    y = fastenc.instance_norm_prelu(**leaves)
    (alone,) = torch.autograd.grad(y, [leaf], problem.dy)
    assert torch.equal(alone, run(fastenc.instance_norm_prelu, problem)[f"d{wanted}"])


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("N", "C", "S", "residual"),
    [
        (3, 64, 120, False), (2, 64, 4097, False), (4, 64, 29760, False), (1, 3, 2**21, False), (3, 64, 120, True),
        (4, 64, 29760, True),
    ],
)  # fmt: skip
def test_bitwise_equal_over_100_runs(N: int, C: int, S: int, residual: bool, dtype: torch.dtype, layout: str) -> None:
    problem = random_problem((N, C, *SPATIAL[S]), dtype, layout, residual=residual)
    first = run(fastenc.instance_norm_prelu, problem)
    for _ in range(99):
        again = run(fastenc.instance_norm_prelu, problem)
        assert [k for k in first if not torch.equal(first[k], again[k])] == []


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("S", [120, 35937])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value: float, S: int, layout: str) -> None:
    problem = random_problem((2, 8, *SPATIAL[S]), torch.float32, layout)
    clean = run(fastenc.instance_norm_prelu, problem)
    problem.x[1, 5, 0, 0, 0] = value
    results = run(fastenc.instance_norm_prelu, problem)
    for name in ("y", "dx"):
        assert results[name][1, 5].isnan().all()
        results[name][1, 5] = clean[name][1, 5]
        assert torch.equal(results[name], clean[name])


def test_input_is_not_changed() -> None:
    problem = random_problem((2, 8, *SPATIAL[1000]))
    copies = {k: getattr(problem, k).clone() for k in ("x", "weight", "bias", "slope", "dy")}
    run(fastenc.instance_norm_prelu, problem)
    assert [k for k, v in copies.items() if not torch.equal(getattr(problem, k), v)] == []


def test_beyond_two_to_the_31_elements() -> None:
    """The first and the last row of a tensor of more than 2³¹ elements are what they are alone.

    One test for both layouts: of the processes that share the tests, only one takes so much memory.
    """
    shape = (2, 520, 128, 128, 128)
    needed = 14 * 2 * shape[1] * 2**21 + 2**33  # 8 GiB for the processes that run other tests
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    slope = torch.full((520,), 0.25, device=DEVICE)

    def alone(mean: float) -> Problem:
        row = random_problem((1, 1, 128, 128, 128), torch.float16, mean=mean)
        return settle(replace(row, weight=None, bias=None, slope=slope[:1]))

    rows = {(n, c): alone(n + 0.5) for n, c in [(0, 0), (1, 519)]}
    for layout in MEMORY_FORMATS:
        x = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=MEMORY_FORMATS[layout]).zero_()
        dy = torch.zeros_like(x)
        for (n, c), row in rows.items():
            x[n, c], dy[n, c] = row.x[0, 0], row.dy[0, 0]
        results = run(fastenc.instance_norm_prelu, Problem(x, None, None, slope, dy))
        for (n, c), row in rows.items():
            exact = run(plain, row.to(torch.float64))
            allowed = limits(row, exact, run(plain, row))
            for name in ("y", "dx"):
                assert off(results[name][n, c], exact[name][0, 0]) <= allowed[name]
        del x, dy, results


def test_side_stream() -> None:
    """The kernels run on the stream that the caller is on: here one that is still busy making x."""
    problem = random_problem((2, 64, *SPATIAL[29760]))
    expected = run(fastenc.instance_norm_prelu, problem)
    x, dy = torch.zeros_like(problem.x), torch.zeros_like(problem.dy)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(problem.x)
        dy.copy_(problem.dy)
        results = run(fastenc.instance_norm_prelu, replace(problem, x=x, dy=dy))
    stream.synchronize()
    assert [k for k in expected if not torch.equal(results[k], expected[k])] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    problem = random_problem((2, 8, *SPATIAL[29760]))
    there = Problem(*(getattr(problem, k).to("cuda:1") for k in ("x", "weight", "bias", "slope", "dy")))
    expected, results = run(fastenc.instance_norm_prelu, problem), run(fastenc.instance_norm_prelu, there)
    assert torch.cuda.current_device() == 0
    assert [k for k in expected if not torch.equal(results[k].to("cuda:0"), expected[k])] == []
