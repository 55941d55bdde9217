"""All baselines under pytest-benchmark: for the operation, for EncoderNet3d, and for nnU-Net's and MONAI's U-Nets.

Each workload is a group, as in `bench ops`, `bench compare` and `bench clients`.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastenc.bench.commands import ops, third_party
from fastenc.bench.commands.gpu import BF16, TRAIN, network
from fastenc.bench.engine.record import Network, Workload
from fastenc.bench.suites.timed_calls import DEVICE, pairs, run_baseline, title

CUDA = DEVICE.type == "cuda"
SHAPES = [(8, 64, 31, 32, 30), (8, 128, 16, 16, 15), (8, 512, 4, 4, 4)] if CUDA else [(2, 8, 16, 16, 15)]
SMALL, SIZE = Network(8, (2, 2, 2), 3, 8), (15, 16, 14)

OPERATIONS = [
    workload
    for residual in (False, True)
    for workload in ops.workloads(SHAPES, "bfloat16" if CUDA else "float32", residual=residual)
]
ENCODERS = [
    network(mode, BF16, batch) if CUDA else network(mode, "float32", batch, SMALL, SIZE)
    for batch in ((1, 8, 32) if CUDA else (2,))
    for mode in ("forward", TRAIN)
]
THIRD_PARTY = [
    third_party.workload(name, mode, "bf16", (2, 1, 128, 128, 128))
    if CUDA
    else third_party.workload(name, mode, "fp32", (2, 1, 16, 16, 16), (4, 8))
    for name in third_party.NAMES
    for mode in ("infer", "train")
]


@pytest.mark.parametrize(("workload", "baseline"), pairs(OPERATIONS), ids=title)
def test_instance_norm_prelu(benchmark: Any, workload: Workload, baseline: str) -> None:
    run_baseline(benchmark, workload, baseline)


@pytest.mark.parametrize(("workload", "baseline"), pairs(ENCODERS), ids=title)
def test_encoder(benchmark: Any, workload: Workload, baseline: str) -> None:
    run_baseline(benchmark, workload, baseline)


@pytest.mark.parametrize(("workload", "baseline"), pairs(THIRD_PARTY), ids=title)
def test_accelerate(benchmark: Any, workload: Workload, baseline: str) -> None:
    run_baseline(benchmark, workload, baseline)
