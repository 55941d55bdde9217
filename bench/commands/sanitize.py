"""NVIDIA's compute-sanitizer over the kernels: memory accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

from fastenc import route

from ..engine.machine import CHECKOUT
from . import gpu_tests

PURPOSE = "run compute-sanitizer's memcheck and racecheck over the GPU tests of each kind of kernel"
TESTS = f"{gpu_tests.TESTS}/test_gpu_op.py"
TOOLS = ("memcheck", "racecheck")
# Forward and backward in each dtype and layout: rows that are short, on chip, split in chunks (contiguous: the last).
CASES = "test_forward_and_backward and (1x3x7- or 3x64x120- or 2x24x29760- or 1x1x35937-)"
FOUND = 9  # the exit status asked of the sanitizer for what it finds: none of pytest's own
OUTCOME = {0: "nothing found", 1: "a test failed", FOUND: "FOUND something, see above"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sanitize` has no options."""
    parser.epilog = (
        "exit status: 0 nothing found; 1 an access out of bounds, a race or a failing test; 2 it cannot run here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run every tool, print what it prints and a line of its outcome; returns the exit status."""
    sanitizer = find()
    if sanitizer is None:
        return _refuse("compute-sanitizer is neither on PATH nor in CUDA_HOME: it comes with the CUDA toolkit")
    if (why := lacking()) is not None:
        return _refuse(why)
    outcomes = {tool: check(sanitizer, tool) for tool in TOOLS}
    for tool, status in outcomes.items():
        print(f"{tool}: {OUTCOME.get(status, f'FAILED with status {status}')}")
    return 1 if any(outcomes.values()) else 0


def _refuse(why: str) -> int:
    print(f"fastenc bench sanitize: {why}", file=sys.stderr)
    return 2


def find() -> str | None:
    """The sanitizer, on PATH or in the toolkit that CUDA_HOME names; None where it is not."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def lacking() -> str | None:
    """What else is missing to run the tests of the kernels; None if nothing is."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if not (CHECKOUT / TESTS).is_file():
        return f"needs the checkout, for {TESTS}"
    return route.device_reason(torch.empty(1, device="cuda"))


def check(sanitizer: str, tool: str, cases: str = CASES) -> int:
    """Run the tests that `cases` selects under one tool; returns its exit status.

    Without PyTorch's cache every tensor is an allocation of its own, so that what lies beyond its end is seen.
    """
    # Calls of the CUDA API that fail are torch's way of asking what a driver can do, and memcheck counts them.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", str(FOUND), *pytest_command(cases)]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **settings}, check=False).returncode


def pytest_command(cases: str) -> list[str]:
    """What the sanitizer runs: the tests of TESTS that pytest's `-k cases` selects."""
    return [*gpu_tests.command()[:-1], TESTS, "-k", cases]
