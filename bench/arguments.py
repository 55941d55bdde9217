"""Arguments that the subcommands share, and the reasons why their values cannot be used."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OUT = Path("bench-out")


def refuse(subcommand: str, problem: str) -> int:
    """Print why a subcommand cannot run. Returns the exit status, 2."""
    print(f"fastenc bench {subcommand}: {problem}", file=sys.stderr)
    return 2


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a table or a one-line report."""
    return (str(error).strip() or "no message").splitlines()[0]


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """Parse a positive number of minutes."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise argparse.ArgumentTypeError(f"got {text}; a number of minutes above 0 is needed")
    return found


def add_run(parser: argparse.ArgumentParser, baselines: Iterable[str], dtype: str) -> None:
    """Add --dtype with its default, --peers with the names of all baselines, --device, --out and --minutes."""
    parser.add_argument("--dtype", choices=PRECISIONS, nargs="+", default=[dtype], help=f"one or more ({dtype})")
    names = list(baselines)
    only = f"only these of: {', '.join(names)}"
    parser.add_argument("--peers", choices=names, nargs="+", metavar="BASELINE", help=only)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if available")
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="folder for the record and pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=60,
        metavar="M",
        help="stop within M minutes and keep the results so far (default: %(default)g)",
    )


def device_problem(asked: str) -> str | None:
    """Why the requested device is not available, or None if it is."""
    if asked != "cuda" or torch.cuda.is_available():
        return None
    return f"--device cuda: torch {torch.__version__} sees no CUDA GPU here; --device cpu runs without one"


def chosen_device(asked: str) -> torch.device:
    """The device for this value of --device."""
    if asked != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def folder_problem(folder: Path, option: str = "--out") -> str | None:
    """Why `folder` cannot be written to, or None if it can. Creates it if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{option}: cannot write to {folder}: {error.strerror or error}"
    return None


def without_folder(arguments: Sequence[str]) -> list[str]:
    """The command line without --out, because a record does not contain paths of its machine."""
    kept, skip = [], False
    for each in arguments:
        if not skip and each != "--out" and not each.startswith("--out="):
            kept.append(each)
        skip = each == "--out"
    return kept
