"""Random calls of instance_norm_prelu for the property tests: a Case says in words what is drawn, `tensors` makes it.

Everything that matters is in the Case, its random numbers as a seed, so that a printed Case is all one needs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support.accuracy import preactivation, size, statistics
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF, torch.float64)
ARRANGEMENTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded", "offset")
NEEDS = ("x", "weight", "bias", "slope", "residual")


@dataclass(frozen=True)
class Case:
    """One call.

    x, dy, residual: how each lies in memory, as (name, order of the axes); residual None: there is none.
    slope: "per channel" and "one" are tensors of random slopes, up to `steep`; else a number.
    x is normal numbers times `magnitude`, around offset·magnitude; constant: its first channel is.
    parameters: dtype of weight, bias and a slope tensor. needs: whose gradients are asked for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    x: tuple[str, tuple[int, ...]]
    dy: tuple[str, tuple[int, ...]]
    residual: tuple[str, tuple[int, ...]] | None
    weight: bool
    bias: bool
    slope: str | float
    steep: float
    parameters: torch.dtype
    magnitude: float
    offset: float
    constant: bool
    eps: float
    needs: tuple[str, ...]
    seed: int


class Tensors(NamedTuple):
    """The arguments of a call, and dy."""

    dy: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | float
    eps: float
    residual: Tensor | None


@st.composite
def cases(
    draw: Any,
    shapes: st.SearchStrategy[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    arrangements: tuple[str, ...] = ARRANGEMENTS,
) -> Case:
    """Cases of these shapes (N, C, *spatial), dtypes and arrangements of x."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    orders = st.permutations(range(len(shape))).map(tuple)
    others = st.tuples(st.sampled_from(ARRANGEMENTS), orders)
    huge = 100.0 if dtype == torch.float16 else 1e6  # float16 ends at 65504
    return Case(
        shape,
        dtype,
        x=draw(st.tuples(st.sampled_from(arrangements), orders)),
        dy=draw(others),
        residual=draw(st.none() | others),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        slope=draw(st.sampled_from(("per channel", "one", 0.01, 0.0, 1.0, -0.5, -2, 3, -huge))),
        steep=draw(st.sampled_from((0.0, 0.3, 1.0, huge))),
        parameters=draw(st.sampled_from((torch.float32, dtype))),
        magnitude=10.0 ** draw(st.integers(-6, 6)),
        offset=draw(st.sampled_from((0.0, 1.0, -10.0, 1e3, -1e4))),
        constant=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 1e-3, 1e-8))),
        needs=tuple(name for name in NEEDS if draw(st.booleans())),
        seed=draw(st.integers(0, 999)),
    )


def small_shapes(least_samples: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C, *spatial) of one to three spatial axes, few elements and at least two positions."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    spatial = sizes.map(tuple).filter(lambda s: 2 <= torch.Size(s).numel() <= 128)
    return st.tuples(st.integers(least_samples, 4), st.integers(1, 40), spatial).map(lambda t: (t[0], t[1], *t[2]))


def tensors(case: Case) -> Tensors:
    """The arguments of the case. dy is 0 where z is so near to 0 that its sign, hence PReLU's branch, is open."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    C = case.shape[1]
    x, dy, residual = normal(*case.shape) + case.offset, normal(*case.shape), normal(*case.shape)
    if case.constant and x.numel():
        x[:, 0] = x[:1, :1].mean()
    x = arranged((x * case.magnitude).to(case.dtype), case.x)
    weight, bias = (normal(C).to(case.parameters) for _ in range(2))
    slope = case.slope
    if isinstance(slope, str):
        slope = (case.steep * normal(C if slope == "per channel" else 1)).to(case.parameters)
    r = None if case.residual is None else arranged(residual.to(case.dtype), case.residual)
    given = Tensors(
        arranged(dy.to(case.dtype), case.dy), x, weight if case.weight else None, bias if case.bias else None,
        slope, case.eps, r,
    )  # fmt: skip
    doubt = undetermined(given)
    return given._replace(dy=given.dy.masked_fill(doubt, 0)) if doubt.any() else given


def undetermined(given: Tensors) -> Tensor:
    """Where float32 cannot tell the sign of z."""
    _, x, weight, bias, _, eps, residual = given
    z = preactivation(x.double(), *(p if p is None else p.double() for p in (weight, bias)), eps, residual)
    mean, rstd, xhat = statistics(x, eps)
    terms = (xhat + mean * rstd) * size(weight, 1.0, x) + size(bias, 0.0, x)
    terms = terms if residual is None else terms + residual.double().abs()
    return z.abs() <= 4 * torch.finfo(torch.float32).eps * terms


def arranged(values: Tensor, how: tuple[str, tuple[int, ...]]) -> Tensor:
    """values, or what of them the arrangement leaves different, in other strides."""
    name, order = how
    if name == "contiguous":
        return values
    if name == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    axis = order[0]
    if name == "permuted":
        return values.permute(order).contiguous().permute(torch.argsort(torch.tensor(order)).tolist())
    if name == "sliced":
        every_other = [slice(None, None, 2 if i == axis else None) for i in range(values.dim())]
        return values.repeat_interleave(2, axis)[tuple(every_other)]
    return values.narrow(axis, 0, 1).expand(values.shape)
