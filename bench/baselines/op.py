"""instance_norm_prelu with and without a residual: the PyTorch lines that it replaces, alternatives, and fastenc."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastenc
import fastenc.route

from ..engine.agreement import OUTPUT
from ..engine.floor import operation_cost
from ..engine.record import Workload
from ..engine.timing import Work
from .suite import EAGER, FASTENC, Baseline, Runner, Suite

EPS = 1e-5
COLD_BYTES = 256 << 20  # larger than any GPU's L2 cache: inputs that rotate over it are read from memory
MEMORY_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

Op = Callable[..., Tensor]  # takes x, weight, bias, slope and possibly the residual


class Inputs:
    """What all baselines of one workload share. exact: the same values in float64.

    Attributes:
        leaves: weight, bias and slope, (C,).
        x, dy: (N, C, *spatial), in the workload's layout and dtype.
        residuals: empty, or one tensor like x.
        copies: endless (x, dy, residuals). On a GPU they rotate over more memory than the cache holds.
    """

    def __init__(self, workload: Workload, device: torch.device, exact: bool = False) -> None:
        self.workload, self.device = workload, device
        self.backward = workload.mode == "backward"
        generator = torch.Generator(device).manual_seed(2)
        dtype = getattr(torch, workload.dtype)

        def random(shape: Sequence[int], at: float, width: float) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device).mul_(width).add_(at)
            return values.to(dtype).to(torch.float64 if exact else dtype)

        C, memory_format = workload.shape[1], MEMORY_FORMAT[workload.layout]
        self.leaves = [random([C], 1, 0.2), random([C], 0, 0.2), random([C], 0.25, 0.1)]
        for leaf in self.leaves:
            leaf.requires_grad_(self.backward)
        self.x = random(workload.shape, 0.5, 2).contiguous(memory_format=memory_format)
        self.dy = random(workload.shape, 0, 1).contiguous(memory_format=memory_format)
        self.residuals: list[Tensor] = []
        if workload.kind == "instance_norm_add_prelu":
            self.residuals = [random(workload.shape, 0, 1).contiguous(memory_format=memory_format)]
        size = sum(tensor.nbytes for tensor in self.tensors())
        copies = 1 if exact or device.type != "cuda" else 1 + -(-COLD_BYTES // size)
        self.copies = itertools.cycle([self._copy() for _ in range(copies)])

    def tensors(self) -> list[Tensor]:
        """What one call reads, without the parameters."""
        return [self.x, *self.residuals, *([self.dy] if self.backward else [])]

    def _copy(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        x, *residuals = (each.clone().requires_grad_(self.backward) for each in (self.x, *self.residuals))
        return x, self.dy.clone(), residuals


def runner(inputs: Inputs, op: Op, note: Callable[[Tensor], str] = lambda x: "") -> Runner:
    """A runner of `op`: forward under no_grad, or backward alone, whose forward is not timed."""
    backward, leaves = inputs.backward, inputs.leaves

    def prepare() -> tuple[Any, ...]:
        x, dy, residuals = next(inputs.copies)
        return (op(x, *leaves, *residuals), dy, x, *residuals) if backward else (x, *residuals)

    def forward(x: Tensor, *residuals: Tensor) -> Tensor:
        with torch.no_grad():
            return op(x, *leaves, *residuals)

    def gradients(y: Tensor, dy: Tensor, x: Tensor, *residuals: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *leaves, *residuals], dy)

    def numbers() -> dict[str, Tensor]:
        arguments = prepare()
        if not backward:
            return {OUTPUT: forward(*arguments)}
        names = ["dx", "dweight", "dbias", "dslope", *("dr" for _ in inputs.residuals)]
        return {OUTPUT: arguments[0].detach(), **dict(zip(names, gradients(*arguments), strict=True))}

    def held() -> list[Tensor]:
        return [*inputs.tensors(), *leaves]

    work = Work(gradients if backward else forward, prepare, queued=True)
    return Runner(numbers, work, held, lambda: note(inputs.x))


def plain_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    """InstanceNorm, the addition and PReLU: the PyTorch lines that fastenc replaces."""
    return _end(F.instance_norm(x, weight=weight, bias=bias, eps=EPS), slope, residual)


def group_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    """`plain_op` with GroupNorm with one channel per group, which PyTorch also runs in channels-last."""
    return _end(F.group_norm(x, x.shape[1], weight, bias, EPS), slope, residual)


def _end(z: Tensor, slope: Tensor, residual: Tensor | None) -> Tensor:
    return F.prelu(z if residual is None else z + residual, slope)


def _fused_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, EPS, residual)


def _route(x: Tensor) -> str:
    reason = fastenc.route.reason(x)
    return "triton" if reason is None else f"eager ({reason})"


SUITE = Suite(
    inputs=Inputs,
    baselines={
        EAGER: Baseline(partial(runner, op=plain_op)),
        "GroupNorm(C, C)": Baseline(partial(runner, op=group_op)),
        FASTENC: Baseline(partial(runner, op=_fused_op, note=_route)),
        "torch.compile": Baseline(lambda inputs: runner(inputs, torch.compile(plain_op, dynamic=False)), compiles=True),
        "torch.compile GroupNorm(C, C)": Baseline(
            lambda inputs: runner(inputs, torch.compile(group_op, dynamic=False)), compiles=True
        ),
    },
    exact=lambda inputs: runner(Inputs(inputs.workload, inputs.device, exact=True), plain_op),
    cost=operation_cost,
)
