"""`python -m fastenc bench SUBCOMMAND`: measure fastenc and its baselines on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from fastenc import __version__
from fastenc.commands.shell import command

from .arguments import without_folder
from .commands import audit, compare, gpu, ops, report, third_party, tune

# Each module has PURPOSE, add_arguments and run.
SUBCOMMANDS = {
    "compare": compare, "clients": third_party, "ops": ops, "gpu": gpu, "report": report, "audit": audit, "tune": tune,
}  # fmt: skip


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (by default those of the process) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m fastenc bench", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastenc {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, module in SUBCOMMANDS.items():
        child = subparsers.add_parser(name, help=module.PURPOSE, description=module.PURPOSE)
        module.add_arguments(child)
    parsed = parser.parse_args(arguments)
    parsed.command = shlex.join(["python", "-m", "fastenc", "bench", *without_folder(arguments)])
    return SUBCOMMANDS[parsed.subcommand].run(parsed)


if __name__ == "__main__":
    sys.exit(main())
