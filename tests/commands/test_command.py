"""What all commands share: interruption, printing in any encoding, writing files, and tables."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastenc import __main__, __version__
from fastenc.bench import __main__ as bench
from fastenc.bench import console
from fastenc.bench.commands import tune
from fastenc.commands import demo, doctor, nnunet, third_party
from fastenc.commands.shell import STOPPED, file_problem, write_whole

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("main", [__main__.main, bench.main])
def test_version(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])  # type: ignore[operator]
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out


COMMANDS = [(demo, "demo"), (third_party, "accelerate"), (nnunet, "nnunet"), (doctor, "doctor")]


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_ctrl_c_is_a_line(
    module: object, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", stopped)
    assert __main__.main([command]) == STOPPED == 130
    assert capsys.readouterr().err.strip() == "fastenc: stopped by Ctrl-C"


def test_ctrl_c_in_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "seconds", stopped)
    assert bench.main(["tune", "--device", "cpu"]) == STOPPED


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "cp437", "utf-8"])
def test_every_encoding_is_printed_in(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(doctor, "examine", lambda: None)

    def printing(options: object) -> int:
        print("2×3 – 4 µs ÷ ≈ \N{SNOWMAN}")
        return 0

    monkeypatch.setattr(doctor, "run", printing)
    assert __main__.main(["doctor"]) == 0
    text = raw.getvalue().decode(encoding)
    assert text.startswith("2×3 –" if encoding == "utf-8" else ("2x3 -", "2×3 -"))


def test_a_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastenc", "doctor"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "missing" / "x.md"
    assert file_problem(path, "--out") is None
    assert not path.exists(), "nothing is written before the work"
    write_whole(path, "×")
    link = tmp_path / "link"
    link.symlink_to(path)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert "it is a folder" in str(file_problem(tmp_path, "--out"))
    assert "cannot write" in str(file_problem(path / "y", "--out"))


@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_column_is_in_a_part_that_fits(width: int) -> None:
    wide = [12, 5, 9, 7, 7, 7, 30, 2]
    found = console.parts(wide, 2, width)
    assert sorted({i for part in found for i in part}) == list(range(len(wide)))
    for part in found:
        assert sum(wide[i] for i in part) + console.GAP * (len(part) - 1) <= width or len(part) == 3


def test_a_table_is_split_at_the_width_and_leaves_out_empty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "14")
    first, second = console.tables(["key", "a", "empty", "long"], [[["x", "1", "", "22"]], [["y", "333333", "", ""]]])
    assert first == "key       a\nx         1\n\nkey  long\nx      22"
    assert second == "key       a\ny    333333\n\nkey  long\ny"
