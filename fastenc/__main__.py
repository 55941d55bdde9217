"""The command line: `python -m fastenc demo`, `accelerate`, `nnunet`, `bench`, `doctor`, also as `fastenc`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands.shell import command

# The module of each subcommand in fastenc.commands, which is imported only if its command runs, and its help.
COMMANDS = {
    "demo": ("demo", "every route on a real MRI image, compared; a network trained"),
    "accelerate": ("third_party", "what accelerate fuses in MONAI's and nnU-Net's networks"),
    "nnunet": ("nnunet", "the folder of nnU-Net's trainer, for nnUNet_extTrainer"),
    "doctor": ("doctor", "versions, routes, a self-test, and what to put in a bug report"),
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fastenc", description="A drop-in EncoderNet3d with fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastenc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bench", help="benchmarks and proofs: python -m fastenc.bench", add_help=False)
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    if arguments[:1] == ["bench"]:
        from .bench.__main__ import main as bench

        return bench(arguments[1:])
    chosen = next((argument for argument in arguments if argument in COMMANDS), "demo")  # without one, argparse says so
    module = import_module(f".commands.{COMMANDS[chosen][0]}", __package__)
    module.add_arguments(parsers[chosen])
    return int(module.run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
