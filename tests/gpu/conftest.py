"""Tests that need a GPU. They import torch, triton, numpy, pytest, fastenc alone: a failing import stops them all."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read by cuBLAS when it starts: without it, matrix products refuse deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import fastenc
from fastenc.bench.commands.gpu_tests import FAILURE, NOTE, PART
from fastenc.bench.engine.agreement import distance
from fastenc.bench.engine.machine import settings

FOLDER = Path(__file__).parent
# Hundreds of kernel variants to compile: where time is short, what surrounds them has been tested by then.
LAST = ("test_gpu_op.py", "test_gpu_torch_samples.py", "test_gpu_tools.py")
EXACT, TF32 = 1e-5, 4e-3  # distances: of exact float32, and of a network in TF32
sys.path.append(str(FOLDER.parent))  # for plain.py and torch_samples.py


def _lacking() -> str | None:
    """What this machine lacks to run these tests."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


class Notes:
    """Prints what a test records by `record_property`: choices of cuDNN, which are reported and fail no test."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else []:
            self._config.get_terminal_writer().line(f"\n{NOTE}{report.nodeid}: {name} {value}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.pluginmanager.register(Notes(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = _lacking()
    items.sort(key=lambda item: LAST.index(item.path.name) + 1 if item.path.name in LAST else 0)
    # Popped: a test that starts pytest itself chooses its own tests.
    part, parts = map(int, os.environ.pop(PART, "0/1").split("/"))
    items[:] = items[part::parts]
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if lacking is not None:
                item.add_marker(pytest.mark.skip(reason=lacking))


def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any]) -> None:
    """What failed and why, at once: a run that is stopped ends without a summary."""
    if call.excinfo is not None:
        text = str(call.excinfo.value).strip() or call.excinfo.typename
        node.config.get_terminal_writer().line(f"\n{FAILURE}{node.nodeid}: {text.splitlines()[0]}")


@pytest.fixture(autouse=True)
def exact_triton() -> Iterator[None]:
    """No TF32, and the Triton route by name: a kernel that fails raises, where "auto" would fall back in silence."""
    with settings(tf32=False, benchmark=False), fastenc.backend("triton"):
        yield


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only; torch then fills fresh tensors with NaN, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def check_near(record_property: Callable[[str, object], None]) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Asserts that two float32 results are as near as TF32; reports them if they are not as near as exact float32."""

    def check(found: torch.Tensor, truth: torch.Tensor) -> None:
        apart = distance(found, truth)
        if apart >= EXACT:
            record_property("distance in float32", f"{apart:.1e}")
        assert apart < TF32

    return check


@pytest.fixture
def on_a_side_stream() -> Callable[..., Any]:
    """Calls a function with a copy of x, on a side stream that is still busy making that copy."""

    def run(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
        made = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            made.copy_(x)
            results = call(made)
        stream.synchronize()
        return results

    return run
