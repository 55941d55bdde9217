"""The physical floor of a workload: its time if only arithmetic and memory traffic took time.

    floor = Σ over layers of  flops / matrix rate  +  bytes / copy bandwidth

Both rates are measured on this machine, in the workload's dtype. The floor counts only work that every layer-by-layer
implementation must do (e: the bytes of an element):

- A convolution from (N, C, input) to (N, K, output) takes 2·N·C·K·pairs flops. `pairs` is the number of (position, tap)
  pairs in which the tap reads input and not padding. The convolution reads its input and the weights of the taps that
  ever read input, and writes its output, e bytes per element. In training, the gradients of input and weight cost as
  much again each: they read two of these tensors and write the third. The weight's gradient is float32. The stem has no
  gradient of its input.
- InstanceNorm with PReLU reads and writes its tensor in the forward (2 tensors), and in the backward reads x and dy and
  writes dx (3 tensors). A residual r is read in both directions, and the backward writes dr.
- Fused AdamW reads the parameter, its gradient and both moments and writes all but the gradient: 7 float32 for each
  parameter.

Pooling and the fully connected layer are counted in the same way. Other operations are not counted: additions,
concatenations, activations without a norm. A GPU that overlaps arithmetic and traffic perfectly can be faster than the
sum, but at most by a factor of 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from .record import Machine, Workload

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAMW_BYTES = 7 * 4


@dataclass(frozen=True)
class Cost:
    """Operations and bytes."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Convolution:
    """A convolution of an input with spatial shape `size`. first: no gradient of the input is needed."""

    wide_in: int
    wide_out: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    first: bool = False

    def _axes(self) -> Iterator[tuple[int, int, int]]:
        """For each axis: outputs, taps that ever read input, and (output, tap) pairs that read input."""
        for n, k, stride, padding in zip(self.size, self.kernel, self.stride, self.padding, strict=True):
            outputs = (n + 2 * padding - k) // stride + 1
            met = [sum(0 <= o * stride - padding + t < n for o in range(outputs)) for t in range(k)]
            yield outputs, sum(count > 0 for count in met), sum(met)

    def cost(self, N: int, itemsize: int, training: bool) -> Cost:
        """The cost of the forward and, if `training`, of both gradients."""
        outputs, live, pairs = map(prod, zip(*self._axes(), strict=True))
        planes = self.wide_in * self.wide_out
        flops, w = 2 * N * planes * pairs, planes * live
        x, y = N * self.wide_in * prod(self.size), N * self.wide_out * outputs
        total = Cost(flops, (x + y + w) * itemsize)
        if training:
            total += Cost(flops, (x + y) * itemsize + w * 4)
            if not self.first:
                total += Cost(flops, (x + y + w) * itemsize)
        return total


def layers(network: nn.Module, shape: Sequence[int]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """The layers of a network on the meta device, each with its input and output, as it runs on x of `shape`."""
    found: list[tuple[nn.Module, Tensor, Tensor]] = []
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, y: found.append((layer, inputs[0], y)))
    network(torch.empty(shape, device="meta"))
    return found


def operation_cost(workload: Workload) -> Cost:
    """The least bytes that the operation needs; see the module's docstring."""
    tensors = {"forward": 2, "backward": 3}[workload.mode]
    if workload.kind == "instance_norm_add_prelu":
        tensors += {"forward": 1, "backward": 2}[workload.mode]
    return Cost(0, tensors * prod(workload.shape) * ITEMSIZE[workload.dtype])


def network_cost(workload: Workload, network: nn.Module) -> Cost:
    """The least operations and bytes that `workload` needs; see the module's docstring.

    network: what the workload runs, in plain PyTorch and on the meta device.
    """
    N, itemsize, training = workload.shape[0], ITEMSIZE[workload.dtype], workload.mode != "forward"
    total = Cost()
    for layer, x, y in layers(network, workload.shape):
        if isinstance(layer, nn.InstanceNorm3d):
            total += Cost(0, (5 if training else 2) * x.numel() * itemsize)
        elif isinstance(layer, nn.AdaptiveAvgPool3d):
            total += Cost(0, (2 if training else 1) * x.numel() * itemsize)
        elif isinstance(layer, nn.Linear):
            elements = (3 if training else 1) * layer.weight.numel()
            total += Cost(2 * N * elements, elements * itemsize)
        elif isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            first, padding = not x.requires_grad, cast(tuple[int, ...], layer.padding)
            # A transposed convolution costs as much as the convolution from its output to its input.
            x, y = (y, x) if layer.transposed else (x, y)
            size, wide_in, wide_out = tuple(x.shape[2:]), x.shape[1], y.shape[1]
            counted = Convolution(wide_in, wide_out, size, layer.kernel_size, layer.stride, padding, first)
            total += counted.cost(N, itemsize, training)
    if workload.mode == "training step":
        total += Cost(0, ADAMW_BYTES * sum(parameter.numel() for parameter in network.parameters()))
    return total


def seconds(workload: Workload, machine: Machine) -> float | None:
    """The floor of a workload with `flops` and `least_bytes`; None if the machine's rates are not measured."""
    if machine.copy_bandwidth is None or workload.flops is None or workload.least_bytes is None:
        return None
    moving = workload.least_bytes / machine.copy_bandwidth
    if not workload.flops:
        return moving
    rate = machine.matmul_rate(workload.dtype)
    return None if rate is None else workload.flops / rate + moving
