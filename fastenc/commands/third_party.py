"""Other people's networks, narrow, and `python -m fastenc accelerate`: what becomes of the norms of each."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ..fusion import Summary, accelerate
from .shell import file_problem, write_whole

STAGES: dict[str, Any] = {
    "input_channels": 1, "n_stages": 3, "features_per_stage": [4, 8, 16], "conv_op": nn.Conv3d, "kernel_sizes": 3,
    "strides": [1, 2, 2], "num_classes": 2, "conv_bias": True, "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
MONAI_UNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8, 8), "strides": (2, 2),
}  # fmt: skip
DYNUNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2], "filters": [4, 8, 8],
}  # fmt: skip
SEGRESNET: dict[str, Any] = {"spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 2}

Networks = Mapping[str, Callable[..., nn.Module]]


def monai() -> Networks:
    """MONAI's; every entry makes a new network."""
    from monai.networks.nets.basic_unet import BasicUNet
    from monai.networks.nets.dynunet import DynUNet
    from monai.networks.nets.segresnet import SegResNet
    from monai.networks.nets.unet import UNet
    from monai.networks.nets.unetr import UNETR

    return {
        "UNet": partial(UNet, **MONAI_UNET, num_res_units=2),
        "UNet, dropout": partial(UNet, **MONAI_UNET, num_res_units=0, dropout=0.2),
        "UNet, NAD": partial(UNet, **MONAI_UNET, num_res_units=1, dropout=0.2, adn_ordering="NAD", act="relu"),
        "BasicUNet": partial(BasicUNet, 3, 1, 2, features=(4, 4, 8, 8, 8, 4)),
        "DynUNet": partial(DynUNet, **DYNUNET),
        "DynUNet, residual": partial(DynUNet, **DYNUNET, res_block=True),
        "SegResNet, INSTANCE": partial(SegResNet, **SEGRESNET, norm="INSTANCE", act="PRELU"),
        "SegResNet": partial(SegResNet, **SEGRESNET),
        "UNETR": partial(UNETR, 1, 2, 16, feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2),
    }


def nnunet() -> Networks:
    """nnU-Net's; every entry makes a new network."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    return {
        "PlainConvUNet": partial(PlainConvUNet, **STAGES, n_conv_per_stage=2, n_conv_per_stage_decoder=2),
        "ResidualEncoderUNet": partial(
            ResidualEncoderUNet, **STAGES, n_blocks_per_stage=[1, 3, 4], n_conv_per_stage_decoder=2
        ),
    }


# By the package that they come from. nnU-Net's asks for timm, and so for torchvision, which no network here imports.
SOURCES: Mapping[str, Callable[[], Networks]] = {"monai": monai, "dynamic-network-architectures": nnunet}
INSTALL = {"monai": "pip install monai", "dynamic-network-architectures": "pip install dynamic-network-architectures"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Accelerate narrow versions of MONAI's and nnU-Net's networks and print, for each, how many instance norms are "
        "fused with their activation, run alone or are left, and what became of each. Exit status 2 if a package is "
        "missing or FILE cannot be written."
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file too")


def run(options: argparse.Namespace) -> int:
    """Print the table of the packages that are installed, and what to install for the others."""
    if options.out is not None and (problem := file_problem(options.out, "--out")) is not None:
        print(f"fastenc accelerate: {problem}", file=sys.stderr)
        return 2
    missing = [package for package in SOURCES if importlib.util.find_spec(package.replace("-", "_")) is None]
    present = [package for package in SOURCES if package not in missing]
    for package in missing:
        print(f"{package} is not installed, so its networks are left out: {INSTALL[package]}", file=sys.stderr)
    if present:
        text = table({package: _summaries(SOURCES[package]()) for package in present})
        if options.out is not None:
            write_whole(options.out, text)
        print(text, end="")
    return 2 if missing else 0


def table(found: Mapping[str, Mapping[str, Summary]]) -> str:
    """In Markdown: a row for each network of each package, then every norm of each."""
    packages = " and ".join(f"{package} {version(package)}" for package in found)
    return "\n".join(
        [
            "# What `fastenc.accelerate` fuses",
            "",
            f"Networks of {packages}, narrow, as in `fastenc/commands/third_party.py`.",
            "fused: norm and activation are one kernel. alone: the norm is. left: it runs as it did before.",
            "Written by `python -m fastenc accelerate --out bench/third_party.md`.",
            "",
            "| network | norms | fused | alone | left |",
            "|---|---:|---:|---:|---:|",
            *(line for summaries in found.values() for line in _rows(summaries)),
            *(line for summaries in found.values() for line in _details(summaries)),
            "",
        ]
    )


def _summaries(networks: Networks) -> dict[str, Any]:
    return {name: accelerate(make()).accelerated for name, make in networks.items()}


def _rows(summaries: Mapping[str, Summary]) -> Iterator[str]:
    for name, summary in summaries.items():
        counts = " | ".join(str(summary.count(outcome)) for outcome in ("fused", "alone", "left"))
        yield f"| {name} | {len(summary)} | {counts} |"


def _details(summaries: Mapping[str, Summary]) -> Iterator[str]:
    for name, summary in summaries.items():
        yield from ("", f"## {name}", "", "```text", *str(summary).splitlines(), "```")
