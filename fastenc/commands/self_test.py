"""The doctor's self-test: the fused operation and its gradients against the formula in float64, in about a second.

A result passes if its distance from float64 is at most twice that of PyTorch's own operations in float32, plus four
roundings of the result's scale. The scale of a sum is that of its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import route
from ..functional import instance_norm_prelu

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
SHAPE = (2, 8, 9, 10, 11)
EPS = 1e-5
ROUNDINGS = 4 * torch.finfo(torch.float32).eps
RESULTS = ("y", "dx", "dweight", "dbias", "dslope")


@dataclass(frozen=True)
class Row:
    """The largest error of one result, and the largest that is allowed. error: None if the result is not finite."""

    layout: str
    result: str
    error: float | None
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed."""
        return self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class SelfTest:
    """The device and route tested, float32 results of SHAPE, and what was raised instead of results, if anything."""

    device: str
    route: str
    passed: bool
    rows: tuple[Row, ...]
    failure: str | None


def self_test(device: torch.device) -> SelfTest:
    """Test the route that float32 tensors on `device` take, and no other."""
    x = torch.empty(SHAPE, device=device)
    reason = route.reason(x)
    taken = "triton" if reason is None else "eager"
    try:
        with route.backend("triton" if reason is None else route.chosen()):
            rows = tuple(row for layout in LAYOUTS for row in compare(layout, device))
    except Exception as error:  # a user's own calls would raise the same, or fall back
        return SelfTest(str(device), taken, False, (), f"{type(error).__name__}: {' '.join(str(error).split())}")
    return SelfTest(str(device), taken, all(row.passed for row in rows), rows, None)


def compare(layout: str, device: torch.device) -> list[Row]:
    """The error of each result of the operation in this layout."""
    # With these numbers no z is near 0, where rounding would choose the branch.
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    weight, bias, slope = (torch.randn(SHAPE[1], generator=generator) for _ in range(3))
    x, dy = ((t + 0.5).to(device).contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
    tensors = [x, *(parameter.to(device) for parameter in (weight, bias, slope))]

    results = _results(partial(instance_norm_prelu, eps=EPS), tensors, dy)
    own = _results(_torchs_own, tensors, dy)
    exact = _results(formula, [t.double() for t in tensors], dy.double())
    terms = _terms(exact, tensors, dy)
    rows = []
    for name, result, own_result, truth in zip(RESULTS, results, own, exact, strict=True):
        error, own_error = ((t.double() - truth).abs().max().item() for t in (result, own_result))
        allowed = 2 * own_error + ROUNDINGS * terms[name]
        rows.append(Row(layout, name, error if math.isfinite(error) else None, allowed))
    return rows


def formula(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    """The definition: y = z where z > 0 else slope·z, z = (x − mean)/√(variance + eps)·weight + bias."""
    weight, bias, slope = (parameter.view(1, -1, 1, 1, 1) for parameter in (weight, bias, slope))
    centered = x - x.mean((2, 3, 4), keepdim=True)
    z = centered / (centered.square().mean((2, 3, 4), keepdim=True) + EPS).sqrt() * weight + bias
    return torch.where(z > 0, z, slope * z)


def _torchs_own(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    return F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=EPS), slope)


def _results(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """y, and the gradients of the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def _terms(exact: tuple[Tensor, ...], tensors: list[Tensor], dy: Tensor) -> dict[str, float]:
    """The scale of each result: max |y| and |dx|, and for a parameter's gradient the largest Σ|terms|."""
    y, dx, *_ = exact
    x, weight, bias, slope = (t.double() for t in tensors)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    xhat = formula(x, ones, zeros, ones)
    dz = dy.double().abs() * slope.abs().clamp(min=1).view(1, -1, 1, 1, 1)
    z = formula(x, weight, bias, ones)
    sums = {"dweight": dz * xhat, "dbias": dz, "dslope": dy.double() * z}
    largest = {name: terms.abs().sum((0, 2, 3, 4)).max().item() for name, terms in sums.items()}
    return {"y": y.abs().max().item(), "dx": dx.abs().max().item(), **largest}
