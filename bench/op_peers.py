"""instance_norm_prelu alone: the PyTorch lines that it replaces, what else does the same, and fastenc's kernels."""

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

from . import cudnn_norm
from .agreement import OUTPUT
from .peers import EAGER, FASTENC, Candidate, Contest, Peer
from .record import Workload
from .timing import Work

EPS = 1e-5
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU: inputs that rotate over this much come from memory
MEMORY_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Subject:
    """What all peers of one workload share: weight, bias, slope (C,), and as many x and dy as keep the cache cold.

    x, dy (N, C, *spatial) in the workload's layout and dtype; on a CPU one pair. `exact` is the same in float64.
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
        size = self.x.numel() * self.x.element_size() * (2 if self.backward else 1)
        copies = 1 if exact or device.type != "cuda" else 1 + -(-COLD_BYTES // size)
        pairs = [(self.x.clone().requires_grad_(self.backward), self.dy.clone()) for _ in range(copies)]
        self.pairs = itertools.cycle(pairs)


def candidate(subject: Subject, op: Op, note: Callable[[Tensor], str] = lambda x: "") -> Candidate:
    """instance_norm_prelu as a candidate: forward under no_grad, or backward alone, its forward off the clock."""
    backward, leaves = subject.backward, subject.leaves

    def prepare() -> tuple[Any, ...]:
        x, dy = next(subject.pairs)
        return (op(x, *leaves), x, dy) if backward else (x,)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return op(x, *leaves)

    def gradients(y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *leaves], dy)

    def numbers() -> dict[str, Tensor]:
        arguments = prepare()
        if not backward:
            return {OUTPUT: forward(*arguments)}
        names = ["dx", "dweight", "dbias", "dslope"]
        return {OUTPUT: arguments[0].detach(), **dict(zip(names, gradients(*arguments), strict=True))}

    def held() -> list[Tensor]:
        return [subject.x, *leaves, *([subject.dy] if backward else [])]

    work = Work(gradients if backward else forward, prepare, queued=True)
    return Candidate(numbers, work, held, lambda: note(subject.x))


def plain_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    """InstanceNorm and PReLU, the PyTorch lines that fastenc replaces."""
    return F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=EPS), slope)


def group_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    """The same by GroupNorm of one channel a group, which PyTorch runs in channels-last too."""
    return F.prelu(F.group_norm(x, x.shape[1], weight, bias, EPS), slope)


def _cudnn_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    return cudnn_norm.instance_norm_prelu(x, weight, bias, slope, EPS)


def _fused_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, EPS)


def _route(x: Tensor) -> str:
    reason = fastenc.route.reason(x)
    return "triton" if reason is None else f"eager ({reason})"


CONTEST = Contest(
    subject=Subject,
    peers={
        EAGER: Peer(partial(candidate, op=plain_op)),
        "GroupNorm(C, C)": Peer(partial(candidate, op=group_op)),
        FASTENC: Peer(partial(candidate, op=_fused_op, note=_route)),
        "cuDNN + PReLU": Peer(partial(candidate, op=_cudnn_op), absent=cudnn_norm.absent),
        "torch.compile": Peer(
            lambda subject: candidate(subject, torch.compile(plain_op, dynamic=False)), compiles=True
        ),
        "torch.compile GroupNorm(C, C)": Peer(
            lambda subject: candidate(subject, torch.compile(group_op, dynamic=False)), compiles=True
        ),
    },
    exact=lambda subject: candidate(Subject(subject.workload, subject.device, exact=True), plain_op),
)
