"""nnU-Net's and MONAI's U-Nets at the sizes that their users train."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import nn

from fastenc.commands import third_party

from ..engine.floor import layers
from ..engine.record import ThirdPartyModel

# The channels of nnU-Net's 3-D plans and of MONAI's tutorials.
CHANNELS = {
    "nnU-Net PlainConvUNet": (32, 64, 128, 256, 320, 320),
    "MONAI UNet": (16, 32, 64, 128, 256),
    "nnU-Net ResidualEncoderUNet": (32, 64, 128, 256, 320, 320),
}
BLOCKS = (1, 3, 4, 6, 6, 6)  # residual blocks in each stage of nnU-Net's residual encoders


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


def idle_biases(model: ThirdPartyModel, shape: Sequence[int]) -> set[str]:
    """The names of convolution biases that a following InstanceNorm cancels. Their gradients are zero."""
    with torch.device("meta"):
        network = build(model)
        ran = layers(network, shape)
    made_by = {id(y): layer for layer, _, y in ran}
    before_norms = [made_by.get(id(x)) for layer, x, _ in ran if isinstance(layer, nn.InstanceNorm3d)]
    idle = {id(each.bias) for each in before_norms if isinstance(each, (nn.Conv3d, nn.ConvTranspose3d))}
    return {name for name, parameter in network.named_parameters() if id(parameter) in idle}
