"""Shared by all commands: how they end when they are interrupted, and how they write files."""

from __future__ import annotations

import codecs
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

STOPPED, PIPE_CLOSED = 130, 141  # as in a shell: 128 plus the number of the signal
ASCII = {"–": "-", "—": "-", "×": "x", "÷": "/", "≈": "~", "·": ".", "µ": "u", "μ": "u", "²": "2", "³": "3", "°": " ",
         "…": "...", "≤": "<=", "≥": ">=", "─": "-", "━": "-", "╸": "-", "╺": "-"}  # fmt: skip


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """A handler of codec errors, which replaces characters that the encoding lacks by ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(each, "?") for each in error.object[error.start : error.end]), error.end


codecs.register_error("fastenc-ascii", _replaced)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Run `main` as a command. Ctrl-C ends it with one line and status 130, a closed pipe without a traceback.

    Characters that the terminal's encoding lacks are printed in ASCII.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if getattr(stream, "errors", None) == "strict" or stream is sys.stderr:
                getattr(stream, "reconfigure", lambda errors: None)(errors="fastenc-ascii")
        try:
            status = main(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("\nfastenc: stopped by Ctrl-C", file=sys.stderr)
            return STOPPED
        except BrokenPipeError:
            # What is still in the buffer would fail again when Python flushes it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        return status

    return run


def file_problem(path: Path, option: str) -> str | None:
    """Why no file can be written at `path`, or None. A missing folder is created, the file is not."""
    try:
        if path.is_dir():
            return f"{option}: cannot write to {path}: it is a folder"
        if path.exists() and not os.access(path, os.W_OK):
            return f"{option}: cannot write to {path}: Permission denied"
        if not path.exists() or path.is_file():
            folder_of(path).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder_of(path)).close()
    except (OSError, ValueError) as error:
        return f"{option}: cannot write to {path}: {getattr(error, 'strerror', None) or error}"
    return None


def folder_of(path: Path) -> Path:
    """The folder of the file to which `path` leads, which may be a link."""
    return path.resolve().parent


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` so that a reader at any moment finds the old file or the new one, whole."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # a device or a pipe stays what it is
        path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=folder_of(path), prefix=path.name[:100], suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path.resolve())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
