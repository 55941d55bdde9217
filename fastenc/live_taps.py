"""The plan of a convolution: which taps of its kernel meet more than padding, and what pays. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

MEASURED = frozenset(("cpu", "cuda"))  # other devices run the ordinary convolution
# A product pays on maps of at most this many positions. cuDNN and oneDNN are optimised for more.
MOST_POSITIONS = 8
# On a CPU a product pays if the weight has at least this many elements, because oneDNN converts the whole weight in
# each call: for maps of one position, and otherwise for the forward and the backward. Measured on single layers of 8 to
# 1024 channels, on two cores of an AMD EPYC at batch 2, 8 and 32 (no record); bench/suites/bench_live_taps.py repeats
# it.
CPU_ONE_POSITION = 1 << 16
CPU_FORWARD, CPU_BACKWARD = 1 << 23, 1 << 20
# Cutting a contiguous weight gathers a few elements of each 3³ kernel. On a CPU that is cheaper up to this many taps.
# Beyond, the whole weight is read and the columns hold zeros for the padding-only taps.
CPU_CUT_TAPS = 1


@dataclass(frozen=True, slots=True)
class Window:
    """The taps [low, high) of each axis, and the padding on either side with which they fit the tensor.

    `padding` is (before, after) for each axis. It is negative if the stride leaves out positions at the end.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The window's part of a weight (out, in, *kernel)."""
        return (slice(None), slice(None), *map(slice, self.low, self.high))

    @property
    def taps(self) -> int:
        return prod(high - low for low, high in zip(self.low, self.high, strict=True))


def window_of(size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
              whole: bool = False) -> Window | None:  # fmt: skip
    """The smallest window with every tap that meets a tensor of `size`, or, if `whole`, with all taps.

    None if the convolution has no output. At stride s and padding p, tap k of an axis meets position o·s − p + k.
    """
    low, high, around, output = [], [], [], []
    for length, taps, step, pad in zip(size, kernel, stride, padding, strict=True):
        positions = (length + 2 * pad - taps) // step + 1
        if length < 1 or positions < 1:
            return None
        alive = [k for k in range(taps) if whole or any(0 <= o * step - pad + k < length for o in range(positions))]
        if not alive:
            return None
        first, last = alive[0], alive[-1] + 1
        before = pad - first
        low.append(first)
        high.append(last)
        around.append((before, (positions - 1) * step + last - first - length - before))
        output.append(positions)
    return Window(tuple(low), tuple(high), tuple(around), tuple(output))


@dataclass(frozen=True, slots=True)
class ConvPlan:
    """How one convolution is run: its options, its window of taps, and whether it is a matrix product."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    fused: bool = False  # tensors are channels-last in 2-D and 3-D; otherwise they have x's layout
    window: Window | None = None  # None: all taps
    product_forward: bool = False
    product_backward: bool = False
    cuts: bool = False  # run as a convolution on the window's taps alone

    @property
    def cut_padding(self) -> tuple[int, ...]:
        """The padding of the convolution that takes the window's taps alone."""
        return self.padding if self.window is None else tuple(before for before, _ in self.window.padding)


@lru_cache(maxsize=4096)
def plan_convolution(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    weight_contiguous: bool,
    device: str,
    fused: bool,
    frozen: bool = False,
    mended: bool = False,
) -> ConvPlan | None:
    """The plan of a convolution. None if torch's own call is to be made.

    Args:
        frozen: the cut weight is kept, so that cutting it costs nothing.
        mended: torch's own backward would be wrong.
    """
    size, kernel = x_shape[2:], weight_shape[2:]
    if len(x_shape) != len(weight_shape) or x_shape[0] < 1 or x_shape[1] != groups * weight_shape[1]:
        return None  # torch's own error
    for option in (stride, padding, dilation):
        if type(option) is not tuple or len(option) != len(size) or any(type(value) is not int for value in option):
            return None  # torch takes an int, or one entry for all axes, too
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return None  # torch's own error
    ordinary = ConvPlan(stride, padding, dilation, groups, fused) if fused or mended else None
    live = None
    if groups == 1 and all(d == 1 for d in dilation) and device in MEASURED:
        live = window_of(size, kernel, stride, padding)
    if live is None:
        return ordinary
    positions = prod(live.output)
    dead = live.taps < prod(kernel)
    if positions > MOST_POSITIONS:
        # A cut convolution needs the same padding on both sides. It pays if at least a third of the taps are dead.
        if 3 * live.taps <= 2 * prod(kernel) and all(before == max(after, 0) >= 0 for before, after in live.padding):
            return ConvPlan(stride, padding, dilation, groups, fused, live, cuts=True)
        return ordinary
    if device == "cuda" or (frozen and positions == 1):
        # The cost here is reading the weight. Dead taps are neither read nor cast.
        return ConvPlan(stride, padding, dilation, groups, fused, live, True, True) if dead else ordinary
    elements = prod(weight_shape)
    if positions == 1 and dead:
        if x_shape[0] < 2 or elements < CPU_ONE_POSITION:
            return ordinary
        forward = backward = True
    else:
        forward, backward = elements >= CPU_FORWARD, elements >= CPU_BACKWARD
    if not (forward or backward):
        return ordinary
    cut = not weight_contiguous or live.taps <= CPU_CUT_TAPS
    window = live if cut else window_of(size, kernel, stride, padding, whole=True)
    return ConvPlan(stride, padding, dilation, groups, fused, window, forward, backward)
