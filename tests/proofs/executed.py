"""The Triton route in a test with the kernels' compiled code executed, and the shapes that reach every branch of it."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastenc
from fastenc.bench.proofs.ptx import Machine, executing
from fastenc.kernels.layout import MEMORY_FORMAT
from fastenc.kernels.plan import make_plan

SMS = 132  # of the GPU whose plans a CPU tensor gets
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (N, C, spatial): odd and even, divisible and not, whole rows, several tiles, several chunks. `shapes` picks the
# smallest for each branch.
CANDIDATES = [
    (N, C, spatial)
    for N, C in ((2, 3), (2, 8), (1, 24), (2, 40), (3, 1))
    for spatial in ((2, 1, 1), (3, 1, 1), (3, 3, 3), (4, 5, 6), (7, 7, 7), (8, 8, 8), (10, 10, 10))
] + [
    (N, C, spatial)
    for N, C in ((2, 3), (1, 8), (1, 24))
    for spatial in ((17, 9, 8), (17, 241, 1), (16, 16, 17), (20, 20, 21), (33, 33, 31))
]
CANDIDATES += [(1, 1, (37, 37, 37)), (1, 64, (20, 20, 21)), (1, 2, (64, 65, 16)), (1, 3, (20, 31, 29))]


def branch(N: int, C: int, S: int, itemsize: int, channels_last: bool, residual: bool) -> tuple[Any, ...]:
    """What of the forward's and the backward's plan decides which code runs, not how much of it.

    Flags and names as they are; of counts only whether there is one, a few or many.
    """
    found: list[Any] = []
    for backward in (False, True):
        plan = dataclasses.asdict(make_plan(N, C, S, itemsize, channels_last, SMS, backward, residual))
        flags = [value for value in plan.values() if isinstance(value, (bool, str))]
        found += [
            *flags,
            min(plan["chunks"], 3),
            plan["chunks"] > 128,
            min(plan["tiles"], 2),
            plan["num_warps"],
            plan["BLOCK_C"] > 1,
            plan["VEC"] > 1,
        ]
    return tuple(found)


def shapes(itemsize: int, channels_last: bool, residual: bool = False) -> list[tuple[int, int, tuple[int, ...]]]:
    """The smallest candidate for each branch."""
    smallest: dict[tuple[Any, ...], tuple[int, int, tuple[int, ...]]] = {}
    for N, C, spatial in sorted(CANDIDATES, key=lambda shape: shape[0] * shape[1] * prod(shape[2])):
        key = branch(N, C, prod(spatial), itemsize, channels_last, residual)
        smallest.setdefault(key, (N, C, spatial))
    return list(smallest.values())


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=MEMORY_FORMAT[x.dim()]) if channels_last else x.contiguous()


@contextmanager
def executed(architecture: int = 90, backend: str = "triton") -> Iterator[Machine]:
    """CPU tensors take the Triton route, and its launches run their compiled code.

    backend "auto": as on a GPU, the Triton route unless a reason speaks against it. A kernel that fails fails the test.
    """

    def fall_back(error: Exception, device: torch.device) -> None:
        raise error

    able = mock.patch.multiple("fastenc.route", device_reason=lambda x: None, fall_back=fall_back)
    with executing(architecture) as machine, fastenc.backend(backend), able:
        yield machine
