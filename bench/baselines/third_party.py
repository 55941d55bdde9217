"""nnU-Net's and MONAI's U-Nets: unchanged and compiled, each in both layouts, and accelerated."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

import fastenc
from fastenc.fusion import Summary

from ..engine.record import Workload
from . import encoder, third_party_networks
from .encoder import Inputs
from .suite import EAGER, FASTENC, Baseline, Runner, Suite


def accelerated(inputs: Inputs) -> nn.Module:
    """The network after `fastenc.accelerate`, with contiguous parameters."""
    return fastenc.accelerate(inputs.holding(inputs.plain, inputs.parameters))


def what_fuses(network: nn.Module, x: Tensor) -> str:
    """The numbers of norms that are fused, alone and left, and their routes for x."""
    summary = cast(Summary, network.accelerated)
    counts = ", ".join(f"{summary.count(outcome)} {outcome}" for outcome in ("fused", "alone", "left"))
    return f"{counts}; {encoder.routes(network, x)}"


def _fastenc(inputs: Inputs) -> Runner:
    return encoder.runner(inputs, accelerated(inputs), note=what_fuses)


def _fastenc_compiled(inputs: Inputs) -> Runner:
    return encoder.runner(inputs, cast(nn.Module, torch.compile(accelerated(inputs), dynamic=False)))


def _missing(workload: Workload, device: torch.device) -> str | None:
    return None if workload.client is None else third_party_networks.missing(workload.client)


def _layout_needs_cuda(workload: Workload, device: torch.device) -> str | None:
    return _missing(workload, device) or encoder.layout_needs_cuda(workload, device)


def _exact(inputs: Inputs) -> Runner:
    """Plain PyTorch in float32, without gradients that are zero except for rounding: no relative distance fits them."""
    whole, workload = encoder.eager(inputs, exact=True), inputs.workload
    assert workload.client is not None
    idle = third_party_networks.idle_biases(workload.client, workload.shape)

    def numbers() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in whole.numbers().items() if name not in idle}

    return dataclasses.replace(whole, numbers=numbers)


SUITE = Suite(
    inputs=Inputs,
    baselines={
        EAGER: Baseline(encoder.eager, absent=_missing),
        "eager channels_last_3d": Baseline(partial(encoder.eager, channels_last=True), absent=_missing),
        FASTENC: Baseline(_fastenc, absent=_missing),
        "fastenc torch.compile": Baseline(_fastenc_compiled, compiles=True, absent=_missing),
        "torch.compile": Baseline(encoder.compiled, compiles=True, absent=_missing),
        "torch.compile channels_last_3d": Baseline(
            partial(encoder.compiled, channels_last=True), compiles=True, absent=_layout_needs_cuda
        ),
    },
    exact=_exact,
    cost=encoder.cost,
)
