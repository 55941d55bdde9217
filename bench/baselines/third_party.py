"""nnU-Net's and MONAI's U-Nets: untouched in both layouts, compiled in both, and accelerated."""

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
from .suite import EAGER, FASTENC, Candidate, Contest, Peer


class Subject(encoder.Subject):
    """What all peers of one workload share, as of an EncoderNet3d."""

    def plain(self) -> nn.Module:
        """The network as it comes."""
        return third_party_networks.build(third_party_networks.client_of(self.workload))


def accelerated(subject: Subject) -> nn.Module:
    """The network with its norms and activations fused, its parameters contiguous."""
    return fastenc.accelerate(subject.holding(subject.plain, subject.parameters))


def what_fuses(network: nn.Module, x: Tensor) -> str:
    """How many norms are fused, alone and left, and the routes that they take for x."""
    summary = cast(Summary, network.accelerated)
    counts = ", ".join(f"{summary.count(outcome)} {outcome}" for outcome in ("fused", "alone", "left"))
    return f"{counts}; {encoder.routes(network, x)}"


def _fastenc(subject: Subject) -> Candidate:
    return encoder.candidate(subject, accelerated(subject), note=what_fuses)


def _fastenc_compiled(subject: Subject) -> Candidate:
    return encoder.candidate(subject, cast(nn.Module, torch.compile(accelerated(subject), dynamic=False)))


def _missing(workload: Workload, device: torch.device) -> str | None:
    return third_party_networks.missing(third_party_networks.client_of(workload))


def _layout_needs_cuda(workload: Workload, device: torch.device) -> str | None:
    return _missing(workload, device) or encoder.layout_needs_cuda(workload, device)


def _exact(subject: Subject) -> Candidate:
    """Plain PyTorch in float32, without the gradients that are zero but for rounding: relative to them all is far."""
    whole = encoder.eager(subject, exact=True)
    idle = third_party_networks.idle_biases(third_party_networks.client_of(subject.workload), subject.workload.shape)

    def numbers() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in whole.numbers().items() if name not in idle}

    return dataclasses.replace(whole, numbers=numbers)


CONTEST = Contest(
    subject=Subject,
    peers={
        EAGER: Peer(encoder.eager, absent=_missing),
        "eager channels_last_3d": Peer(partial(encoder.eager, laid_out=True), absent=_missing),
        FASTENC: Peer(_fastenc, absent=_missing),
        "fastenc torch.compile": Peer(_fastenc_compiled, compiles=True, absent=_missing),
        "torch.compile": Peer(encoder.compiled, compiles=True, absent=_missing),
        "torch.compile channels_last_3d": Peer(
            partial(encoder.compiled, laid_out=True), compiles=True, absent=_layout_needs_cuda
        ),
    },
    exact=_exact,
    cost=third_party_networks.cost,
)
