"""The audit's cases: layers of two networks, and awkward shapes. Nothing here needs triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

from ...baselines.encoder import NETWORKS, norms
from ...engine.record import Network

Precision = Literal["float32", "bfloat16"]
ITEMSIZE: dict[Precision, int] = {"float32": 4, "bfloat16": 2}

EXAMPLE_1, BIGGER = NETWORKS["example1"], NETWORKS["volume128"]
# (N, C, S) with a residual: some shapes of every kind. 16384 is the longest contiguous row that is read once.
RESIDUAL = (
    (8, 64, 29760), (8, 128, 512), (8, 1024, 8), (2, 20, 1000), (2, 48, 33**3), (2, 32, 4097), (2, 32, 16384),
)  # fmt: skip
AWKWARD = ((24, 1000), (20, 1000), (3, 1000), (32, 4097), (48, 33**3), (64, 1024), (32, 4096), (32, 32768))


@dataclass(frozen=True)
class Case:
    """One direction of the operation on x (N, C, S), with or without a residual. origin: where such an x occurs."""

    origin: str
    N: int
    C: int
    S: int
    dtype: Precision
    channels_last: bool
    backward: bool
    residual: bool = False

    def __str__(self) -> str:
        what = f"{self.N}×{self.C}×{self.S} {self.dtype} {layout(self.channels_last)} {direction(self.backward)}"
        return f"{what} with a residual" if self.residual else what

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def x_bytes(self) -> int:
        """Bytes of x."""
        return self.N * self.C * self.S * self.itemsize


def layout(channels_last: bool) -> str:
    """The layout's name."""
    return "channels-last" if channels_last else "contiguous"


def direction(backward: bool) -> str:
    """The direction's name."""
    return "backward" if backward else "forward"


def norm_inputs(network: Network, size: Sequence[int]) -> list[tuple[int, int]]:
    """(C, S) of the input of each InstanceNorm of EncoderNet3d, without duplicates. size: of the network's input."""
    return list(dict.fromkeys((C, prod(spatial)) for C, *spatial in norms(network, size)))


def shapes() -> list[tuple[str, int, int, int]]:
    """(origin, N, C, S) of all audited shapes without a residual."""
    return [
        *(("Example 1", N, C, S) for N in (1, 8) for C, S in norm_inputs(*EXAMPLE_1)),
        *(("32 channels, 128³", 2, C, S) for C, S in norm_inputs(*BIGGER)),
        *(("awkward", 2, C, S) for C, S in AWKWARD),
    ]


def residual_shapes() -> list[tuple[str, int, int, int]]:
    """(origin, N, C, S) of all audited shapes with a residual."""
    return [("with a residual", N, C, S) for N, C, S in RESIDUAL]


def cases(shapes: Sequence[tuple[str, int, int, int]], residual: bool = False) -> list[Case]:
    """Each shape in both layouts, both precisions and both directions."""
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    return [
        Case(origin, N, C, S, dtype, channels_last, backward, residual)
        for origin, N, C, S in shapes
        for channels_last, dtype, backward in product((True, False), precisions, (False, True))
    ]
