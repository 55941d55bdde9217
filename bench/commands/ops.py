"""`ops`: time instance_norm_prelu alone, forward and backward, on the shapes of a network's layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import cast, get_args

from .. import arguments as options
from ..baselines.encoder import NETWORKS, norms
from ..baselines.op import SUITE
from ..engine.record import Layout, Mode, Precision, Workload
from .compare import measure

PURPOSE = "time the fused operation and its baselines on the shapes of a network's layers or on given shapes"


def shape(text: str) -> tuple[int, ...]:
    """Parse a shape such as 8x64x31x32x30."""
    parts = text.replace("×", "x").split("x")
    if len(parts) != 5 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text}; five whole numbers are needed, as in 8x64x31x32x30")
    found = tuple(map(int, parts))
    if found[2] * found[3] * found[4] < 2:
        raise argparse.ArgumentTypeError(f"got {text}; InstanceNorm needs more than one position")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ops`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--network", choices=NETWORKS, default="example1", help="use the shapes of its layers (default: %(default)s)"
    )
    what.add_argument("--shapes", type=shape, nargs="+", metavar="NxCxDxHxW", help="use these shapes instead")
    parser.add_argument("--residual", action="store_true", help="time PReLU(norm(x) + r), the end of a residual block")
    parser.add_argument(
        "--batch", type=options.positive, default=2, metavar="N", help="batch size of the network (%(default)s)"
    )
    parser.add_argument(
        "--layout", choices=get_args(Layout), nargs="+", default=list(get_args(Layout)), help="one or both (both)"
    )
    options.add_run(parser, SUITE.baselines, "fp32")
    parser.epilog = (
        "GB/s counts x and y for the forward, and x, dy and dx for the backward; with a residual also r, and dr for "
        "the backward. On a GPU the inputs rotate over more than the L2 cache. exit status: 0 done; 1 fastenc failed "
        "or disagreed with eager; 2 the folder cannot be written; 130 stopped by Ctrl-C"
    )


def workloads(
    shapes: Sequence[tuple[int, ...]],
    precision: Precision,
    layouts: Sequence[Layout] = get_args(Layout),
    residual: bool = False,
) -> list[Workload]:
    """Workloads for the forward and backward of each shape in each layout."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    return [
        Workload("instance_norm_add_prelu" if residual else "instance_norm_prelu", mode, precision, one, layout)
        for one in dict.fromkeys(shapes)
        for layout in layouts
        for mode in modes
    ]


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    shapes = arguments.shapes or [(arguments.batch, *each) for each in norms(*NETWORKS[arguments.network])]
    asked = [
        workload
        for dtype in arguments.dtype
        for workload in workloads(
            shapes, cast(Precision, options.PRECISIONS[dtype]), arguments.layout, arguments.residual
        )
    ]
    return measure(arguments, asked)
