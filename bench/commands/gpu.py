"""`gpu`: the single command for a GPU machine. It times the promised workloads, runs the GPU tests, times the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from torch import nn

from .. import arguments as options
from ..baselines import encoder
from ..baselines.suite import FASTENC, Baseline
from ..engine.deadline import Deadline
from ..engine.floor import layers
from ..engine.machine import settings
from ..engine.record import GpuTests, Mode, Network, Precision, Workload
from ..engine.session import LAST, Session
from . import gpu_tests, ops, third_party
from .compare import draw

PURPOSE = "run the GPU tests, time fastenc and its baselines, write a JSON record and print a table"
# Seconds for importing torch before the clock starts, for a signal that has to be repeated, and for exiting.
ENDING = 12.0
TESTS_SHARE = 0.4  # largest share of the minutes
PROMISED = 11  # the plan's first workloads, whose figures the project promises

# Example 1 is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3).
EXAMPLE_1, EXAMPLE_1_SIZE = encoder.NETWORKS["example1"]
LARGE, LARGE_SIZE = encoder.NETWORKS["volume128"]
TRAIN: Mode = "training step"
BF16: Precision = "bfloat16 autocast"


def network(
    mode: Mode, precision: Precision, batch: int, net: Network = EXAMPLE_1, size: tuple[int, ...] = EXAMPLE_1_SIZE
) -> Workload:
    """The workload of a network on an input with spatial shape `size`."""
    return Workload("network", mode, precision, (batch, net.in_planes, *size), network=net)


def stems(precision: Precision, batch: int, net: Network, size: tuple[int, ...]) -> list[Workload]:
    """The workloads of a network's stem: forward, and forward with the gradient of the weight."""
    modes: tuple[Mode, ...] = ("forward", "forward+backward")
    return [Workload("stem", mode, precision, (batch, net.in_planes, *size), network=net) for mode in modes]


def plan(device: torch.device) -> list[Workload]:
    """The workloads, most valuable first. They are tiny on a CPU.

    The order is: figures that the project promises, the operation on several layers, the stem, float32, batch sizes.
    """
    if device.type == "cpu":
        tiny = Network(4, (2, 1), 3, 32)
        return [
            *(network(mode, "float32", 2, tiny, (8, 7, 6)) for mode in (TRAIN, "forward")),
            *ops.workloads([(2, 4, 8, 7, 6)], "float32"),
            *ops.workloads([(2, 4, 8, 7, 6)], "float32", ["channels_last"], residual=True),
            *stems("float32", 2, tiny, (8, 7, 6)),
            *(third_party.workload(name, "train", "fp32", (2, 1, 16, 16, 16), (4, 8)) for name in third_party.NAMES),
        ]
    shape = (2, 1, *LARGE_SIZE)
    plain, monai, residual = (third_party.workload(name, "train", "bf16", shape) for name in third_party.NAMES)
    large, middle = (8, 64, 31, 32, 30), (32, 128, 16, 16, 15)
    return [
        network("forward", BF16, 32),
        network(TRAIN, BF16, 32),
        *ops.workloads([large], "bfloat16"),
        network("forward", BF16, 1),
        network(TRAIN, BF16, 2, LARGE, LARGE_SIZE),
        network("forward", BF16, 2, LARGE, LARGE_SIZE),
        plain,
        monai,
        *ops.workloads([middle, (2, 32, 128, 128, 128), (8, 256, 8, 8, 8), (8, 512, 4, 4, 4)], "bfloat16"),
        *ops.workloads([(1, 64, 16, 16, 15), (1, 64, 31, 32, 30)], "bfloat16"),
        *ops.workloads([large], "bfloat16", residual=True),
        residual,
        *stems(BF16, 32, EXAMPLE_1, EXAMPLE_1_SIZE),
        *stems(BF16, 2, LARGE, LARGE_SIZE),
        network("forward", BF16, 8),
        network(TRAIN, BF16, 8),
        network("forward", "float32", 8),
        network(TRAIN, "float32", 8),
        *ops.workloads([large], "float32"),
        *chain(*((network("forward", BF16, batch), network(TRAIN, BF16, batch)) for batch in (128, 4, 64, 2, 16))),
        network(TRAIN, BF16, 1),
    ]


def stage(promised: set[Workload], workload: Workload, name: str, baseline: Baseline) -> int:
    """The stage of a baseline. A run of 8 minutes reaches stage 0 of every promised workload."""
    if "max-autotune" in name:
        return LAST  # it times 17 kernels for each convolution
    if workload in promised:
        if name == "torch.compile" or not (baseline.compiles or name.startswith(f"{FASTENC} ")):
            return 0
        return 3 if baseline.compiles else 1
    return 4 if baseline.compiles else 2


def searches(workloads: Iterable[Workload]) -> int:
    """How often cuDNN searches for an algorithm: once for each convolution, dtype, layout and direction.

    Convolutions that fastenc makes smaller and those of stems with more channels are not counted.
    """
    found: set[tuple[object, ...]] = set()
    for workload in workloads:
        network = encoder.without_data(workload)
        for layer, x, _ in [] if network is None else layers(network, workload.shape):
            if not isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
                continue
            configuration = (type(layer), x.shape, layer.weight.shape, layer.stride, layer.padding, workload.dtype)
            directions = ["forward"]
            if workload.mode != "forward":
                directions += ["weight", "input"] if x.requires_grad else ["weight"]
            found.update((*configuration, *way) for way in product(("contiguous", "channels_last"), directions))
    return len(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gpu`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record and tests.log")
    parser.add_argument(
        "--minutes", type=options.minutes, default=8.0, metavar="M", help="stop within M minutes (%(default)g)"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs a tiny version (default: cuda)"
    )
    parser.epilog = (
        "Run it again with the same DIR to continue an unfinished run; max-autotune never runs in the first. exit "
        "status: 0 done; 1 a test failed, or fastenc failed or disagreed with eager; 2 no GPU, or DIR cannot be "
        "written; 130 stopped by Ctrl-C"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    deadline = Deadline(max(arguments.minutes * 60 - ENDING, 0.0))
    problem = options.device_problem(arguments.device) or options.folder_problem(arguments.out)
    if problem is not None:
        return options.refuse("gpu", problem)
    device = options.chosen_device(arguments.device)
    log = arguments.out / "tests.log"
    lacking = gpu_tests.lacking()
    if lacking is not None:
        print(f"fastenc bench gpu: only the timings run, {gpu_tests.TESTS} does not: {lacking}", file=sys.stderr)

    def tests(deadline: Deadline) -> GpuTests:
        return gpu_tests.run(log, min(TESTS_SHARE * deadline.seconds, deadline.left() - gpu_tests.WRITING))

    workloads = plan(device)
    first = workloads[:PROMISED]
    if device.type == "cuda":
        print(
            f"cuDNN searches for an algorithm about {searches(workloads)} times in {len(workloads)} workloads, "
            f"{searches(first)} times in the first {len(first)}",
            file=sys.stderr,
        )
    with settings(tf32=True, benchmark=True) as shared:
        session = Session(
            arguments.command, arguments.out, device, shared, workloads, deadline, resume=True,
            tests=tests if lacking is None else None, stage=partial(stage, set(first)),
        )  # fmt: skip
        status = session.run()
    draw(session)
    if lacking is not None:
        print(f"{gpu_tests.TESTS} did not run: {lacking}")
    elif log.is_file():
        print(f"log of the tests: {log}", *gpu_tests.failures(log), sep="\n")
    return status
