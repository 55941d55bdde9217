"""instance_norm_prelu alone, with a residual or without: the PyTorch lines that it replaces, what else does the same,
and fastenc's kernels."""

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
from ..engine.record import Workload
from ..engine.timing import Work
from .suite import EAGER, FASTENC, Candidate, Contest, Peer

EPS = 1e-5
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU: inputs that rotate over this much come from memory
MEMORY_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

Op = Callable[..., Tensor]  # of x, weight, bias, slope and, where there is one, the residual


class Subject:
    """What all peers of one workload share: weight, bias, slope (C,), and as many volumes as keep the cache cold.

    The volumes are x, dy and, of an operation with one, the residual: (N, C, *spatial) in the workload's layout and
    dtype; on a CPU one of each. `exact` is the same in float64.
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
        size = sum(volume.numel() * volume.element_size() for volume in self.volumes())
        copies = 1 if exact or device.type != "cuda" else 1 + -(-COLD_BYTES // size)
        self.inputs = itertools.cycle([self._copies() for _ in range(copies)])

    def volumes(self) -> list[Tensor]:
        """What one call reads, besides the parameters."""
        return [self.x, *self.residuals, *([self.dy] if self.backward else [])]

    def _copies(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        x, *residuals = (each.clone().requires_grad_(self.backward) for each in (self.x, *self.residuals))
        return x, self.dy.clone(), residuals


def candidate(subject: Subject, op: Op, note: Callable[[Tensor], str] = lambda x: "") -> Candidate:
    """instance_norm_prelu as a candidate: forward under no_grad, or backward alone, its forward off the clock."""
    backward, leaves = subject.backward, subject.leaves

    def prepare() -> tuple[Any, ...]:
        x, dy, residuals = next(subject.inputs)
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
        names = ["dx", "dweight", "dbias", "dslope", *("dr" for _ in subject.residuals)]
        return {OUTPUT: arguments[0].detach(), **dict(zip(names, gradients(*arguments), strict=True))}

    def held() -> list[Tensor]:
        return [*subject.volumes(), *leaves]

    work = Work(gradients if backward else forward, prepare, queued=True)
    return Candidate(numbers, work, held, lambda: note(subject.x))


def plain_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    """InstanceNorm, an addition and PReLU, the PyTorch lines that fastenc replaces."""
    return _end(F.instance_norm(x, weight=weight, bias=bias, eps=EPS), slope, residual)


def group_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    """The same by GroupNorm of one channel a group, which PyTorch runs in channels-last too."""
    return _end(F.group_norm(x, x.shape[1], weight, bias, EPS), slope, residual)


def _end(z: Tensor, slope: Tensor, residual: Tensor | None) -> Tensor:
    return F.prelu(z if residual is None else z + residual, slope)


def _fused_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, EPS, residual)


def _route(x: Tensor) -> str:
    reason = fastenc.route.reason(x)
    return "triton" if reason is None else f"eager ({reason})"


CONTEST = Contest(
    subject=Subject,
    peers={
        EAGER: Peer(partial(candidate, op=plain_op)),
        "GroupNorm(C, C)": Peer(partial(candidate, op=group_op)),
        FASTENC: Peer(partial(candidate, op=_fused_op, note=_route)),
        "torch.compile": Peer(
            lambda subject: candidate(subject, torch.compile(plain_op, dynamic=False)), compiles=True
        ),
        "torch.compile GroupNorm(C, C)": Peer(
            lambda subject: candidate(subject, torch.compile(group_op, dynamic=False)), compiles=True
        ),
    },
    exact=lambda subject: candidate(Subject(subject.workload, subject.device, exact=True), plain_op),
)
