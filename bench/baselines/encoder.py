"""The whole network: plain PyTorch in both layouts, compiled in every mode, and fastenc as it can be run."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastenc
import fastenc.route

from ..engine.agreement import OUTPUT
from ..engine.record import Network, Workload
from ..engine.timing import Work
from .suite import EAGER, FASTENC, Candidate, Contest, Peer, anywhere

LEARNING_RATE = 1e-6  # every step is a whole AdamW step, and the network stays near where all peers began
COMPILED = "_orig_mod."  # what torch.compile puts before the names of the network it wraps


def plain_encoder(network: Network) -> nn.Sequential:
    """EncoderNet3d as nested nn.Sequential: the same parameters under the same names."""

    def convolution(
        wide_in: int, wide_out: int, kernel: tuple[int, ...], stride: int = 1, bias: bool = False
    ) -> nn.Module:
        steps = tuple(stride if k > 1 else 1 for k in kernel)
        padding = tuple(k // 2 if k > 1 else 0 for k in kernel)
        return nn.Conv3d(wide_in, wide_out, kernel, steps, padding, bias=bias)  # type: ignore[arg-type]

    def unit(wide_in: int, wide_out: int, stride: int) -> nn.Sequential:
        pair = nn.InstanceNorm3d(wide_in, affine=True), nn.PReLU(wide_in)
        last = convolution(wide_in, wide_out, network.kernel_size, stride)
        return nn.Sequential(OrderedDict(mconv=nn.Sequential(*pair, last)))

    stem = tuple(k + 2 if k > 1 else 1 for k in network.kernel_size)
    body = [convolution(network.in_planes, network.channel, stem)]
    wide = network.channel
    for i, depth in enumerate(network.layers):
        widths = [wide] + [network.channel * 2**i] * depth
        strides = [1] * (depth - 1) + [2]
        *stack, scale = map(unit, widths[:-1], widths[1:], strides)
        body.append(nn.Sequential(OrderedDict(conv_list=nn.Sequential(*stack), conv_scale=scale)))
        wide = widths[-1]
    body.append(convolution(wide, wide, network.kernel_size, bias=True))
    if network.out_length <= 0:
        return nn.Sequential(OrderedDict(netbody=nn.Sequential(*body)))
    body.append(nn.AdaptiveAvgPool3d(1))
    fc = nn.Linear(wide, network.out_length)
    return nn.Sequential(OrderedDict(netbody=nn.Sequential(*body), flatten=nn.Flatten(1), fc=fc))


def fused_encoder(network: Network, **options: Any) -> nn.Module:
    """fastenc's EncoderNet3d of these arguments."""
    return fastenc.EncoderNet3d(**dataclasses.asdict(network), **options)


class Subject:
    """What all peers of one workload share: parameters, input, the gradient of the output, and the optimizer.

    Parameters are drawn from one seed, none of them 1 or 0, where a wrong formula could hide. Slopes are near 1, so
    that a PReLU input that rounding moves across 0 moves the gradients little. x (N, in_planes, *spatial) and dy of the
    output's shape, float32, contiguous.

    Raises ValueError for a workload without a network.
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

    @property
    def network(self) -> Network:
        """The arguments of EncoderNet3d."""
        if self.workload.network is None:
            raise ValueError(f"workload: got {self.workload} without a network; its arguments are needed")
        return self.workload.network

    def plain(self) -> nn.Module:
        """The network in plain PyTorch, with parameters of its own."""
        return plain_encoder(self.network)

    @cached_property
    def channels_last(self) -> dict[str, nn.Parameter]:
        """Parameters of their own in channels_last_3d; what goes by two names stays one."""
        copies = {
            p: nn.Parameter(_laid_out(p.detach()).clone(memory_format=torch.preserve_format))
            for p in self.parameters.values()
        }
        return {name: copies[p] for name, p in self.parameters.items()}

    @cached_property
    def adamw(self) -> torch.optim.Optimizer:
        """The optimizer of `parameters`."""
        return torch.optim.AdamW(dict.fromkeys(self.parameters.values()), LEARNING_RATE, fused=True)

    @cached_property
    def adamw_channels_last(self) -> torch.optim.Optimizer:
        """The optimizer of `channels_last`."""
        return torch.optim.AdamW(dict.fromkeys(self.channels_last.values()), LEARNING_RATE, fused=True)

    def holding(self, build: Callable[[], nn.Module], parameters: dict[str, nn.Parameter]) -> nn.Module:
        """The network that `build` makes, with these very parameters."""
        with torch.device("meta"):
            network = build()
        network.load_state_dict(parameters, assign=True)
        return network

    def autocast(self) -> torch.autocast:
        """Autocast as the workload's precision says."""
        dtype = getattr(torch, self.workload.dtype)
        return torch.autocast(self.device.type, dtype, enabled=self.workload.precision.endswith(" autocast"))


def _laid_out(tensor: Tensor) -> Tensor:
    """A volume in channels_last_3d; anything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor


def candidate(
    subject: Subject,
    network: nn.Module,
    laid_out: bool = False,
    exact: bool = False,
    begin: Callable[[], None] = lambda: None,
    note: Callable[[nn.Module, Tensor], str] = lambda network, x: "",
) -> Candidate:
    """A network as a candidate: `forward` under no_grad, or forward and backward, or these and an AdamW step.

    laid_out: input, parameters and the gradient of a map in channels_last_3d. exact: without autocast. begin: called
    ahead of each forward.
    """
    mode = subject.workload.mode
    x, dy = (_laid_out(tensor) if laid_out else tensor for tensor in (subject.x, subject.dy))
    autocast = torch.autocast(subject.device.type, enabled=False) if exact else subject.autocast()
    optimizer = None
    if mode == "training step" and not exact:
        optimizer = subject.adamw_channels_last if laid_out else subject.adamw

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
            return {OUTPUT: forward().clone()}  # a replayed CUDA graph writes its next output over this one
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

    return Candidate(numbers, Work(forward if mode == "forward" else step), held, described)


# ------------------------------------------------------------------------------------------------- plain PyTorch


def eager(subject: Subject, laid_out: bool = False, exact: bool = False) -> Candidate:
    """Plain PyTorch."""
    network = subject.holding(subject.plain, subject.channels_last if laid_out else subject.parameters)
    return candidate(subject, network, laid_out, exact)


def compiled(subject: Subject, laid_out: bool = False, mode: str = "default") -> Candidate:
    """Plain PyTorch under torch.compile in `mode`."""
    network = subject.holding(subject.plain, subject.channels_last if laid_out else subject.parameters)
    begin = torch.compiler.cudagraph_mark_step_begin if mode != "default" else lambda: None
    faster = cast(nn.Module, torch.compile(network, dynamic=False, mode=mode))
    return candidate(subject, faster, laid_out, begin=begin)


def _mode_needs_cuda(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    return "on a CPU this is torch.compile: what the mode adds for convolutions needs a CUDA GPU"


def layout_needs_cuda(workload: Workload, device: torch.device) -> str | None:
    """Why torch.compile in channels_last_3d is no peer of its own."""
    if device.type == "cuda":
        return None
    return "on a CPU this is torch.compile: oneDNN lays the volumes of a convolution out by itself"


def _compiled_peers() -> Iterator[tuple[str, Peer]]:
    """torch.compile in every mode, the layouts in turn: Inductor keeps a 3-D network in the layout that it is given."""
    for mode in ("default", "reduce-overhead", "max-autotune"):  # the longest to compile last: time may end there
        for layout in ("", " channels_last_3d"):
            name = f"torch.compile{'' if mode == 'default' else f' {mode}'}{layout}"
            absent = _mode_needs_cuda if mode != "default" else layout_needs_cuda if layout else anywhere
            make = partial(compiled, laid_out=bool(layout), mode=mode)
            yield name, Peer(make, compiles=True, absent=absent, graphs=mode != "default")


# ------------------------------------------------------------------------------------------------------ fastenc


def routes(network: nn.Module, x: Tensor) -> str:
    """How many units take which route, and why not the other, in words."""
    rows = fastenc.explain(network, x[:1])
    taken = Counter(row.route if row.reason is None else f"{row.route} ({row.reason})" for row in rows)
    return "; ".join(f"{count} units {route}" for route, count in taken.items())


def _fused(subject: Subject, recompute: bool = False) -> nn.Module:
    return subject.holding(partial(fused_encoder, subject.network, recompute=recompute), subject.parameters)


def _fastenc(subject: Subject, recompute: bool = False) -> Candidate:
    return candidate(subject, _fused(subject, recompute), note=routes)


def _fastenc_compiled(subject: Subject) -> Candidate:
    return candidate(subject, cast(nn.Module, torch.compile(_fused(subject), dynamic=False)))


def _inference(subject: Subject, call: Callable[[Tensor], Tensor], held: Callable[[], list[Tensor]]) -> Candidate:
    """A frozen or graphed network as a candidate: it sees to autocast and to no_grad by itself."""

    def forward() -> Tensor:
        return call(subject.x)

    return Candidate(lambda: {OUTPUT: forward()}, Work(forward), held)


def _dtype(subject: Subject) -> torch.dtype | None:
    return None if subject.workload.precision == "float32" else getattr(torch, subject.workload.dtype)


def _frozen(subject: Subject) -> Candidate:
    network = _fused(subject).eval()
    frozen = fastenc.freeze(network, _dtype(subject))

    def held() -> list[Tensor]:
        copied = frozen._copy
        cuts = (cut for module in copied.modules() for cut in module.__dict__.get("cuts", {}).values())
        return [subject.x, *network.parameters(), *copied.parameters(), *cuts]

    return _inference(subject, frozen, held)


def _graphed(subject: Subject) -> Candidate:
    network = _fused(subject).eval()
    graphed = fastenc.graphed(network, subject.x, _dtype(subject))
    # What it holds besides was reserved while it was made, and `Peer.graphs` has that counted.
    return _inference(subject, graphed, lambda: [subject.x, *network.parameters()])


def _not_frozen(workload: Workload, device: torch.device) -> str | None:
    return None if workload.mode == "forward" else "frozen weights are for inference"


def _not_graphed(workload: Workload, device: torch.device) -> str | None:
    return "a CUDA graph needs a CUDA GPU" if device.type != "cuda" else _not_frozen(workload, device)


def _no_recompute(workload: Workload, device: torch.device) -> str | None:
    if workload.mode == "forward":
        return "it changes what training saves, and nothing of inference"
    reason = fastenc.route.device_reason(torch.empty(0, device=device))
    return None if reason is None else f"on the eager route it has no effect; {reason}"


CONTEST = Contest(
    subject=Subject,
    peers={
        EAGER: Peer(eager),
        "eager channels_last_3d": Peer(partial(eager, laid_out=True)),
        FASTENC: Peer(_fastenc),
        "fastenc recompute": Peer(partial(_fastenc, recompute=True), absent=_no_recompute),
        "fastenc frozen": Peer(_frozen, absent=_not_frozen),
        "fastenc graphed": Peer(_graphed, absent=_not_graphed, graphs=True),
        "fastenc torch.compile": Peer(_fastenc_compiled, compiles=True),
        **dict(_compiled_peers()),
    },
    exact=partial(eager, exact=True),
)
