"""`clients`: time nnU-Net's and MONAI's U-Nets, unchanged, compiled and accelerated."""

from __future__ import annotations

import argparse
from itertools import product

from .. import arguments as options
from ..baselines.third_party import SUITE
from ..baselines.third_party_networks import CHANNELS
from ..engine.record import ThirdPartyModel, Workload
from .compare import MODES, autocast, measure

PURPOSE = "time nnU-Net's and MONAI's U-Nets unchanged, compiled and accelerated; write a record, a table and pictures"
NAMES = {name.split()[-1]: name for name in CHANNELS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `clients`. Default: a training step on 2×1×128×128×128 in bfloat16."""
    parser.add_argument("--networks", choices=NAMES, nargs="+", default=list(NAMES), help="one or more (all)")
    parser.add_argument(
        "--channels", type=options.positive, nargs="+", metavar="N",
        help="channels of each stage (default: as users train it, six stages of 32 to 320 or five of 16 to 256)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=options.positive, nargs=3, default=[128] * 3, metavar="N", help="of the input (128 128 128)"
    )
    parser.add_argument("--batch", type=options.positive, nargs="+", default=[2], metavar="N", help="one or more (2)")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["train"], help="one or more (train)")
    options.add_run(parser, SUITE.baselines, "bf16")
    parser.epilog = (
        "bf16 and fp16 run under autocast. exit status: 0 done; 1 fastenc failed or disagreed with eager; "
        "2 the arguments cannot be used or a package is missing; 130 stopped by Ctrl-C"
    )


def workload(name: str, mode: str, dtype: str, shape: tuple[int, ...], channels: tuple[int, ...] = ()) -> Workload:
    """The workload of a third-party model. name: a key of NAMES. channels: of each stage; empty for the defaults."""
    return Workload(
        "client",
        MODES[mode],
        autocast(dtype),
        shape,
        client=ThirdPartyModel(NAMES[name], channels or CHANNELS[NAMES[name]]),  # type: ignore[arg-type]
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    asked = [
        workload(name, mode, dtype, (batch, 1, *arguments.size), tuple(arguments.channels or ()))
        for name, dtype, mode, batch in product(
            arguments.networks, arguments.dtype, arguments.mode, sorted(set(arguments.batch))
        )
    ]
    return measure(arguments, asked)
