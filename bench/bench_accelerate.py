"""nnU-Net's and MONAI's U-Nets as they come and accelerated, under pytest-benchmark: a group for each network and mode.

On a GPU at full width, 128³, batch 2, bfloat16 autocast; elsewhere narrow, small and in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastenc
from fastenc.bench.suites import DEVICE, run, traced_only
from fastenc.bench.timing import Work

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.nets.unet import UNet

CUDA = DEVICE.type == "cuda"
SHAPE = (2, 1, 128, 128, 128) if CUDA else (2, 1, 16, 16, 16)
# The widths of nnU-Net's own 3-D plans, and of MONAI's tutorials.
WIDTHS, MONAI_WIDTHS = ((32, 64, 128, 256, 320, 320), (16, 32, 64, 128, 256)) if CUDA else ((4, 8), (4, 8, 8))


def plain_conv_unet() -> nn.Module:
    stages = len(WIDTHS)
    return PlainConvUNet(
        1, stages, list(WIDTHS), nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, 2, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def monai_unet() -> nn.Module:
    return UNet(3, 1, 2, channels=MONAI_WIDTHS, strides=(2,) * (len(MONAI_WIDTHS) - 1), num_res_units=2)


def channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


NETWORKS: dict[str, Callable[[], nn.Module]] = {"PlainConvUNet": plain_conv_unet, "MONAI UNet": monai_unet}
PEERS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda net: net,
    "eager channels_last_3d": channels_last,
    "torch.compile": lambda net: torch.compile(net),  # looked up when it is called: a smoke test replaces it
    "torch.compile channels_last_3d": lambda net: torch.compile(channels_last(net)),
    "fastenc": fastenc.accelerate,
}


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16, enabled=CUDA)


def forward(net: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad(), autocast():
        net(x)


def training_step(net: Callable[[Tensor], Tensor], x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        y = net(x)
    y.float().square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", ["forward", "training step"])
@pytest.mark.parametrize("network", NETWORKS)
def test_accelerate(benchmark: Any, network: str, mode: str, peer: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[network]().to(DEVICE)
    x = torch.randn(SHAPE, device=DEVICE)
    if "channels_last" in peer:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with traced_only() if benchmark.disabled else contextlib.nullcontext():
        call = PEERS[peer](net)
        step = partial(forward, call, x)
        if mode == "training step":
            step = partial(training_step, call, x, torch.optim.AdamW(net.parameters(), fused=CUDA))
        run(benchmark, f"{network}, {mode}, {'×'.join(map(str, SHAPE))}", Work(step))
    if "compile" in peer:
        torch.compiler.reset()
