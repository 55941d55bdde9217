"""nnU-Net's and MONAI's U-Nets at the size that their users train: made, counted, or why they cannot be made here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fastenc.commands import third_party

from ..engine.floor import ADAMW_BYTES, ITEMSIZE, Convolution, Cost
from ..engine.record import Client, Workload

# The channels of nnU-Net's own 3-D plans, and of MONAI's tutorials.
CHANNELS = {
    "nnU-Net PlainConvUNet": (32, 64, 128, 256, 320, 320),
    "MONAI UNet": (16, 32, 64, 128, 256),
    "nnU-Net ResidualEncoderUNet": (32, 64, 128, 256, 320, 320),
}
BLOCKS = (1, 3, 4, 6, 6, 6)  # of nnU-Net's residual encoders, per stage


def client_of(workload: Workload) -> Client:
    """The network of a workload; ValueError where it has none."""
    if workload.client is None:
        raise ValueError(f"workload: got {workload} without a client; somebody else's network is needed")
    return workload.client


def missing(client: Client) -> str | None:
    """Why `client` cannot be made here: its package is not installed."""
    package = "monai" if client.name.startswith("MONAI") else "dynamic-network-architectures"
    installed = importlib.util.find_spec(package.replace("-", "_")) is not None
    return None if installed else f"{package} is not installed: {third_party.INSTALL[package]}"


def build(client: Client) -> nn.Module:
    """The network: x (N, 1, *spatial) to (N, 2, *spatial), every axis halved from stage to stage."""
    channels, stages = client.channels, len(client.channels)
    if client.name == "MONAI UNet":
        return third_party.monai()["UNet"](channels=channels, strides=(2,) * (stages - 1))
    options = {"n_stages": stages, "features_per_stage": channels, "strides": [1] + [2] * (stages - 1)}
    if client.name == "nnU-Net ResidualEncoderUNet":
        options |= {"n_blocks_per_stage": BLOCKS[:stages], "n_conv_per_stage_decoder": 1}
    return third_party.nnunet()[client.name.removeprefix("nnU-Net ")](**options)


def run_without_data(
    client: Client, shape: tuple[int, ...], see: Callable[[nn.Module, Tensor, Tensor], None]
) -> nn.Module:
    """The network on the meta device, run on x of `shape`; `see` gets each layer with its input and its output."""
    with torch.device("meta"):
        network = build(client)
        x = torch.empty(shape)
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, y: see(layer, inputs[0], y))
    network(x)
    return network


def cost(workload: Workload) -> Cost | None:
    """Convolutions, norms and the optimizer as `floor` counts them; None where the package is missing.

    What the network's own code does besides (additions, concatenations, activations without a norm) is left out.
    """
    client = client_of(workload)
    if missing(client) is not None:
        return None
    N, itemsize, training = workload.shape[0], ITEMSIZE[workload.dtype], workload.mode != "forward"
    costs = []

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.InstanceNorm3d):
            costs.append(Cost(0, (5 if training else 2) * x.numel() * itemsize))
        elif isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            first, padding = not x.requires_grad, cast(tuple[int, ...], layer.padding)
            # A transposed convolution meets the pairs of the one that leads from its output to its input.
            x, y = (y, x) if layer.transposed else (x, y)
            size, wide_in, wide_out = tuple(x.shape[2:]), x.shape[1], y.shape[1]
            counted = Convolution(wide_in, wide_out, size, layer.kernel_size, layer.stride, padding, first)
            costs.append(counted.cost(N, itemsize, training))

    network = run_without_data(client, workload.shape, see)
    if workload.mode == "training step":
        costs.append(Cost(0, ADAMW_BYTES * sum(parameter.numel() for parameter in network.parameters())))
    return sum(costs, Cost())


def idle_biases(client: Client, shape: tuple[int, ...]) -> set[str]:
    """The biases of convolutions that feed an InstanceNorm, which takes them away: their gradients are zero."""
    made_by: dict[int, nn.Module] = {}
    idle: set[int] = set()
    alive: list[Tensor] = []

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        alive.extend((x, y))  # or another tensor might get the same id
        made_by[id(y)] = layer
        source = made_by.get(id(x))
        if isinstance(layer, nn.InstanceNorm3d) and isinstance(source, (nn.Conv3d, nn.ConvTranspose3d)):
            idle.add(id(source.bias))

    network = run_without_data(client, shape, see)
    return {name for name, parameter in network.named_parameters() if id(parameter) in idle}
