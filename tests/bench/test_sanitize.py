"""The sanitizer's command, on a stand-in for the sanitizer: how it is found and called, what its outcome becomes."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

from fastenc.bench import __main__
from fastenc.bench.commands import sanitize
from fastenc.bench.engine.machine import CHECKOUT

DTYPES, LAYOUTS = ("float32", "bfloat16", "float16"), ("contiguous", "channels_last")


def stand_in(folder: Path, body: str) -> Path:
    """A compute-sanitizer that writes down how it was called, then runs `body`."""
    folder.mkdir(parents=True)
    tool = folder / "compute-sanitizer"
    called = folder / "called.txt"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" end >> "{called}"\n{body}\n')
    tool.chmod(0o755)
    return called


@pytest.fixture(autouse=True)
def _a_gpu_and_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "lacking", lambda: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("exit 0", 0, ["memcheck: nothing found", "racecheck: nothing found"]),
        (f'test "$2" = racecheck && exit {sanitize.FOUND}\nexit 0', 1, ["memcheck: nothing", "racecheck: FOUND"]),
        (f'test "$2" = memcheck && exit {sanitize.FOUND}\nexit 0', 1, ["memcheck: FOUND", "racecheck: nothing"]),
        ("exit 1", 1, ["memcheck: a test failed"]),
        ("kill -SEGV $$", 1, ["memcheck: FAILED with status -11"]),
    ],
)
def test_both_tools_run_and_either_fails_the_command(
    body: str, status: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    called = stand_in(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert __main__.main(["sanitize"]) == status
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    calls = [call.splitlines() for call in called.read_text().split("end\n")[:-1]]
    assert [call[:2] for call in calls] == [["--tool", "memcheck"], ["--tool", "racecheck"]]
    expected = ["--error-exitcode", str(sanitize.FOUND), *sanitize.pytest_command(sanitize.CASES), "1"]
    assert [call[2:] for call in calls] == [["--report-api-errors", "no", *expected], expected]


def test_found_in_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitize.find() is None
    called = stand_in(tmp_path / "toolkit" / "bin", "exit 0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert sanitize.find() == str(called.with_name("compute-sanitizer"))


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["sanitize"]) == 2
    assert "compute-sanitizer is neither on PATH nor in CUDA_HOME" in capsys.readouterr().err
    called = stand_in(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sanitize, "lacking", lambda: "needs a CUDA GPU")
    assert __main__.main(["sanitize"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not called.exists()


def test_the_cases_select_every_dtype_and_layout() -> None:
    """By pytest itself: a name that selects nothing would go unnoticed."""
    command = [*sanitize.pytest_command(sanitize.CASES), "--collect-only", "-q", "-q"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    shapes = ("1x3x7", "3x64x120", "2x24x29760", "1x1x35937")
    tests = [f"{shape}-torch.{d}-{layout}" for shape, d, layout in itertools.product(shapes, DTYPES, LAYOUTS)]
    selected = re.findall(r"test_forward_and_backward\[(.*)\]", done.stdout)
    assert sorted(selected) == sorted(tests)
