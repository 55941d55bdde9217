"""Runs tests/gpu in processes of their own, so that a kernel that breaks its CUDA context breaks nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..engine.machine import CHECKOUT
from ..engine.record import GpuTests, TestStatus

OUTCOME = re.compile(r"^\S+::\S.* (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
TESTS = "tests/gpu"
# The tests spend their time in compiling kernels, each on one core: they are dealt out to as many processes.
MOST_PROCESSES = 8
PART = "FASTENC_GPU_TESTS_PART"  # the environment variable that tells a process its part, "0/8" to "7/8"
WRITING = 5.0  # seconds that a process is given to write, when it is stopped
FAILURE = "FAILURE "  # how the line begins that tests/gpu/conftest.py writes of each failure
CRASHES = ("Fatal Python error", "ImportError while loading conftest")
SHOWN, WIDTH = 20, 240  # failures that are listed, and characters of each


def command() -> list[str]:
    """The pytest command: of the checkout's settings and plugins none applies, so that it runs wherever pytest does."""
    isolated = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", TESTS, "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-v", "--color=no", *isolated, TESTS]


def lacking() -> str | None:
    """Why the tests cannot be run here; None where they can."""
    if not (CHECKOUT / TESTS).is_dir():
        return f"an installed fastenc has no {TESTS}, a checkout has"
    return "pytest is not installed" if importlib.util.find_spec("pytest") is None else None


def run(log: Path, seconds: float) -> GpuTests:
    """Run the tests for at most `seconds`, their output going to `log`, and count the outcomes."""
    if lacking() is not None:
        return GpuTests("not run")
    if seconds <= 0:
        return GpuTests("stopped: no time left")
    begin = time.monotonic()
    parts = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(part)) for part in range(parts)]
        processes = [_start(output, f"{part}/{parts}") for part, output in enumerate(outputs)]
        codes: list[int | None] = []
        try:
            for process in processes:
                try:
                    codes.append(process.wait(timeout=max(begin + seconds - time.monotonic(), 0.0)))
                except subprocess.TimeoutExpired:
                    codes.append(None)
        finally:
            _stop(processes)
            texts = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
            log.write_text("\n".join(texts), encoding="utf-8")
    return total([outcome(*each) for each in zip(texts, codes, strict=True)], time.monotonic() - begin)


def _start(output: Path, part: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200", PART: part}
    with output.open("wb") as file:
        return subprocess.Popen(
            command(), cwd=CHECKOUT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: asked to, pytest first writes the tracebacks of what failed."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end = time.monotonic() + WRITING
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(end - time.monotonic(), 0.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(log: str, code: int | None) -> GpuTests:
    """The result of one process, from pytest's verbose output and exit status (None: it was stopped)."""
    counts = Counter(OUTCOME.findall(log))
    failed, errors = counts["FAILED"], counts["ERROR"]
    if code not in (0, None) and not failed:
        errors = max(errors, 1)  # a collection error or a crash fails the run and has no test's name
    status: TestStatus
    if failed or errors:
        status = "failed"
    else:
        status = "passed" if code == 0 else "stopped: no time left"
    return GpuTests(status, counts["PASSED"], failed, errors, counts["SKIPPED"])


def total(parts: Sequence[GpuTests], seconds: float) -> GpuTests:
    """The result of all processes: passed where every one did."""
    statuses: tuple[TestStatus, ...] = ("failed", "stopped: no time left", "passed")
    status = next(status for status in statuses if any(part.status == status for part in parts))
    counts = ((part.passed, part.failed, part.errors, part.skipped) for part in parts)
    passed, failed, errors, skipped = map(sum, zip(*counts, strict=True))
    return GpuTests(status, passed, failed, errors, skipped, seconds)


def failures(log: Path) -> list[str]:
    """What failed in the tests that wrote `log`, a line of each, and how many more there are; none without a log."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    found = list(dict.fromkeys(line[:WIDTH] for line in lines if line.startswith((FAILURE, *CRASHES))))
    return [*found[:SHOWN], *([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])]
