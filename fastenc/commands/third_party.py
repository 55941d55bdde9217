"""Narrow third-party networks, and `python -m fastenc accelerate`, which prints the outcome for the norms of each."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from .. import route
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

# The presets M, L and XL differ in patch and batch size. For cubic patches of 128, 160 and 192 they are one network.
RESENC: dict[str, Any] = {
    **STAGES, "n_stages": 6, "features_per_stage": [4, 4, 8, 8, 8, 8], "strides": [1, 2, 2, 2, 2, 2],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": 1,
}  # fmt: skip
SWIN: dict[str, Any] = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
VISTA3D: dict[str, Any] = {"init_filters": 8, "blocks_down": (1, 2, 2, 4, 4), "norm": "instance", "dsdepth": 1}
# The edge of the input of each network for which it is not 8.
SIZES: Mapping[str, int] = {
    "BasicUNet": 32, "SegResNet, INSTANCE": 16, "UNETR": 16, "SwinUNETR": 64, "VNet, instance norm": 32,
    "SegResNetDS2, VISTA3D": 32, "DiNTS": 16, "ResEnc M, L, XL": 64,
}  # fmt: skip

Networks = Mapping[str, Callable[..., nn.Module]]


class Row(NamedTuple):
    """The outcome for a network: for its norms, and how many operators torch.compile found."""

    summary: Summary
    compiled: int


def instance_normalized(make: Callable[..., nn.Module]) -> nn.Module:
    """A new network with instance norms instead of its batch norms."""
    net = make()
    for parent in list(net.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm3d):
                setattr(parent, name, nn.InstanceNorm3d(norm.num_features, norm.eps, affine=True))
    return net


def monai() -> Networks:
    """MONAI's networks. Every entry makes a new one."""
    import numpy
    from monai.networks.nets.attentionunet import AttentionUnet
    from monai.networks.nets.basic_unet import BasicUNet
    from monai.networks.nets.dints import DiNTS, TopologyInstance
    from monai.networks.nets.dynunet import DynUNet
    from monai.networks.nets.segresnet import SegResNet
    from monai.networks.nets.segresnet_ds import SegResNetDS2
    from monai.networks.nets.swin_unetr import SwinUNETR
    from monai.networks.nets.unet import UNet
    from monai.networks.nets.unetr import UNETR
    from monai.networks.nets.vnet import VNet

    def dints() -> nn.Module:
        code = [numpy.ones((2, 4)), numpy.ones((2, 4))]
        with redirect_stdout(io.StringIO()):  # it prints the time
            space = TopologyInstance(code, 0.25, num_blocks=2, num_depths=2)
        return DiNTS(space, 1, 2)

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
        "SwinUNETR": partial(SwinUNETR, 1, 2, **SWIN),
        "AttentionUnet, instance norm": partial(
            instance_normalized, partial(AttentionUnet, 3, 1, 2, channels=(4, 8), strides=(2, 2))
        ),
        "VNet, instance norm": partial(instance_normalized, partial(VNet, act="prelu", dropout_prob_down=None)),
        "SegResNetDS2, VISTA3D": partial(SegResNetDS2, in_channels=1, out_channels=2, **VISTA3D),
        "DiNTS": dints,
    }


def nnunet() -> Networks:
    """nnU-Net's networks. Every entry makes a new one."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    return {
        "PlainConvUNet": partial(PlainConvUNet, **STAGES, n_conv_per_stage=2, n_conv_per_stage_decoder=2),
        "ResidualEncoderUNet": partial(
            ResidualEncoderUNet, **STAGES, n_blocks_per_stage=[1, 3, 4], n_conv_per_stage_decoder=2
        ),
        "ResEnc M, L, XL": partial(ResidualEncoderUNet, **RESENC),
    }


# By package. nnU-Net's package depends on timm, and so on torchvision, which no network here imports.
SOURCES: Mapping[str, Callable[[], Networks]] = {"monai": monai, "dynamic-network-architectures": nnunet}
INSTALL = {"monai": "pip install monai", "dynamic-network-architectures": "pip install dynamic-network-architectures"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Accelerate narrow versions of MONAI's and nnU-Net's networks and print, for each, how many instance norms are "
        "fused with their activation, run alone or are left, how many convolutions run without a bias, how many pairs "
        "torch.compile finds, and what became of each norm. Exit status 2 if a package is missing or FILE cannot be "
        "written."
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
        text = table({package: _accelerated(SOURCES[package]()) for package in present})
        if options.out is not None:
            write_whole(options.out, text)
        print(text, end="")
    return 2 if missing else 0


def table(found: Mapping[str, Mapping[str, Row]]) -> str:
    """Markdown with a row for each network of each package, and then every norm of each network."""
    packages = " and ".join(f"{package} {version(package)}" for package in found)
    return "\n".join(
        [
            "# What `fastenc.accelerate` fuses",
            "",
            f"Networks of {packages}, narrow, as in `fastenc/commands/third_party.py`.",
            "fused: norm and activation are one kernel. alone: the norm is. left: it runs as it did before. biases: of",
            "convolutions, left out because a norm cancels them. compiled: pairs that are one operator in the graph of",
            "torch.compile. ResEnc M, L and XL are one network, with other patches and batches.",
            "Written by `python -m fastenc accelerate --out bench/third_party.md`.",
            "",
            "| network | norms | fused | alone | left | biases | compiled |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(line for rows in found.values() for line in _rows(rows)),
            *(line for rows in found.values() for line in _details(rows)),
            "",
        ]
    )


def _accelerated(networks: Networks) -> dict[str, Row]:
    rows = {}
    for name, make in networks.items():
        net = accelerate(make().eval())
        rows[name] = Row(net.accelerated, _compiled(net, torch.zeros(1, 1, *3 * (SIZES.get(name, 8),))))
    return rows


def _compiled(net: nn.Module, x: Tensor) -> int:
    """How many of fastenc's operators torch.compile finds in net. Nothing is computed: its graphs return zeros."""
    found = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal found
        found += sum("fastenc.instance_norm_prelu" in str(node.target) for node in graph.graph.nodes)
        (outputs,) = graph.graph.output_node().args
        values: Any = [node.meta["example_value"] for node in outputs]  # type: ignore[union-attr]
        return lambda *inputs: [torch.zeros(value.shape) if isinstance(value, Tensor) else value for value in values]

    torch.compiler.reset()
    with torch.no_grad(), mock.patch.multiple(route, device_reason=lambda x: None):  # as on a GPU
        torch.compile(net, backend=count, dynamic=False)(x)
    torch.compiler.reset()
    return found


def _rows(rows: Mapping[str, Row]) -> Iterator[str]:
    for name, (summary, compiled) in rows.items():
        counts = " | ".join(str(summary.count(outcome)) for outcome in ("fused", "alone", "left"))
        yield f"| {name} | {len(summary)} | {counts} | {len(summary.biases)} | {compiled} |"


def _details(rows: Mapping[str, Row]) -> Iterator[str]:
    for name, (summary, _) in rows.items():
        yield from ("", f"## {name}", "", "```text", *str(summary).splitlines(), "```")
