"""instance_norm_prelu and its peers under pytest-benchmark: a group for each shape, layout and direction."""

from __future__ import annotations

from typing import Any

import pytest

from fastenc.bench.commands.ops import workloads
from fastenc.bench.engine.record import Workload
from fastenc.bench.suites.timed_calls import DEVICE, pairs, run_peer, title

LARGE = [(8, 64, 31, 32, 30), (8, 128, 16, 16, 15), (8, 512, 4, 4, 4)]
SMALL = [(2, 8, 16, 16, 15)]
CUDA = DEVICE.type == "cuda"
WORKLOADS = [
    workload
    for residual in (False, True)
    for workload in workloads(LARGE if CUDA else SMALL, "bfloat16" if CUDA else "float32", residual=residual)
]


@pytest.mark.parametrize(("workload", "peer"), pairs(WORKLOADS), ids=title)
def test_instance_norm_prelu(benchmark: Any, workload: Workload, peer: str) -> None:
    run_peer(benchmark, workload, peer)
