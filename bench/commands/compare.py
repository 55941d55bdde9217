"""`compare`: time an EncoderNet3d with all its baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from .. import arguments as options
from ..baselines.encoder import SUITE, fused_encoder, without_data
from ..baselines.third_party_networks import missing
from ..engine.deadline import Deadline
from ..engine.machine import settings
from ..engine.record import Mode, Network, Precision, Workload
from ..engine.session import Session

PURPOSE = "time an EncoderNet3d and its baselines; write a record, a table and pictures"
MODES: dict[str, Mode] = {"infer": "forward", "gradients": "forward+backward", "train": "training step"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`. Default: Example 1, EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3)."""
    whole = partial(parser.add_argument, type=options.positive, metavar="N")
    whole("--channel", default=64, help="channels of the first block (%(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", default=[3] * 5, help="depth of each block (3 3 3 3 3)"
    )
    parser.add_argument(
        "--kernel-size", type=int, nargs="+", metavar="K", default=[3], help="one for all axes, or one per axis (3)"
    )
    whole("--in-planes", default=3, help="channels of the input (%(default)s)")
    parser.add_argument("--out-length", type=int, metavar="N", default=32, help="0: return the last map (%(default)s)")
    whole("--size", nargs=3, default=[31, 32, 30], help="spatial shape of the input (31 32 30)")
    whole("--batch", nargs="+", default=[2], help="one or more (2)")
    parser.add_argument(
        "--mode", choices=MODES, nargs="+", default=["infer"],
        help="infer: forward; gradients: forward and backward; train: with a fused AdamW step; one or more (infer)",
    )  # fmt: skip
    options.add_run(parser, SUITE.baselines, "fp32")
    parser.epilog = (
        "The default network is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3). bf16 and fp16 run under autocast. "
        "exit status: 0 done; 1 fastenc failed or disagreed with eager; 2 the arguments cannot be used; 130 stopped by "
        "Ctrl-C"
    )


def autocast(dtype: str) -> Precision:
    """The precision of a network for this value of --dtype."""
    precisions: dict[str, Precision] = {"fp32": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
    return precisions[dtype]


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The requested workloads, small batches first."""
    kernel = tuple(arguments.kernel_size * (3 if len(arguments.kernel_size) == 1 else 1))
    network = Network(arguments.channel, tuple(arguments.layers), arguments.in_planes, arguments.out_length, kernel)
    found = []
    for dtype, mode, batch in product(arguments.dtype, arguments.mode, sorted(set(arguments.batch))):
        shape = (batch, network.in_planes, *arguments.size)
        found.append(Workload("network", MODES[mode], autocast(dtype), shape, network=network))
    return found


def problem_of(workload: Workload) -> str | None:
    """Why the workload cannot run (a missing package, or the network's own error), or None. Nothing is computed."""
    model = workload.client
    absent = None if model is None else missing(model)
    try:
        with torch.device("meta"), torch.no_grad():
            if workload.network is not None:
                fused_encoder(workload.network)
            network = without_data(workload)
            if network is not None:
                network(torch.empty(workload.shape))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        name = "" if model is None else f"{model.name}: "
        return f"{name}{type(error).__name__}: {options.first_line(error)}"
    return absent


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    return measure(arguments, workloads(arguments))


def measure(arguments: argparse.Namespace, asked: Sequence[Workload]) -> int:
    """Time the requested workloads and return the exit status. If any cannot run, one line says why instead."""
    deadline = Deadline(arguments.minutes * 60)
    problem = options.device_problem(arguments.device)
    problem = problem or next(filter(None, map(problem_of, asked)), None) or options.folder_problem(arguments.out)
    if problem is not None:
        return options.refuse(arguments.subcommand, problem)
    device = options.chosen_device(arguments.device)
    with settings(tf32=True, benchmark=True) as shared:
        session = Session(arguments.command, arguments.out, device, shared, asked, deadline, only=arguments.peers)
        status = session.run()
    draw(session)
    return status


def draw(session: Session) -> None:
    """Draw the record's pictures next to it, or print a line if matplotlib is missing."""
    try:
        from . import plots
    except ImportError:
        print("pictures: matplotlib is not installed")
        return
    for path in plots.draw([session.record], session.path.parent, session.path.stem):
        print(f"picture: {path}")
