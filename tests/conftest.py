"""What every test can rely on: one torch thread (tests run in parallel), and its own seed.

The seed depends on the test's name, not on its file. FASTENC_TEST_SEED=1 (or any other text) draws other numbers for
every test: a test that then fails passes by luck.
"""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

from fastenc import convolution, live_taps, route

torch.set_num_threads(1)
# The import of torch.testing._internal.common_utils would forbid to set flags of torch.backends for the rest of a run.
torch.backends.disable_global_flags = lambda: None


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32((request.node.name + os.environ.get("FASTENC_TEST_SEED", "")).encode()))


@pytest.fixture(autouse=True)
def _launches_are_tried_again() -> Iterator[None]:
    """A test that sees a launch fail leaves its device on the eager route, which no other test may inherit."""
    yield
    route._faults.clear()


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own loops instead of oneDNN's, for every test that reads a bfloat16 weight gradient.

    On CPUs with avx512_bf16 the oneDNN 3.12 of torch 2.13 leaves it unwritten on small maps, in every layout.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.fixture
def every_weight_is_big_enough(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny convolutions take every way that big ones take: on a CPU too, products on the live taps."""
    for name in ("CPU_ONE_POSITION", "CPU_FORWARD", "CPU_BACKWARD"):
        monkeypatch.setattr(live_taps, name, 0)
    convolution.plan_convolution.cache_clear()
    yield
    convolution.plan_convolution.cache_clear()
