"""EncoderNet3d in plain PyTorch, in both layouts and compiled in every mode, and in all forms that fastenc offers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastenc
import fastenc.route

from ..engine import floor
from ..engine.agreement import OUTPUT
from ..engine.record import Network, Workload
from ..engine.timing import Work
from . import third_party_networks
from .suite import EAGER, FASTENC, Baseline, Runner, Suite, anywhere

LEARNING_RATE = 1e-6  # small, so that training steps do not move the parameters that the baselines share
# The networks that are measured, and the spatial shape of their inputs. Example 1 is
# EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3).
DEPTHS = {
    "example1": (3, 3, 3, 3, 3), "encnet12": (2, 2, 2, 2, 2), "encnet15": (2, 2, 3, 3, 3), "encnet17": (3, 3, 3, 3, 3),
    "encnet22": (4, 4, 4, 4, 4),
}  # fmt: skip
NETWORKS = {name: (Network(64, depths, 3, 32), (31, 32, 30)) for name, depths in DEPTHS.items()}
NETWORKS["volume128"] = (Network(32, (2, 2, 2, 2, 2), 1, 2), (128, 128, 128))
COMPILED = "_orig_mod."  # the prefix that torch.compile adds to parameter names


def plain_encoder(network: Network) -> nn.Sequential:
    """EncoderNet3d as nested nn.Sequential, with the same parameters, names and initialization."""

    def convolution(
        wide_in: int, wide_out: int, kernel: tuple[int, ...], stride: int = 1, bias: bool = False
    ) -> nn.Module:
        steps = tuple(stride if k > 1 else 1 for k in kernel)
        padding = tuple(k // 2 if k > 1 else 0 for k in kernel)
        return nn.Conv3d(wide_in, wide_out, kernel, steps, padding, bias=bias)  # type: ignore[arg-type]

    def layer(wide_in: int, wide_out: int, stride: int) -> nn.Sequential:
        pair = nn.InstanceNorm3d(wide_in, affine=True), nn.PReLU(wide_in)
        last = convolution(wide_in, wide_out, network.kernel_size, stride)
        return nn.Sequential(OrderedDict(mconv=nn.Sequential(*pair, last)))

    stem = tuple(k + 2 if k > 1 else 1 for k in network.kernel_size)
    body = [convolution(network.in_planes, network.channel, stem)]
    wide = network.channel
    for i, depth in enumerate(network.layers):
        widths = [wide] + [network.channel * 2**i] * depth
        strides = [1] * (depth - 1) + [2]
        *stack, scale = map(layer, widths[:-1], widths[1:], strides)
        body.append(nn.Sequential(OrderedDict(conv_list=nn.Sequential(*stack), conv_scale=scale)))
        wide = widths[-1]
    body.append(convolution(wide, wide, network.kernel_size, bias=True))
    if network.out_length <= 0:
        return nn.Sequential(OrderedDict(netbody=nn.Sequential(*body)))
    body.append(nn.AdaptiveAvgPool3d(1))
    fc = nn.Linear(wide, network.out_length)
    return nn.Sequential(OrderedDict(netbody=nn.Sequential(*body), flatten=nn.Flatten(1), fc=fc))


def fused_encoder(network: Network, **options: Any) -> nn.Module:
    """fastenc's EncoderNet3d with these arguments."""
    return fastenc.EncoderNet3d(**dataclasses.asdict(network), **options)


def plain_network(workload: Workload) -> nn.Module:
    """What the workload runs, in plain PyTorch: EncoderNet3d, its stem alone, or an unchanged third-party model."""
    if workload.client is not None:
        return third_party_networks.build(workload.client)
    assert workload.network is not None
    network = plain_encoder(workload.network)
    return network if workload.kind == "network" else next(network[0].children())


def without_data(workload: Workload) -> nn.Module | None:
    """`plain_network` on the meta device. None for an operation, and if the third-party model's package is missing."""
    client = workload.client
    if workload.network is None and (client is None or third_party_networks.missing(client) is not None):
        return None
    with torch.device("meta"):
        return plain_network(workload)


def norms(network: Network, size: Sequence[int]) -> list[tuple[int, ...]]:
    """(channels, *spatial) for every InstanceNorm of EncoderNet3d on an input with spatial shape `size`, in order."""
    with torch.device("meta"):
        layers = floor.layers(plain_encoder(network), (1, network.in_planes, *size))
    return [tuple(x.shape[1:]) for layer, x, _ in layers if isinstance(layer, nn.InstanceNorm3d)]


def cost(workload: Workload) -> floor.Cost | None:
    """The least operations and bytes that `workload` needs, or None if the third-party model's package is missing."""
    network = without_data(workload)
    return None if network is None else floor.network_cost(workload, network)


class Inputs:
    """What all baselines of one workload share: parameters, x, the gradient of the output, and the optimizer.

    No norm parameter is 1 or 0, because a wrong formula could go unnoticed there. Slopes are near 1, so that gradients
    change little if rounding moves a PReLU input across 0.

    Attributes:
        x: (N, in_planes, *spatial), float32, contiguous.
        dy: the gradient of the output, float32, contiguous; of a stem channels-last, as the next layer returns it.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.device = workload, device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(0)
            network = self.plain()
            for module in network.modules():
                if isinstance(module, nn.InstanceNorm3d) and module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
                elif isinstance(module, nn.PReLU):
                    nn.init.uniform_(module.weight, 0.6, 1.2)
        self.parameters = dict(network.state_dict(keep_vars=True))
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(workload.shape, generator=generator).to(device)
        with torch.device("meta"):
            y = self.plain()(torch.empty(workload.shape))
        self.dy = torch.randn(y.shape, generator=generator).to(device)
        if workload.kind == "stem":
            self.dy = as_channels_last(self.dy)

    def plain(self) -> nn.Module:
        """The network in plain PyTorch, with its own parameters."""
        return plain_network(self.workload)

    @cached_property
    def channels_last(self) -> dict[str, nn.Parameter]:
        """A copy of `parameters` in channels_last_3d. A parameter with two names is copied once."""
        copies = {
            p: nn.Parameter(as_channels_last(p.detach()).clone(memory_format=torch.preserve_format))
            for p in self.parameters.values()
        }
        return {name: copies[p] for name, p in self.parameters.items()}

    @cached_property
    def adamw(self) -> torch.optim.Optimizer:
        """The optimizer for `parameters`."""
        return torch.optim.AdamW(dict.fromkeys(self.parameters.values()), LEARNING_RATE, fused=True)

    @cached_property
    def adamw_channels_last(self) -> torch.optim.Optimizer:
        """The optimizer for `channels_last`."""
        return torch.optim.AdamW(dict.fromkeys(self.channels_last.values()), LEARNING_RATE, fused=True)

    def holding(self, build: Callable[[], nn.Module], parameters: dict[str, nn.Parameter]) -> nn.Module:
        """The network that `build` makes, with `parameters` themselves instead of its own."""
        with torch.device("meta"):
            network = build()
        network.load_state_dict(parameters, assign=True)
        return network

    def autocast(self) -> torch.autocast:
        """The autocast context of the workload's precision."""
        dtype = getattr(torch, self.workload.dtype)
        return torch.autocast(self.device.type, dtype, enabled=self.workload.precision.endswith(" autocast"))


def as_channels_last(tensor: Tensor) -> Tensor:
    """A 5-D tensor in channels_last_3d; any other tensor unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor


def runner(
    inputs: Inputs,
    network: nn.Module,
    channels_last: bool = False,
    exact: bool = False,
    queued: bool = False,
    begin: Callable[[], None] = lambda: None,
    note: Callable[[nn.Module, Tensor], str] = lambda network, x: "",
) -> Runner:
    """A runner of a network: forward under no_grad, forward and backward, or both and an AdamW step.

    Args:
        inputs: the workload's inputs.
        network: called with x.
        channels_last: convert x and the gradient of the output to channels_last_3d.
        exact: run without autocast and without the optimizer.
        queued: time the device alone; see `Work`.
        begin: called before each forward.
        note: describes the network's run on x.
    """
    mode = inputs.workload.mode
    x, dy = (as_channels_last(tensor) if channels_last else tensor for tensor in (inputs.x, inputs.dy))
    autocast = torch.autocast(inputs.device.type, enabled=False) if exact else inputs.autocast()
    optimizer = None
    if mode == "training step" and not exact:
        optimizer = inputs.adamw_channels_last if channels_last else inputs.adamw

    def forward() -> Tensor:
        begin()
        with torch.no_grad(), autocast:
            return network(x)

    def forward_backward() -> Tensor:
        begin()
        with autocast:
            y = network(x)
        y.backward(dy.to(y.dtype))
        return y.detach()

    def step() -> None:
        forward_backward()
        if optimizer is not None:
            optimizer.step()
        network.zero_grad(set_to_none=True)

    def numbers() -> dict[str, Tensor]:
        if mode == "forward":
            return {OUTPUT: forward().clone()}  # a CUDA graph overwrites its output at the next replay
        y = forward_backward().clone()
        named = ((name.removeprefix(COMPILED), p.grad) for name, p in network.named_parameters())
        gradients = {name: gradient for name, gradient in named if gradient is not None}
        network.zero_grad(set_to_none=True)
        return {OUTPUT: y, **gradients}

    def held() -> Iterator[Tensor]:
        states = [] if optimizer is None else [state.values() for state in optimizer.state.values()]
        moments = (moment for moment in itertools.chain(*states) if isinstance(moment, Tensor))
        return itertools.chain([x], network.parameters(), moments)

    def described() -> str:
        with torch.set_grad_enabled(mode != "forward"), autocast:
            return note(network, x)

    return Runner(numbers, Work(forward if mode == "forward" else step, queued=queued), held, described)


# ------------------------------------------------------------------------------------------------- plain PyTorch


def eager(inputs: Inputs, channels_last: bool = False, exact: bool = False) -> Runner:
    """Plain PyTorch."""
    network = inputs.holding(inputs.plain, inputs.channels_last if channels_last else inputs.parameters)
    return runner(inputs, network, channels_last, exact)


def compiled(inputs: Inputs, channels_last: bool = False, mode: str = "default") -> Runner:
    """Plain PyTorch under torch.compile with this `mode`."""
    network = inputs.holding(inputs.plain, inputs.channels_last if channels_last else inputs.parameters)
    begin = torch.compiler.cudagraph_mark_step_begin if mode != "default" else lambda: None
    faster = cast(nn.Module, torch.compile(network, dynamic=False, mode=mode))
    return runner(inputs, faster, channels_last, begin=begin)


def _cuda_only(reason: str) -> Callable[[Workload, torch.device], str | None]:
    """`Baseline.absent` of a baseline that is the same as torch.compile on a CPU."""
    return lambda workload, device: None if device.type == "cuda" else f"on a CPU this is torch.compile: {reason}"


_mode_needs_cuda = _cuda_only("what the mode adds for convolutions needs a CUDA GPU")
layout_needs_cuda = _cuda_only("oneDNN chooses the layout of a convolution's tensors itself")


def _compiled_baselines() -> Iterator[tuple[str, Baseline]]:
    """torch.compile in every mode and both layouts, because Inductor does not change the layout of a 3-D network."""
    for mode in ("default", "reduce-overhead", "max-autotune"):  # the slowest to compile comes last: time may run out
        for layout in ("", " channels_last_3d"):
            name = f"torch.compile{'' if mode == 'default' else f' {mode}'}{layout}"
            absent = _mode_needs_cuda if mode != "default" else layout_needs_cuda if layout else anywhere
            make = partial(compiled, channels_last=bool(layout), mode=mode)
            yield name, Baseline(make, compiles=True, absent=absent, graphs=mode != "default")


# ------------------------------------------------------------------------------------------------------ fastenc


def routes(network: nn.Module, x: Tensor) -> str:
    """The number of layers on each route, such as "15 layers eager (the reason)"."""
    rows = fastenc.explain(network, x)
    taken = Counter(row.route if row.reason is None else f"{row.route} ({row.reason})" for row in rows)
    return "; ".join(f"{count} layers {route}" for route, count in taken.items())


def _fused(inputs: Inputs, recompute: bool = False) -> nn.Module:
    network = inputs.workload.network
    assert network is not None
    return inputs.holding(partial(fused_encoder, network, recompute=recompute), inputs.parameters)


def _fastenc(inputs: Inputs, recompute: bool = False) -> Runner:
    return runner(inputs, _fused(inputs, recompute), note=routes)


def _fastenc_compiled(inputs: Inputs) -> Runner:
    return runner(inputs, cast(nn.Module, torch.compile(_fused(inputs), dynamic=False)))


def _inference(inputs: Inputs, call: Callable[[Tensor], Tensor], held: Callable[[], list[Tensor]]) -> Runner:
    """A runner of a frozen or graphed network, which applies autocast and no_grad itself."""

    def forward() -> Tensor:
        return call(inputs.x)

    return Runner(lambda: {OUTPUT: forward()}, Work(forward), held)


def _dtype(inputs: Inputs) -> torch.dtype | None:
    return None if inputs.workload.precision == "float32" else getattr(torch, inputs.workload.dtype)


def _frozen(inputs: Inputs) -> Runner:
    network = _fused(inputs).eval()
    frozen = fastenc.freeze(network, _dtype(inputs))

    def held() -> list[Tensor]:
        copied = frozen._copy
        cuts = (cut for module in copied.modules() for cut in module.__dict__.get("cuts", {}).values())
        return [inputs.x, *network.parameters(), *copied.parameters(), *cuts]

    return _inference(inputs, frozen, held)


def _graphed(inputs: Inputs) -> Runner:
    network = _fused(inputs).eval()
    graphed = fastenc.graphed(network, inputs.x, _dtype(inputs))
    # The graph's own memory was reserved when it was made. It is counted because of `Baseline.graphs`.
    return _inference(inputs, graphed, lambda: [inputs.x, *network.parameters()])


def _not_frozen(workload: Workload, device: torch.device) -> str | None:
    return None if workload.mode == "forward" else "frozen weights are for inference only"


def _not_graphed(workload: Workload, device: torch.device) -> str | None:
    return "a CUDA graph needs a CUDA GPU" if device.type != "cuda" else _not_frozen(workload, device)


def _no_recompute(workload: Workload, device: torch.device) -> str | None:
    if workload.mode == "forward":
        return "it changes what training saves; inference is the same without it"
    reason = fastenc.route.device_reason(torch.empty(0, device=device))
    return None if reason is None else f"on the eager route it has no effect; {reason}"


SUITE = Suite(
    inputs=Inputs,
    baselines={
        EAGER: Baseline(eager),
        "eager channels_last_3d": Baseline(partial(eager, channels_last=True)),
        FASTENC: Baseline(_fastenc),
        "fastenc recompute": Baseline(partial(_fastenc, recompute=True), absent=_no_recompute),
        "fastenc frozen": Baseline(_frozen, absent=_not_frozen),
        "fastenc graphed": Baseline(_graphed, absent=_not_graphed, graphs=True),
        "fastenc torch.compile": Baseline(_fastenc_compiled, compiles=True),
        **dict(_compiled_baselines()),
    },
    exact=partial(eager, exact=True),
    cost=cost,
)
