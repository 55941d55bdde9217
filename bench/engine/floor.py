"""The physical floor: what a workload costs where nothing but its arithmetic and its memory traffic takes time.

    floor = Σ over layers of  flops / matrix rate  +  bytes / copy bandwidth

with both rates measured on the machine at hand, in the workload's own dtype. Counted is what no implementation that
runs layer by layer can leave out, e being the bytes of an element:

- A convolution of (N, C, input) to (N, K, output) does 2·N·C·K·pairs flops, pairs being the (position, tap) pairs in
  which the tap meets the input and not padding. It reads its input and its live weights (those that meet input at all)
  and writes its output: e bytes each. In training it does twice as much again, for the gradient in the input and the
  one in the weight, each of which reads two and writes one of the same three tensors, the weight's in float32. The stem
  has no gradient in its input.
- InstanceNorm with PReLU reads and writes its volume, 2 tensors; backward it reads x and dy and writes dx, 3 more. With
  a residual r it reads that too, in both directions, and backward writes dr.
- Fused AdamW reads parameter, gradient and both moments and writes all but the gradient: 7 float32 for each parameter.

Pooling and the fully connected layer are counted alike. A GPU that overlaps arithmetic with traffic perfectly could get
below the sum, to one half at the very least.
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
    """A convolution over `size` spatial positions; `first`: none asks for the gradient in its input."""

    wide_in: int
    wide_out: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    first: bool = False

    def _axes(self) -> Iterator[tuple[int, int, int]]:
        """Of each axis: its outputs, its live taps, and its (output, tap) pairs that meet input."""
        for n, k, stride, padding in zip(self.size, self.kernel, self.stride, self.padding, strict=True):
            outputs = (n + 2 * padding - k) // stride + 1
            met = [sum(0 <= o * stride - padding + t < n for o in range(outputs)) for t in range(k)]
            yield outputs, sum(count > 0 for count in met), sum(met)

    @property
    def output(self) -> tuple[int, ...]:
        """The spatial size after it."""
        return tuple(outputs for outputs, _, _ in self._axes())

    def cost(self, N: int, itemsize: int, training: bool) -> Cost:
        """Forward, and where `training` both gradients."""
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
    """The convolutions of EncoderNet3d on a volume of `size`, in order."""
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
    """(channels, *spatial) of every InstanceNorm of the network, in order."""
    return [(each.wide_in, *each.size) for each in convolutions(network, size)[1:-1]]


def cost(workload: Workload) -> Cost:
    """What `workload` cannot do without; the module's docstring has the formula."""
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
    """How many numbers the network learns."""
    layers = convolutions(network, (1 << 12,) * 3)
    weights = sum(each.wide_in * each.wide_out * prod(each.kernel) for each in layers)
    wide = layers[-1].wide_out
    head = (wide + 1) * network.out_length if network.out_length > 0 else 0
    return weights + wide + sum(3 * each.wide_in for each in layers[1:-1]) + head


def seconds(workload: Workload, machine: Machine) -> float | None:
    """The floor of a workload whose `flops` and `least_bytes` are set; None until the machine's rates are measured."""
    if machine.copy_bandwidth is None or workload.flops is None or workload.least_bytes is None:
        return None
    moving = workload.least_bytes / machine.copy_bandwidth
    if not workload.flops:
        return moving
    rate = machine.matmul_rate(workload.dtype)
    return None if rate is None else workload.flops / rate + moving
