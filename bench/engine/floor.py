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

Pooling and the fully connected layer are counted in the same way. A GPU that overlaps arithmetic and traffic perfectly
can be faster than the sum, but at most by a factor of 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from .record import Machine, Network, Workload

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

    @property
    def output(self) -> tuple[int, ...]:
        """The spatial shape of the output."""
        return tuple(outputs for outputs, _, _ in self._axes())

    def cost(self, N: int, itemsize: int, training: bool) -> Cost:
        """The cost of the forward and, if `training`, of both gradients."""
        planes = self.wide_in * self.wide_out
        flops = 2 * N * planes * prod(pairs for _, _, pairs in self._axes())
        x, y = (N * wide * prod(size) for wide, size in ((self.wide_in, self.size), (self.wide_out, self.output)))
        w = planes * prod(live for _, live, _ in self._axes())
        total = Cost(flops, (x + y + w) * itemsize)
        if training:
            total += Cost(flops, (x + y) * itemsize + w * 4)
            if not self.first:
                total += Cost(flops, (x + y + w) * itemsize)
        return total


def convolutions(network: Network, size: Sequence[int]) -> list[Convolution]:
    """The convolutions of EncoderNet3d on an input with spatial shape `size`, in order."""
    kernel = network.kernel_size
    padding, ones = tuple(k // 2 for k in kernel), (1,) * len(kernel)
    wider = tuple(k + 2 if k > 1 else 1 for k in kernel)
    stem = Convolution(
        network.in_planes, network.channel, tuple(size), wider, ones, tuple(k // 2 for k in wider), first=True
    )
    found, wide = [stem], network.channel
    for i, depth in enumerate(network.layers):
        for j in range(depth):
            planes = network.channel << i
            stride = tuple(2 if k > 1 else 1 for k in kernel) if j == depth - 1 else ones
            found.append(Convolution(wide, planes, found[-1].output, kernel, stride, padding))
            wide = planes
    return [*found, Convolution(wide, wide, found[-1].output, kernel, ones, padding)]


def norms(network: Network, size: Sequence[int]) -> list[tuple[int, ...]]:
    """(channels, *spatial) for every InstanceNorm of the network, in order."""
    return [(each.wide_in, *each.size) for each in convolutions(network, size)[1:-1]]


def cost(workload: Workload) -> Cost:
    """The least operations and bytes that `workload` needs; see the module's docstring."""
    N, itemsize = workload.shape[0], ITEMSIZE[workload.dtype]
    if workload.network is None:
        tensors = {"forward": 2, "backward": 3}[workload.mode]
        if workload.kind == "instance_norm_add_prelu":
            tensors += {"forward": 1, "backward": 2}[workload.mode]
        return Cost(0, tensors * prod(workload.shape) * itemsize)
    training = workload.mode != "forward"
    layers = convolutions(workload.network, workload.shape[2:])
    if workload.kind == "stem":
        return layers[0].cost(N, itemsize, training)
    total = sum((each.cost(N, itemsize, training) for each in layers), Cost())
    for shape in norms(workload.network, workload.shape[2:]):
        total += Cost(0, (5 if training else 2) * N * prod(shape) * itemsize)
    wide, out = layers[-1].wide_out, workload.network.out_length
    if out > 0:
        passes = 3 if training else 1
        last = N * wide * prod(layers[-1].output)
        total += Cost(passes * 2 * N * wide * out, (last * (2 if training else 1) + passes * wide * out) * itemsize)
    if workload.mode == "training step":
        total += Cost(0, ADAMW_BYTES * parameters(workload.network))
    return total


def parameters(network: Network) -> int:
    """The number of elements of the network's parameters."""
    layers = convolutions(network, (1 << 12,) * 3)
    weights = sum(each.wide_in * each.wide_out * prod(each.kernel) for each in layers)
    wide = layers[-1].wide_out
    head = (wide + 1) * network.out_length if network.out_length > 0 else 0
    return weights + wide + sum(3 * each.wide_in for each in layers[1:-1]) + head


def seconds(workload: Workload, machine: Machine) -> float | None:
    """The floor of a workload with `flops` and `least_bytes`; None if the machine's rates are not measured."""
    if machine.copy_bandwidth is None or workload.flops is None or workload.least_bytes is None:
        return None
    moving = workload.least_bytes / machine.copy_bandwidth
    if not workload.flops:
        return moving
    rate = machine.matmul_rate(workload.dtype)
    return None if rate is None else workload.flops / rate + moving
