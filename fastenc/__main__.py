"""The command line: `python -m fastenc demo`, `accelerate`, `nnunet`, `bench`, `doctor`, also as `fastenc`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands.shell import command


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fastenc", description="A drop-in EncoderNet3d with fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastenc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bench", help="benchmarks and proofs: python -m fastenc.bench", add_help=False)
    demo_parser = commands.add_parser("demo", help="every route on a real MRI volume, compared; a network trained")
    clients_parser = commands.add_parser("accelerate", help="what accelerate fuses in MONAI's and nnU-Net's networks")
    nnunet_parser = commands.add_parser("nnunet", help="the folder of nnU-Net's trainer, for nnUNet_extTrainer")
    doctor_parser = commands.add_parser("doctor", help="versions, routes, a self-test, and what to put in a bug report")
    if arguments[:1] == ["bench"]:
        from .bench.__main__ import main as bench

        return bench(arguments[1:])

    if arguments[:1] == ["accelerate"]:
        from .commands import third_party

        third_party.add_arguments(clients_parser)
        return third_party.run(parser.parse_args(arguments))

    if arguments[:1] == ["nnunet"]:
        from .commands import nnunet

        nnunet.add_arguments(nnunet_parser)
        return nnunet.run(parser.parse_args(arguments))

    if arguments[:1] == ["doctor"]:
        from .commands import doctor

        doctor.add_arguments(doctor_parser)
        return doctor.run(parser.parse_args(arguments))

    from .commands import demo

    demo.add_arguments(demo_parser)
    return demo.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
