"""The rehearsal installs the oldest torch and triton supported, and its table shows what failed."""

import sys
from pathlib import Path

import pytest
import tomllib
from tools import rehearsal


def test_pins() -> None:
    pins = dict(pin.split("==") for pin in rehearsal.PINNED)
    project = tomllib.loads((rehearsal.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for dependency in project["dependencies"]:
        name, oldest = dependency.split(";")[0].strip().split(">=")
        assert pins[name].startswith(f"{oldest}.")
    constraints = (rehearsal.ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name in ("pytest", "hypothesis", "expecttest"):
        assert f"{name}=={pins[name]}" in constraints


def test_the_steps_are_there() -> None:
    for test in rehearsal.INTERPRETED:
        assert (rehearsal.ROOT / test).is_file()
    for command in rehearsal.steps(Path("out"), 1.0).values():
        if command[0] == "-c":
            compile(command[1], "step", "exec")


def test_the_table_shows_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"good": ["-c", "print('one'); print('two')"], "bad": ["-c", "raise SystemExit('three')"]}
    monkeypatch.setattr(rehearsal, "build", lambda environment: sys.executable)
    monkeypatch.setattr(rehearsal, "steps", lambda out, minutes: steps)
    monkeypatch.setattr(sys, "argv", ["rehearsal.py"])
    assert rehearsal.main() == 1
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [("good", "passed", "two"), ("bad", "failed", "three")]
    assert "three" in printed.err
