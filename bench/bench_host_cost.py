"""Host cost of instance_norm_prelu: `python -m pytest bench/bench_host_cost.py` (`--benchmark-disable` to try it).

What Python and PyTorch spend per call, no GPU needed: CPU tensors take the Triton route, and every kernel launch is
replaced by a function that does nothing. Beside it, round by round in turn, a torch.autograd.Function that does
nothing: the same six arguments, y and the statistics from empty_like (of x and of weight), as many tensors saved for
backward, five, and a backward that returns empty_like of the four inputs. Ratios of minima and of medians go to
extra_info; the ratio of the minima is held to the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastenc
import fastenc.route
from fastenc.bench.interpret import kernel_modules

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
    """What instance_norm_prelu is compared with."""
    return _DoesNothing.apply(x, weight, bias, slope, eps, None)


def _no_launch(*arguments: Any, **options: Any) -> None:
    pass


def _no_reason() -> None:
    return None


class _Kernel:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return _no_launch


@contextmanager
def stubbed() -> Iterator[None]:
    """CPU tensors take the Triton route inside the block, and launches do nothing."""
    with ExitStack() as stack:
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _Kernel()))
        stack.enter_context(mock.patch.object(fastenc.route, "_interpreter_reason", _no_reason))
        stack.enter_context(fastenc.backend("triton"))
        yield


def work(direction: str, layout: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One call of instance_norm_prelu ("op") and one of what does nothing ("nothing")."""
    x = torch.randn(2, 64, 4, 4, 4).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    leaves = [x.requires_grad_(), *(torch.rand(64).to(dtype).requires_grad_() for _ in range(3))]

    def forward(op: Callable[..., Tensor]) -> Tensor:
        return op(*leaves, 1e-5)

    def forward_backward(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*leaves, 1e-5), leaves, dy)

    run = forward if direction == "forward" else forward_backward
    return {"op": lambda: run(fastenc.instance_norm_prelu), "nothing": lambda: run(nothing)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", LIMITS)
def test_host_cost(benchmark: Any, direction: str, layout: str, dtype: torch.dtype) -> None:
    """A round is CALLS calls of each, timed apart."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"op": [], "nothing": []}
    with stubbed():
        calls = work(direction, layout, dtype)

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
    found = ", ".join(f"{name} {value:.2f}" for name, value in benchmark.extra_info.items())
    print(f"\n{direction}, {layout}, {dtype}: {found}")
    if not benchmark.disabled:
        assert benchmark.extra_info["min ratio"] <= LIMITS[direction], found
