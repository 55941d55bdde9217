"""The tolerance for results of instance_norm_prelu, and the float64 formula that they are compared with.

A result may be at most twice as far from float64 as torch's operations at the same dtype, plus a few units in the last
place of the result's magnitude (for a sum: of its terms' magnitude).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

import fastenc

ULPS = 4
NAMES = ("x", "weight", "bias", "slope", "residual")
Value = Tensor | float | None


def arguments(
    x: Tensor, weight: Value, bias: Value, slope: Value, eps: float, residual: Value = None
) -> tuple[Any, ...]:
    """The arguments of the operation, of which the last may be missing."""
    return x, weight, bias, slope, eps, residual


def formula(x: Tensor, weight: Value, bias: Value, slope: Value, eps: float, residual: Value = None) -> Tensor:
    """The definition, in whatever precision x has."""
    z = preactivation(x, weight, bias, eps, residual)
    return torch.where(z > 0, z, (per_channel(slope, x) if isinstance(slope, Tensor) else slope) * z)


def preactivation(x: Tensor, weight: Value, bias: Value, eps: float, residual: Value = None) -> Tensor:
    """z of the formula."""
    axes = tuple(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    z = (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + eps).sqrt()
    z = z if weight is None else z * per_channel(weight, x)
    z = z if bias is None else z + per_channel(bias, x)
    return z if residual is None else z + residual


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """parameter (C,) or (1,), to be broadcast with x (N, C, *spatial)."""
    return parameter.view(1, -1, *(1 for _ in x.shape[2:]))


def double(value: Tensor | float | None) -> Tensor | float | None:
    return value.detach().double().requires_grad_() if isinstance(value, Tensor) else value


def gradients(
    function: Callable[..., Tensor], dy: Tensor, *given: Any, needs: Collection[str] = NAMES
) -> dict[str, Tensor]:
    """y and the gradient of every tensor argument named in `needs`, of function applied to fresh leaves."""
    x, weight, bias, slope, eps, residual = arguments(*given)
    x, weight, bias, slope, residual = leaves = [
        value.detach().requires_grad_(name in needs) if isinstance(value, Tensor) else value
        for name, value in zip(NAMES, (x, weight, bias, slope, residual), strict=True)
    ]
    y = function(x, weight, bias, slope, eps, *(() if residual is None else (residual,)))
    wanted = {f"d{k}": v for k, v in zip(NAMES, leaves, strict=True) if isinstance(v, Tensor) and v.requires_grad}
    if not wanted:
        return {"y": y}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def magnitudes(dy: Tensor, *given: Any) -> dict[str, Tensor]:
    """The magnitudes that units in the last place refer to: the terms of y and of the gradients, before they cancel.

    y = x̂·weight + bias + r. dx = rstd·weight·(dz − Σdz/S − x̂·Σdz·x̂/S): three terms that cancel, entirely where
    S is 2. The parameters' gradients are sums, over all channels where they share a slope.
    """
    x, weight, bias, slope, eps, residual = arguments(*given)
    _, rstd, xhat = statistics(x, eps)
    axes, w, steepest = tuple(range(2, x.dim())), size(weight, 1.0, x), size(slope, 0.0, x).clamp(min=1)
    z = xhat * w + size(bias, 0.0, x) + (0.0 if residual is None else residual.double().abs())
    dz = dy.double().abs() * steepest
    return {
        "y": largest(z * steepest),
        "dx": largest(rstd * w * (dz + dz.mean(axes, True) + xhat * (dz * xhat).mean(axes, True))),
        "dweight": largest_sum(dz * (1 + xhat)),
        "dbias": largest_sum(dz),
        "dslope": largest_sum(dy.double().abs() * z, slope),
        "dresidual": largest(dz),
    }


def unavoidable(dy: Tensor, *given: Any) -> dict[str, Tensor]:
    """How far statistics in float32 alone take results away: torch may be nearer by luck, where elements are few.

    A mean in float32 is off by half a unit in its last place, and x̂ by that·rstd. For float64 the same, in its units.
    """
    x, weight, _, slope, eps, _ = arguments(*given)
    mean, rstd, xhat = statistics(x, eps)
    axes, w, steepest = tuple(range(2, x.dim())), size(weight, 1.0, x), size(slope, 0.0, x).clamp(min=1)
    off = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps / 2 * mean * rstd
    dz = dy.double().abs() * steepest
    nothing = torch.zeros((), dtype=torch.float64)
    return {
        "y": largest(off * w * steepest),
        "dx": largest(rstd * w * off * ((dz * xhat).mean(axes, True) + xhat * dz.mean(axes, True))),
        "dweight": largest_sum(off * dz),
        "dbias": nothing,
        "dslope": largest_sum(off * w * dy.double().abs(), slope),
        "dresidual": nothing,
    }


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """|mean|, rstd and |x̂| in float64."""
    axes = tuple(range(2, x.dim()))
    mean = x.double().mean(axes, keepdim=True)
    rstd = 1 / ((x.double() - mean).square().mean(axes, keepdim=True) + eps).sqrt()
    return mean.abs(), rstd, ((x.double() - mean) * rstd).abs()


def size(parameter: Tensor | float | None, default: float, x: Tensor) -> Tensor:
    """|parameter| in float64, to be broadcast with x."""
    value = torch.as_tensor(default if parameter is None else parameter).double().abs()
    return per_channel(value, x) if value.dim() else value


def largest_sum(terms: Tensor, parameter: Tensor | float | None = None) -> Tensor:
    """The largest of the sums over all positions of a channel; over all channels where they share `parameter`."""
    sums = terms.sum((0, *range(2, terms.dim())))
    return sums.sum() if isinstance(parameter, Tensor) and parameter.numel() == 1 else largest(sums)


def largest(terms: Tensor) -> Tensor:
    """The largest that is finite: an infinite element of x spoils its own row, and no other's tolerance."""
    return terms.where(terms.isfinite(), 0.0).max()


def check(
    x: Tensor, weight: Value, bias: Value, slope: Value, dy: Tensor, eps: float = 1e-5, residual: Value = None,
    through: Callable[[Tensor], Tensor] = lambda y: y,
) -> dict[str, Tensor]:  # fmt: skip
    """Hold through(op(x, …)) and its gradients to the criterion; returns them."""

    def op(*args: object) -> Tensor:
        return through(fastenc.instance_norm_prelu(*args))

    given = x, weight, bias, slope, eps, residual
    dy = without_undecided(dy, *given) if dy.shape == x.shape else dy
    ours = gradients(op, dy, *given)
    with fastenc.backend("eager"):
        torchs = gradients(op, dy, *given)
    truth = gradients(lambda *args: through(formula(*args)), dy.double(), *map(double, given))
    leaf = torch.zeros(x.shape, dtype=torch.float64, requires_grad=True)
    (dy_seen,) = torch.autograd.grad(through(leaf), leaf, dy.double())
    scale = magnitudes(dy_seen, *given)
    scale["y"] = torch.maximum(scale["y"], truth["y"].abs().max())
    hold(ours, torchs, truth, scale, unavoidable(dy_seen, *given))
    return ours


def without_undecided(dy: Tensor, *given: Any) -> Tensor:
    """dy, with zeros where z is so near 0 that its rounding decides which branch of PReLU a gradient takes."""
    x, weight, bias, _, eps, residual = arguments(*given)
    z = preactivation(double(x), double(weight), double(bias), eps, double(residual)).detach()
    rounding = ULPS * torch.finfo(x.dtype).eps * magnitudes(dy, x, weight, bias, 1.0, eps, residual)["y"]
    off = 2 * unavoidable(dy, x, weight, bias, 1.0, eps, residual)["y"]
    undecided = (z != 0) & (z.abs() <= rounding + off)
    return dy.masked_fill(undecided, 0) if undecided.any() else dy  # a copy has lost dy's strides


def hold(
    ours: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    scale: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor] | None = None,
) -> None:
    """Hold each of ours to the criterion, to torch's shape and dtype, and to what is not finite in truth and in torch.

    scale: `magnitudes`; allowed: what else a result may be off by.
    """
    assert ours.keys() == torchs.keys() == truth.keys()
    for name, value in truth.items():
        mine, theirs = ours[name], torchs[name]
        assert mine.shape == value.shape, name
        assert mine.dtype == theirs.dtype, name
        kind = torch.finfo(mine.dtype)
        here, there, truly = mine.isfinite(), theirs.isfinite(), value.isfinite()
        in_range = ~(value.abs() > kind.max / 2)  # beyond, what overflows is a matter of rounding
        assert not (in_range & (here != truly) & (there == truly)).any(), f"{name}: finite elsewhere than torch's"
        finite = here & there & truly
        if finite.any():
            off, torchs_off = ((result.double() - value)[finite].abs().max().item() for result in (mine, theirs))
            limit = 2 * torchs_off + ULPS * kind.eps * scale[name].item()
            limit += 0.0 if allowed is None else allowed[name].item()
            assert off <= limit, f"{name}: error {off:.3g}, limit {limit:.3g}"
