"""Host cost of instance_norm_prelu: `pytest bench/suites/bench_host_cost.py` (`--benchmark-disable` for a trial run).

The time that Python and PyTorch spend per call. No GPU is needed: CPU tensors take the Triton route, and each kernel
launch is replaced by a function that does nothing. In every round the cost is compared with that of a
torch.autograd.Function that does nothing: it has the same six arguments, makes y and the statistics by empty_like (of x
and of weight), saves five tensors for the backward, and returns empty_like of the four inputs from its backward. Ratios
of minima and of medians go to extra_info, and the ratio of minima has a limit. Modules are compared with the same
function, without a limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastenc
import fastenc.route
from fastenc.bench.proofs.interpret import kernel_modules, replaced_kernels

CALLS, ROUNDS = 200, 100
LIMITS = {"forward": 1.6, "forward and backward": 2.0}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


class _DoesNothing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float, dtype: torch.dtype | None
    ) -> Tensor:
        y, statistics = torch.empty_like(x), torch.empty_like(weight)
        ctx.save_for_backward(x, weight, bias, slope, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slope, _ = ctx.saved_tensors
        return (*map(torch.empty_like, (x, weight, bias, slope)), None, None)


def nothing(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float) -> Tensor:
    """The function that instance_norm_prelu is compared with."""
    return _DoesNothing.apply(x, weight, bias, slope, eps, None)


class Pair(nn.Module):
    """A norm and its activation, and possibly the addition of a residual in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.activation = nn.InstanceNorm3d(64, affine=True), nn.PReLU(64)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        if residual is not None:
            z += residual
        return self.activation(z)


def accelerated() -> nn.Module:
    """An accelerated Pair, without the cost of the accelerated network around it."""
    network: Any = fastenc.accelerate(nn.Sequential(Pair()))
    assert network.accelerated.count("fused") == 1
    return network[0]


# How to make each module, and how many tensors it takes.
MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "accelerated": (accelerated, 1),
    "accelerated, residual": (accelerated, 2),
    "InstanceNormAct3d": (lambda: fastenc.InstanceNormAct3d(64, nn.PReLU(64), affine=True), 1),
}


def _no_launch(*arguments: Any, **options: Any) -> None:
    pass


def _no_reason() -> None:
    return None


class _Kernel:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return _no_launch


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside the block, CPU tensors take the Triton route and launches do nothing."""
    with (
        replaced_kernels(kernel_modules(), lambda kernel: _Kernel()),
        mock.patch.object(fastenc.route, "_interpreter_reason", _no_reason),
        fastenc.backend("triton"),
    ):
        yield


def work(direction: str, layout: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One call of instance_norm_prelu ("op") and one of the function that does nothing ("nothing")."""
    x = torch.randn(2, 64, 4, 4, 4).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    leaves = [x.requires_grad_(), *(torch.rand(64).to(dtype).requires_grad_() for _ in range(3))]

    def forward(op: Callable[..., Tensor]) -> Tensor:
        return op(*leaves, 1e-5)

    def forward_backward(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*leaves, 1e-5), leaves, dy)

    run = forward if direction == "forward" else forward_backward
    return {"op": lambda: run(fastenc.instance_norm_prelu), "nothing": lambda: run(nothing)}


def module_work(direction: str, module: str) -> dict[str, Callable[[], object]]:
    """As `work`, for one of MODULES on channels-last float32 tensors."""
    make, count = MODULES[module]
    model = make()
    x, residual, dy = (torch.randn(2, 64, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d) for _ in range(3))
    given = [x, residual][:count]
    parameters = [*model.parameters()]

    def run(op: Callable[..., Tensor], *arguments: Any) -> object:
        if direction == "inference":
            with torch.no_grad():
                return op(*arguments)
        leaves = [*given, *parameters]
        return torch.autograd.grad(op(*arguments), leaves, dy, allow_unused=True)

    for tensor in given:
        tensor.requires_grad_(direction != "inference")
    return {"op": lambda: run(model, *given), "nothing": lambda: run(nothing, x, *parameters, 1e-5)}


def compare(benchmark: Any, calls: dict[str, Callable[[], object]]) -> str:
    """Time both calls, "op" and "nothing", in rounds of CALLS calls each. Fills extra_info and returns it as text."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def in_turn() -> None:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.perf_counter() - start) / CALLS)

    benchmark.pedantic(in_turn, rounds=ROUNDS, warmup_rounds=1)
    for summary, of in (("min", min), ("median", median)):
        benchmark.extra_info[f"{summary} ratio"] = of(seconds["op"]) / of(seconds["nothing"])
        for name, samples in seconds.items():
            benchmark.extra_info[f"{summary} µs, {name}"] = of(samples) * 1e6
    return ", ".join(f"{name} {value:.2f}" for name, value in benchmark.extra_info.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", LIMITS)
def test_host_cost(benchmark: Any, direction: str, layout: str, dtype: torch.dtype) -> None:
    with stubbed():
        found = compare(benchmark, work(direction, layout, dtype))
    print(f"\n{direction}, {layout}, {dtype}: {found}")
    if not benchmark.disabled:
        assert benchmark.extra_info["min ratio"] <= LIMITS[direction], found


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("direction", ["inference", "forward and backward"])
def test_host_cost_of_modules(benchmark: Any, direction: str, module: str) -> None:
    with stubbed():
        found = compare(benchmark, module_work(direction, module))
    print(f"\n{direction}, {module}: {found}")
