"""Runs tests/gpu in separate processes, so that a kernel that breaks its CUDA context breaks nothing else."""

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
MOST_PROCESSES = 8  # most of the tests' time is spent compiling kernels, on one core per process
PART = "FASTENC_GPU_TESTS_PART"  # an environment variable, "0/8" to "7/8": the part of the tests that a process runs
# pytest, which SIGINT stops even where the shell made background jobs ignore it.
PYTEST = (
    "import signal, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); raise SystemExit(pytest.main())"
)
WRITING = 15.0  # the most seconds for a stopped process to write its output
FAILURE, NOTE = "FAILURE ", "NOTE "  # tests/gpu/conftest.py writes a line with such a prefix
CRASHES = ("Fatal Python error", "ImportError while loading conftest")
SHOWN, WIDTH = 20, 240  # the number of failures listed, and the characters of each


def command() -> list[str]:
    """The pytest command, without the checkout's settings and plugins, so that it needs only pytest."""
    isolated = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", TESTS, "-p", "no:cacheprovider"]
    return [sys.executable, "-c", PYTEST, "-v", "--color=no", *isolated, TESTS]


def lacking() -> str | None:
    """Why the tests cannot run here, or None if they can."""
    if not (CHECKOUT / TESTS).is_dir():
        return f"an installed fastenc has no {TESTS}; a checkout has"
    return "pytest is not installed" if importlib.util.find_spec("pytest") is None else None


def run(log: Path, seconds: float) -> GpuTests:
    """Run the tests for at most `seconds`, write their output to `log`, and count the outcomes."""
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
    """Stop the processes that still run. pytest writes the tracebacks of failures when it gets SIGINT."""
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
    """The result of one process, from pytest's verbose output and exit status (None if it was stopped)."""
    counts = Counter(OUTCOME.findall(log))
    failed, errors = counts["FAILED"], counts["ERROR"]
    if code not in (0, None) and not failed:
        errors = max(errors, 1)  # a collection error or a crash has no test name
    status: TestStatus
    if failed or errors:
        status = "failed"
    else:
        status = "passed" if code == 0 else "stopped: no time left"
    return GpuTests(status, counts["PASSED"], failed, errors, counts["SKIPPED"])


def total(parts: Sequence[GpuTests], seconds: float) -> GpuTests:
    """The result of all processes together: "passed" only if all passed."""
    statuses: tuple[TestStatus, ...] = ("failed", "stopped: no time left", "passed")
    status = next(status for status in statuses if any(part.status == status for part in parts))
    counts = ((part.passed, part.failed, part.errors, part.skipped) for part in parts)
    passed, failed, errors, skipped = map(sum, zip(*counts, strict=True))
    return GpuTests(status, passed, failed, errors, skipped, seconds)


def failures(log: Path) -> list[str]:
    """One line for each failure and note in `log`, up to SHOWN, and the number of the others. Empty without a log."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    found = list(dict.fromkeys(line[:WIDTH] for line in lines if line.startswith((FAILURE, *CRASHES, NOTE))))
    found.sort(key=lambda line: line.startswith(NOTE))
    return [*found[:SHOWN], *([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])]
