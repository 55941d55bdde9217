"""nnU-Net's and MONAI's U-Nets at the sizes that their users train, and what they cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fastenc.commands import third_party

from ..engine.floor import ADAMW_BYTES, ITEMSIZE, Convolution, Cost
from ..engine.record import ThirdPartyModel, Workload

# The channels of nnU-Net's 3-D plans and of MONAI's tutorials.
CHANNELS = {
    "nnU-Net PlainConvUNet": (32, 64, 128, 256, 320, 320),
    "MONAI UNet": (16, 32, 64, 128, 256),
    "nnU-Net ResidualEncoderUNet": (32, 64, 128, 256, 320, 320),
}
BLOCKS = (1, 3, 4, 6, 6, 6)  # residual blocks in each stage of nnU-Net's residual encoders


def model_of(workload: Workload) -> ThirdPartyModel:
    """The third-party model of a workload. Raises ValueError if it has none."""
    if workload.client is None:
        raise ValueError(f"workload must have a third-party model, got {workload}")
    return workload.client


def missing(model: ThirdPartyModel) -> str | None:
    """Why `model` cannot be made here (its package is not installed), or None if it can."""
    package = "monai" if model.name.startswith("MONAI") else "dynamic-network-architectures"
    installed = importlib.util.find_spec(package.replace("-", "_")) is not None
    return None if installed else f"{package} is not installed: {third_party.INSTALL[package]}"


def build(model: ThirdPartyModel) -> nn.Module:
    """A new network from x (N, 1, *spatial) to (N, 2, *spatial). Each stage halves every axis."""
    channels, stages = model.channels, len(model.channels)
    if model.name == "MONAI UNet":
        return third_party.monai()["UNet"](channels=channels, strides=(2,) * (stages - 1))
    options = {"n_stages": stages, "features_per_stage": channels, "strides": [1] + [2] * (stages - 1)}
    if model.name == "nnU-Net ResidualEncoderUNet":
        options |= {"n_blocks_per_stage": BLOCKS[:stages], "n_conv_per_stage_decoder": 1}
    return third_party.nnunet()[model.name.removeprefix("nnU-Net ")](**options)


def run_without_data(
    model: ThirdPartyModel, shape: tuple[int, ...], see: Callable[[nn.Module, Tensor, Tensor], None]
) -> nn.Module:
    """Run the network on the meta device, on x of `shape`. `see` gets each layer, its input and its output.

    Returns the network.
    """
    with torch.device("meta"):
        network = build(model)
        x = torch.empty(shape)
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, y: see(layer, inputs[0], y))
    network(x)
    return network


def cost(workload: Workload) -> Cost | None:
    """The cost of convolutions, norms and the optimizer, as `floor` counts it; None if the package is missing.

    Other operations are not counted: additions, concatenations, activations without a norm.
    """
    model = model_of(workload)
    if missing(model) is not None:
        return None
    N, itemsize, training = workload.shape[0], ITEMSIZE[workload.dtype], workload.mode != "forward"
    costs = []

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(layer, nn.InstanceNorm3d):
            costs.append(Cost(0, (5 if training else 2) * x.numel() * itemsize))
        elif isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            first, padding = not x.requires_grad, cast(tuple[int, ...], layer.padding)
            # A transposed convolution costs as much as the convolution from its output to its input.
            x, y = (y, x) if layer.transposed else (x, y)
            size, wide_in, wide_out = tuple(x.shape[2:]), x.shape[1], y.shape[1]
            counted = Convolution(wide_in, wide_out, size, layer.kernel_size, layer.stride, padding, first)
            costs.append(counted.cost(N, itemsize, training))

    network = run_without_data(model, workload.shape, see)
    if workload.mode == "training step":
        costs.append(Cost(0, ADAMW_BYTES * sum(parameter.numel() for parameter in network.parameters())))
    return sum(costs, Cost())


def idle_biases(model: ThirdPartyModel, shape: tuple[int, ...]) -> set[str]:
    """The names of convolution biases that a following InstanceNorm cancels. Their gradients are zero."""
    made_by: dict[int, nn.Module] = {}
    idle: set[int] = set()
    alive: list[Tensor] = []

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        alive.extend((x, y))  # otherwise another tensor could get the same id
        made_by[id(y)] = layer
        source = made_by.get(id(x))
        if isinstance(layer, nn.InstanceNorm3d) and isinstance(source, (nn.Conv3d, nn.ConvTranspose3d)):
            idle.add(id(source.bias))

    network = run_without_data(model, shape, see)
    return {name for name, parameter in network.named_parameters() if id(parameter) in idle}
