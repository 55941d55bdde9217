"""`python -m fastenc bench SUBCOMMAND`: measure fastenc and its baselines on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastenc import __version__
from fastenc.commands.shell import command

from .arguments import without_folder
from .commands import audit, compare, gpu, ops, report, third_party, tune


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: its purpose for the help text, its arguments, and its body, which returns the exit status."""

    purpose: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


SUBCOMMANDS = {
    "compare": Subcommand(compare.PURPOSE, compare.add_arguments, compare.run),
    "clients": Subcommand(third_party.PURPOSE, third_party.add_arguments, third_party.run),
    "ops": Subcommand(ops.PURPOSE, ops.add_arguments, ops.run),
    "gpu": Subcommand(gpu.PURPOSE, gpu.add_arguments, gpu.run),
    "report": Subcommand(report.PURPOSE, report.add_arguments, report.run),
    "audit": Subcommand(audit.PURPOSE, audit.add_arguments, audit.run),
    "tune": Subcommand(tune.PURPOSE, tune.add_arguments, tune.run),
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (by default those of the process) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m fastenc bench", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastenc {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        child = subparsers.add_parser(name, help=subcommand.purpose, description=subcommand.purpose)
        subcommand.add_arguments(child)
    parsed = parser.parse_args(arguments)
    parsed.command = shlex.join(["python", "-m", "fastenc", "bench", *without_folder(arguments)])
    return SUBCOMMANDS[parsed.subcommand].run(parsed)


if __name__ == "__main__":
    sys.exit(main())
