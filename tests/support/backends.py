"""Choose the route in a test, and find out which route was taken."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fastenc
from fastenc.bench.proofs.interpret import interpreted

either_route = pytest.mark.parametrize("route", ["auto", "fused"])


@contextlib.contextmanager
def taken(backend: str) -> Iterator[torch.dtype]:
    """Run under this backend, the kernels interpreted for "triton"; yields the most exact dtype that it takes.

    "fused" is "auto" as it is on a GPU: CPU tensors take the Triton route, interpreted, unless a reason speaks against
    it, and then the eager route in silence. A kernel that fails there fails the test: no falling back.
    """
    if backend == "fused":
        able = mock.patch.multiple("fastenc.route", device_reason=lambda x: None, fall_back=_raised)
        with interpreted(), fastenc.backend("auto"), able:
            yield torch.float32
    elif backend == "triton":
        with interpreted(), fastenc.backend("triton"):
            yield torch.float32
    else:
        with fastenc.backend(backend):
            yield torch.float64


def _raised(error: Exception, device: torch.device) -> None:
    raise error


@contextlib.contextmanager
def eager_norms() -> Iterator[mock.Mock]:
    """Counts the calls of torch.nn.functional.instance_norm. The Triton route makes none."""
    with mock.patch.object(nn.functional, "instance_norm", wraps=nn.functional.instance_norm) as calls:
        yield calls


def _forward_by_formula(
    x: torch.Tensor, weight: Any, bias: Any, slope: Any, eps: float, dtype: Any = None, in_place: bool = False,
    statistics: Any = None, residual: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    statistics = torch.full((2, x.shape[0] * x.shape[1]), eps, dtype=torch.float64)  # all that the formula needs of it
    if in_place and dtype in (None, x.dtype):
        for sample in x:  # one at a time: what a launch allocates is the output alone, and here not even that
            sample.copy_(fastenc.reference.forward(sample[None], weight, bias, slope, eps)[0])
        return x, statistics
    y = torch.empty_like(x, dtype=dtype).copy_(fastenc.reference.forward(x, weight, bias, slope, eps, residual))
    return y, statistics


def _backward_by_formula(
    dy: torch.Tensor, x: torch.Tensor, weight: Any, bias: Any, slope: Any, statistics: Any,
    needs: Any = (True,) * 5, in_place: bool = False, residual: Any = None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    gradients = fastenc.reference.backward(dy, x, weight, bias, slope, statistics[0, 0].item(), residual)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=False))


@contextlib.contextmanager
def launches_replaced() -> Iterator[None]:
    """ "fused", with the formula in place of each launch: for networks too big to interpret."""

    def launchers() -> tuple[Any, Any]:
        return _forward_by_formula, _backward_by_formula

    able = mock.patch.multiple("fastenc.route", device_reason=lambda x: None, fall_back=_raised)
    functional, recompute = (mock.patch(f"fastenc.{room}.launchers", launchers) for room in ("functional", "recompute"))
    name = "instance_norm_prelu"  # the operators look their launchers up at each call
    forward = mock.patch(f"fastenc.kernels.{name}_forward.{name}_forward", _forward_by_formula)
    backward = mock.patch(f"fastenc.kernels.{name}_backward.{name}_backward", _backward_by_formula)
    with fastenc.backend("auto"), able, functional, recompute, forward, backward:
        yield
