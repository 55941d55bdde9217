"""The whole network and its peers under pytest-benchmark, as in `compare`: a group for each batch and mode."""

from __future__ import annotations

from typing import Any

import pytest

from fastenc.bench.commands.gpu import BF16, TRAIN, network
from fastenc.bench.engine.record import Network, Workload
from fastenc.bench.suites.timed_calls import DEVICE, pairs, run_peer, title

SMALL, SIZE = Network(8, (2, 2, 2), 3, 8), (15, 16, 14)
WORKLOADS = (
    [network(mode, BF16, batch) for batch in (1, 8, 32) for mode in ("forward", TRAIN)]
    if DEVICE.type == "cuda"
    else [network(mode, "float32", 2, SMALL, SIZE) for mode in ("forward", TRAIN)]
)


@pytest.mark.parametrize(("workload", "peer"), pairs(WORKLOADS), ids=title)
def test_encoder(benchmark: Any, workload: Workload, peer: str) -> None:
    run_peer(benchmark, workload, peer)
