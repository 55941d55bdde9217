"""nnU-Net's and MONAI's U-Nets and their peers under pytest-benchmark, as in `clients`: a group for each and mode."""

from __future__ import annotations

from typing import Any

import pytest

from fastenc.bench.commands.third_party import NAMES, workload
from fastenc.bench.engine.record import Workload
from fastenc.bench.suites.timed_calls import DEVICE, pairs, run_peer, title

WORKLOADS = [
    workload(name, mode, "bf16", (2, 1, 128, 128, 128))
    if DEVICE.type == "cuda"
    else workload(name, mode, "fp32", (2, 1, 16, 16, 16), (4, 8))
    for name in NAMES
    for mode in ("infer", "train")
]


@pytest.mark.parametrize(("workload", "peer"), pairs(WORKLOADS), ids=title)
def test_accelerate(benchmark: Any, workload: Workload, peer: str) -> None:
    run_peer(benchmark, workload, peer)
