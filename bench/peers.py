"""The peers: what a user could run instead of fastenc, and fastenc, each as one candidate for one workload."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastenc
import fastenc.route

from .agreement import OUTPUT
from .record import Network, Workload
from .timing import Work

EPS = 1e-5
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU: inputs that rotate over this much come from memory
MEMORY_FORMAT = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@dataclass(frozen=True)
class Candidate:
    """One peer, ready to run one workload.

    `numbers()` runs it once and gives the output and, where the mode has a backward, every gradient by name.
    `standing` is the bytes of its parameters and one call's inputs. `note()`, asked after the first call, is what a
    reader of the result should know: fastenc's route, for one, which a machine's fault may have changed in that call.
    """

    numbers: Callable[[], dict[str, Tensor]]
    work: Work
    standing: int
    note: Callable[[], str]


@dataclass(frozen=True)
class Peer:
    """How a candidate is made, and whether its first call compiles for tens of seconds."""

    make: Callable[[Workload, torch.device], Candidate]
    compiles: bool = False


# ------------------------------------------------------------------------------------------------ networks


def plain_encoder(network: Network) -> nn.Sequential:
    """EncoderNet3d with kernel size 3 as nested nn.Sequential: the same parameters under the same names."""

    def unit(wide_in: int, wide_out: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv3d(wide_in, wide_out, 3, stride, padding=1, bias=False)
        mconv = nn.Sequential(nn.InstanceNorm3d(wide_in, affine=True), nn.PReLU(wide_in), convolution)
        return nn.Sequential(OrderedDict(mconv=mconv))

    body: list[nn.Module] = [nn.Conv3d(network.in_planes, network.channel, 5, padding=2, bias=False)]
    wide = network.channel
    for i, depth in enumerate(network.layers):
        widths = [wide] + [network.channel * 2**i] * depth
        strides = [1] * (depth - 1) + [2]
        *stack, scale = map(unit, widths[:-1], widths[1:], strides)
        body.append(nn.Sequential(OrderedDict(conv_list=nn.Sequential(*stack), conv_scale=scale)))
        wide = widths[-1]
    body += [nn.Conv3d(wide, wide, 3, padding=1), nn.AdaptiveAvgPool3d(1)]
    fc = nn.Linear(wide, network.out_length)
    return nn.Sequential(OrderedDict(netbody=nn.Sequential(*body), flatten=nn.Flatten(1), fc=fc))


def _arguments(workload: Workload) -> Network:
    if workload.network is None:
        raise ValueError(f"workload: got {workload} without a network; its arguments are needed")
    return workload.network


def _plain(workload: Workload, device: torch.device) -> nn.Module:
    """The plain network, with the same parameters every time, none of them 1 or 0, where a wrong formula could hide.

    Slopes are near 1, so that a PReLU input that rounding moves across 0 moves the gradients little.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        network = plain_encoder(_arguments(workload))
        for module in network.modules():
            if isinstance(module, nn.InstanceNorm3d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, 0.6, 1.2)
    return network


def _channels_last(workload: Workload, device: torch.device) -> nn.Module:
    return _plain(workload, device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def _compiled(workload: Workload, device: torch.device) -> nn.Module:
    return cast(nn.Module, torch.compile(_plain(workload, device), dynamic=False))


def _fastenc(workload: Workload, device: torch.device) -> nn.Module:
    with torch.device(device):
        network = fastenc.EncoderNet3d(**dataclasses.asdict(_arguments(workload)))
    network.load_state_dict(_plain(workload, device).state_dict())
    return network


def _routes(network: nn.Module, x: Tensor) -> str:
    """How many units take which route, and why not the other, in words."""
    rows = fastenc.explain(network, x)
    taken = Counter(row.route if row.reason is None else f"{row.route} ({row.reason})" for row in rows)
    return "; ".join(f"{count} units {route}" for route, count in taken.items())


def _network(
    build: Callable[[Workload, torch.device], nn.Module],
    workload: Workload,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    note: Callable[[nn.Module, Tensor], str] = lambda network, x: "",
) -> Candidate:
    """A network as a candidate: `forward` under no_grad, or one forward and backward without the optimizer."""
    network = build(workload, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(workload.shape, generator=generator).to(device, memory_format=memory_format)
    dy = torch.randn(workload.shape[0], _arguments(workload).out_length, generator=generator).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=workload.precision == "bfloat16 autocast")

    def forward() -> Tensor:
        with torch.no_grad(), autocast:
            return network(x)

    def forward_backward() -> Tensor:
        with autocast:
            y = network(x)
        y.backward(dy.to(y.dtype))
        return y.detach()

    def step() -> None:
        forward_backward()
        network.zero_grad(set_to_none=True)

    def numbers() -> dict[str, Tensor]:
        if workload.mode == "forward":
            return {OUTPUT: forward()}
        y = forward_backward()
        # torch.compile puts a prefix of its own before the names of the network it wraps
        gradients = {k.removeprefix("_orig_mod."): p.grad for k, p in network.named_parameters() if p.grad is not None}
        network.zero_grad(set_to_none=True)
        return {OUTPUT: y, **gradients}

    def described() -> str:
        with torch.set_grad_enabled(workload.mode != "forward"), autocast:
            return note(network, x)

    standing = sum(t.numel() * t.element_size() for t in [x, *network.parameters()])
    return Candidate(numbers, Work(forward if workload.mode == "forward" else step), standing, described)


NETWORK_PEERS = {
    "eager": Peer(lambda workload, device: _network(_plain, workload, device)),
    "eager channels_last_3d": Peer(
        lambda workload, device: _network(_channels_last, workload, device, torch.channels_last_3d)
    ),
    "fastenc": Peer(lambda workload, device: _network(_fastenc, workload, device, note=_routes)),
    "torch.compile": Peer(lambda workload, device: _network(_compiled, workload, device), compiles=True),
}

# ------------------------------------------------------------------------------------- instance_norm_prelu


Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    """InstanceNorm and PReLU, the PyTorch lines that fastenc replaces."""
    return F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=EPS), slope)


def _fused_op(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    return fastenc.instance_norm_prelu(x, weight, bias, slope, EPS)


def _op_route(x: Tensor) -> str:
    reason = fastenc.route.reason(x)
    return "triton" if reason is None else f"eager ({reason})"


def _op(
    op: Op,
    workload: Workload,
    device: torch.device,
    exact: bool = False,
    note: Callable[[Tensor], str] = lambda x: "",
) -> Candidate:
    """instance_norm_prelu as a candidate; its inputs rotate, so that the cache holds none of them when it is read."""
    dtype = torch.bfloat16 if workload.precision == "bfloat16" else torch.float32
    memory_format = MEMORY_FORMAT[workload.layout]
    C = workload.shape[1]
    backward = workload.mode == "backward"
    generator = torch.Generator(device).manual_seed(2)

    def random(shape: Sequence[int], at: float, width: float) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).mul_(width).add_(at)
        return values.to(dtype).to(torch.float64 if exact else dtype)

    leaves = [random([C], 1, 0.2), random([C], 0, 0.2), random([C], 0.25, 0.1)]
    x = random(workload.shape, 0.5, 2).contiguous(memory_format=memory_format)
    dy = random(workload.shape, 0, 1).contiguous(memory_format=memory_format)
    standing = x.numel() * x.element_size() * (2 if backward else 1)
    copies = 1 if exact or device.type != "cuda" else 1 + -(-COLD_BYTES // standing)
    sets = itertools.cycle([(x.clone().requires_grad_(backward), dy.clone()) for _ in range(copies)])
    for leaf in leaves:
        leaf.requires_grad_(backward)

    def prepare() -> tuple[Any, ...]:
        x, dy = next(sets)
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

    return Candidate(numbers, Work(gradients if backward else forward, prepare, queued=True), standing, lambda: note(x))


OP_PEERS = {
    "eager": Peer(lambda workload, device: _op(plain_op, workload, device)),
    "fastenc": Peer(lambda workload, device: _op(_fused_op, workload, device, note=_op_route)),
    "torch.compile": Peer(
        lambda workload, device: _op(torch.compile(plain_op, dynamic=False), workload, device), compiles=True
    ),
}


def peers_of(workload: Workload) -> dict[str, Peer]:
    """The peers that a workload is timed with, `eager` first."""
    return NETWORK_PEERS if workload.kind == "network" else OP_PEERS


def exact(workload: Workload, device: torch.device) -> Candidate:
    """Plain PyTorch one precision up, for `agreement`: run it without TF32."""
    if workload.kind == "network":
        return _network(_plain, dataclasses.replace(workload, precision="float32"), device)
    return _op(plain_op, workload, device, exact=True)
