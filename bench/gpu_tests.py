"""Runs tests/gpu in a process of its own, so that a kernel that breaks its CUDA context breaks nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from .machine import CHECKOUT
from .record import GpuTests, TestStatus

OUTCOME = re.compile(r"^\S+::\S.* (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
TESTS = "tests/gpu"


def command() -> list[str]:
    """The pytest command: of the checkout's settings and plugins none applies, so that it runs wherever pytest does."""
    isolated = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", TESTS, "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-v", "--color=no", *isolated, TESTS]


def run(log: Path, seconds: float) -> GpuTests:
    """Run the tests for at most `seconds`, their output going to `log`, and count the outcomes."""
    if importlib.util.find_spec("pytest") is None or not (CHECKOUT / TESTS).is_dir():
        return GpuTests("not run")
    if seconds <= 0:
        return GpuTests("stopped: no time left")
    begin = time.monotonic()
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(), cwd=CHECKOUT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome(log.read_text(encoding="utf-8", errors="replace"), code, time.monotonic() - begin)


def outcome(log: str, code: int | None, seconds: float) -> GpuTests:
    """The result of a run, from pytest's verbose output and exit status (None: it was stopped)."""
    counts = Counter(OUTCOME.findall(log))
    failed, errors = counts["FAILED"], counts["ERROR"]
    if code not in (0, None) and not failed:
        errors = max(errors, 1)  # a collection error or a crash fails the run and has no test's name
    status: TestStatus
    if failed or errors:
        status = "failed"
    else:
        status = "passed" if code == 0 else "stopped: no time left"
    return GpuTests(status, counts["PASSED"], failed, errors, counts["SKIPPED"], seconds)
