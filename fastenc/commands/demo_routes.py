"""The routes that the demo compares, and what it does with each: encoding and training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastenc

from .. import route as routes
from ..bench.baselines.encoder import plain_encoder
from ..bench.engine.agreement import GRADIENT_FLOOR, OUTPUT_FLOOR, distance, distances
from ..bench.engine.memory import peak_bytes
from ..bench.engine.record import Network
from ..bench.engine.timing import Work, sample

LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 3, 50, 5.0  # timed calls of each route
LEARNING_RATE = 5e-3

# All routes have the same tolerance: they round the same float32 formula in a different order.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = OUTPUT_FLOOR, GRADIENT_FLOOR
WHY = (
    f"Two float32 networks differ by the rounding of both. The output of one differs from float64 by up to 1e-6, in "
    f"channels_last_3d by up to 5e-6, so {OUTPUT_TOLERANCE:g} allows twice that. Gradients of single parameters are "
    f"sums that cancel, and they change if rounding moves a PReLU input across zero. They differ from float64 by up to "
    f"6e-3, so {GRADIENT_TOLERANCE:g} is allowed. A missing term causes a difference of at least 0.1. All figures are "
    f"relative L2 distances, one for each patch's output and each gradient; the largest counts."
)


@dataclass(frozen=True)
class Route:
    """One way to run the network. backend: fastenc's backend; None for plain PyTorch."""

    name: str
    backend: routes.Backend | None
    memory_format: torch.memory_format = torch.contiguous_format

    def network(self, arguments: dict[str, Any], seed: int) -> nn.Module:
        """The network as this route's user makes it, initialized after torch.manual_seed(seed)."""
        torch.manual_seed(seed)
        return self.build(arguments)

    def build(self, arguments: dict[str, Any]) -> nn.Module:
        """A network with these arguments of EncoderNet3d."""
        return plain_encoder(Network(**arguments)) if self.backend is None else fastenc.EncoderNet3d(**arguments)

    def place(self, tensors: Any, device: torch.device) -> Any:
        """A network or a tensor, moved to the device and to this route's memory format."""
        return tensors.to(device).to(memory_format=self.memory_format)

    def call(self, network: nn.Module, x: Tensor) -> Tensor:
        """network(x) on this route."""
        with fastenc.backend(self.backend or "eager"):
            return network(x)


def available(device: torch.device) -> tuple[list[Route], dict[str, str]]:
    """The routes that `device` has, plain PyTorch first, and the reason for each route that it lacks."""
    plain, eager = Route("plain PyTorch", None), Route("fastenc, eager", "eager")
    if device.type == "cpu":
        return [plain, eager], {}
    channels_last = Route("plain PyTorch, channels_last_3d", None, torch.channels_last_3d)
    triton = Route("fastenc, Triton", "triton")
    reason = routes.device_reason(torch.empty(0, device=device))
    if reason is None:
        return [plain, channels_last, eager, triton], {}
    return [plain, channels_last, eager], {triton.name: reason}


@dataclass(frozen=True)
class Row:
    """One route in the table.

    milliseconds: the median time of a forward of the whole batch.
    peak_bytes: the peak that this forward allocates, without parameters and input.
    difference: the largest relative L2 distance from plain PyTorch; see `WHY`.
    agrees: None if the machine lacks the route, False if it failed or differs.
    note: the reason.
    """

    route: str
    milliseconds: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    agrees: bool | None = None
    note: str = ""


def encode(
    available: Sequence[Route],
    arguments: dict[str, Any],
    x: Tensor,
    device: torch.device,
    seed: int,
    on_call: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Encode x (N, in_planes, 31, 32, 30) by each route, with the same parameters.

    The first route is the one that the others are compared with. on_call gets a route's name before each of its calls.
    """
    torch.manual_seed(seed)
    parameters = fastenc.EncoderNet3d(**arguments).to(device).state_dict()
    calls: dict[str, Callable[[], Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    failed: list[Row] = []
    for route in available:
        with torch.device("meta"):
            network = route.build(arguments)
        network.load_state_dict(parameters, assign=True)
        run = torch.no_grad()(partial(route.call, route.place(network, device), route.place(x, device)))
        on_call(route.name)
        try:
            outputs[route.name] = run()
        except Exception as error:  # an error of one route becomes its row of the table, and the others still run
            if route is available[0]:
                raise
            failed.append(_failed(route.name, error))
        else:
            calls[route.name] = run
    expected = outputs[available[0].name]
    seconds = _take_turns(calls, device, on_call)
    rows = []
    for (name, call), samples in zip(calls.items(), seconds, strict=True):
        difference = max(map(distance, outputs[name], expected))
        agrees = difference <= OUTPUT_TOLERANCE
        rows.append(Row(name, 1e3 * median(samples), peak_bytes(call, device), difference, agrees))
    return rows + failed


def _failed(name: str, error: Exception) -> Row:
    return Row(name, agrees=False, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _take_turns(
    calls: Mapping[str, Callable[[], Tensor]], device: torch.device, on_call: Callable[[str], None]
) -> list[list[float]]:
    """Seconds of each call. Calls alternate, so that other work on the machine disturbs all of them alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > ENOUGH_SECONDS:
            break
        for (name, call), samples in zip(calls.items(), seconds, strict=True):
            on_call(name)
            samples.append(sample(Work(call), 1, device))
    return seconds


def executed(patches: Tensor, seed: int) -> Row:
    """Compare a tiny network on the Triton route, its kernels' compiled code executed on the CPU, with plain PyTorch.

    patches: (N, C, D, H, W), small. The output and the gradients of the input and of all parameters are compared.
    """
    name = "fastenc, Triton compiled for sm_90, executed on this CPU"
    if not routes.has_triton():
        return Row(name, note="did not run: triton is not installed")
    from ..bench.proofs.ptx import executing

    arguments = {"channel": 4, "layers": [2, 1], "in_planes": patches.shape[1], "out_length": 2}
    plain, triton = Route("", None), Route(name, "triton")
    expected = _output_and_gradients(plain, plain.network(arguments, seed), patches)
    try:
        with executing(90) as machine, mock.patch.object(routes, "device_reason", return_value=None):
            found = _output_and_gradients(triton, triton.network(arguments, seed), patches)
    except Exception as error:  # the other routes are still reported
        return _failed(name, error)
    apart = distances(found, expected)
    output = apart.pop("output")
    gradient = max(apart, key=lambda key: apart[key])
    agrees = bool(machine.launches) and output <= OUTPUT_TOLERANCE and apart[gradient] <= GRADIENT_TOLERANCE
    note = (
        f"tiny network, forward and backward, {len(machine.launches)} launches without a race or an access out of "
        f"bounds: output {output:.1e}, "
        f"gradients up to {apart[gradient]:.1e} ({gradient})"
    )
    return Row(name, difference=max(output, apart[gradient]), agrees=agrees, note=note)


def _output_and_gradients(route: Route, network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = route.call(network, x)
    y.square().sum().backward()
    leaves = {"x": x, **dict(network.named_parameters())}
    return {"output": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@dataclass(frozen=True)
class Learned:
    """The result of training by one route.

    loss: the mean squared error of each step, over the variance of the training targets.
    predicted: (count, targets), the network's predictions of the held-out targets.
    r2: the explained share of the variance of each held-out target.
    """

    route: str
    seconds: float
    loss: list[float]
    predicted: Tensor
    r2: list[float]


def train(
    route: Route,
    arguments: dict[str, Any],
    training: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Learned:
    """Train a network on one route. Every route gets the same initialization and the same batches.

    training, held_out: inputs (count, in_planes, 31, 32, 30) and targets (count, targets).
    on_step gets the number of each step, from 1, and its loss.
    """
    network = route.place(route.network(arguments, seed), device)
    inputs, targets = training
    mean, std = targets.mean(0), targets.std(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    loss_of_step: list[float] = []
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(inputs), (batch,), generator=order)
        x, target = route.place(inputs[chosen], device), (targets[chosen] - mean) / std
        loss = F.mse_loss(route.call(network, x), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_of_step.append(loss.item())
        on_step(step, loss_of_step[-1])
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        parts = [route.call(network, route.place(part, device)).cpu() for part in held_out[0].split(batch)]
    predicted = torch.cat(parts) * std + mean
    return Learned(route.name, seconds, loss_of_step, predicted, r2(predicted, held_out[1]))


def r2(predicted: Tensor, true: Tensor) -> list[float]:
    """1 − Σ(true − predicted)² / Σ(true − mean)² of each column."""
    return (1 - (true - predicted).square().sum(0) / (true - true.mean(0)).square().sum(0)).tolist()
