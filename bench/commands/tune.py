"""`tune`: compare the constants and branches of `kernels/plan.py` on this machine. Prints times; changes nothing."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from fastenc.kernels import launch, plan
from fastenc.kernels.layout import MEMORY_FORMAT

from ..arguments import device_problem, refuse
from ..console import Progress, tables
from ..engine.timing import Work, calls_per_sample, sample

PURPOSE = "compare the branches and constants of the launch plans on this GPU and print the best; changes nothing"
SAMPLES = 5
DTYPES = (torch.bfloat16, torch.float32)
Shape = tuple[int, int, int]  # N, C, S

# Rows that are split, slabs, and short rows that are held on chip. Each constant matters for one of them.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "split": ((1, 64, 31 * 32 * 30), (8, 64, 31 * 32 * 30), (2, 128, 32**3), (2, 32, 128**3)),
    "slab": ((1, 64, 16 * 16 * 15), (8, 128, 16 * 16 * 15), (32, 128, 16 * 16 * 15)),
    "one pass": ((8, 128, 512), (8, 256, 64), (8, 512, 8), (32, 256, 512)),
}
# Tiny shapes for the interpreter, which show that the sweep runs. Its times say nothing about a GPU.
TINY: dict[str, tuple[Shape, ...]] = {
    "split": ((1, 2, 20000),), "slab": ((1, 8, 5000),), "one pass": ((1, 8, 64),),
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A constant of the plan: its name there, its key if it is a table, the values to try, and its branch."""

    name: str
    key: Any
    values: tuple[Any, ...]
    backward: bool
    branch: str

    @property
    def now(self) -> Any:
        """The current value."""
        value = getattr(plan, self.name)
        return value if self.key is None else value[self.key]

    def __str__(self) -> str:
        return self.name if self.key is None else f"{self.name}[{self.key}]"


TILES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
COMBINED_APART = tuple((volume, chunk_bytes, 0.0) for volume, chunk_bytes, _ in plan.PARTIALS)
COMBINED_IN_APPLY = ((16_000_000, 1536, 1.0), *plan.PARTIALS[1:])
# A slab of at most 0 positions is split: the branches compared. With SLAB_CHUNKS 1 every slab is two launches.
CONSTANTS = tuple(
    Constant(name, key, values, backward, branch)
    for backward in (False, True)
    for name, key, values, branch in (
        ("STREAM", backward, TILES, "split"),
        ("STREAM", backward, TILES, "slab"),
        ("SLAB_POSITIONS", True, (0, plan.SLAB_POSITIONS[True]), "slab"),
        ("SLAB_CHUNKS", None, (1, 2, 3, 5, 1000), "slab"),
        ("SLAB_PROGRAMS_PER_SM", None, (1, 2, 4), "slab"),
        ("REDUCED_VECTOR", None, (2, 4, 8), "one pass"),
        ("PARTIALS", None, (plan.PARTIALS, COMBINED_APART, COMBINED_IN_APPLY), "split"),
        ("SLICE_BYTES", None, (32, 64, 128), "split"),
        ("PROGRAMS_PER_SM", None, (2, 4, 8, 16), "split"),
        ("COMBINE_TILE", None, (512, 1024, 2048), "split"),
        ("ONE_PASS", (True, backward), tuple((*plan.ONE_PASS[True, backward][:2], n) for n in (8, 16, 32)), "one pass"),
    )
)


@contextmanager
def held_at(constant: Constant, value: Any) -> Iterator[None]:
    """Inside the block, plans use `value` for `constant`."""
    before = getattr(plan, constant.name)
    setattr(plan, constant.name, value if constant.key is None else {**before, constant.key: value})
    launch.prepared.cache_clear()
    try:
        yield
    finally:
        setattr(plan, constant.name, before)
        launch.prepared.cache_clear()


def seconds(shape: Shape, dtype: torch.dtype, backward: bool, device: torch.device) -> float:
    """Median seconds of one direction of the operation on channels-last x (N, C, S, 1, 1)."""
    from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
    from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward

    N, C, S = shape
    x = torch.randn(N, C, S, 1, 1, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMAT[5])
    weight, bias, slope = torch.ones(C, device=device), torch.zeros(C, device=device), torch.rand(C, device=device)
    if backward:
        _, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5)
        dy = torch.randn_like(x)
        work = Work(lambda: instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics), queued=True)
    else:
        work = Work(lambda: instance_norm_prelu_forward(x, weight, bias, slope, 1e-5), queued=True)
    calls = calls_per_sample(work, device) if device.type == "cuda" else 1
    return median(sample(work, calls, device) for _ in range(SAMPLES if device.type == "cuda" else 1))


def sweep(
    constant: Constant, shapes: Sequence[Shape], measure: Callable[[Shape, torch.dtype, bool], float]
) -> dict[Any, float]:
    """For each value, the geometric mean of the seconds over shapes and dtypes. Infinite if a launch fails."""
    found = {}
    for value in constant.values:
        with held_at(constant, value):
            try:
                logs = [math.log(measure(shape, dtype, constant.backward)) for shape in shapes for dtype in DTYPES]
                found[value] = math.exp(sum(logs) / len(logs))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                print(f"{constant} = {value}: {type(error).__name__}: {error}", file=sys.stderr)
                found[value] = math.inf
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu interprets the kernels on tiny shapes: this shows that the sweep works, but its times mean nothing",
    )
    parser.epilog = "exit status: 0 done; 2 no GPU"


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    problem = device_problem(arguments.device)
    if problem is not None:
        return refuse("tune", problem)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}, geometric mean of the medians over shapes, bfloat16 and float32")
        mode: Any = nullcontext()
    else:
        from ..proofs.interpret import interpreted

        print("interpreted on a CPU: these times say nothing of a GPU")
        mode = interpreted()
    begin = time.monotonic()
    with mode:
        for constant in CONSTANTS:
            shapes = (SHAPES if on_gpu else TINY)[constant.branch]
            with Progress(len(constant.values) * len(shapes) * len(DTYPES)) as progress:
                times = sweep(constant, shapes, partial(_reported, progress, constant, device))
            _print(constant, times)
    print(f"{time.monotonic() - begin:.0f} s; kernels/plan.py is unchanged")
    return 0


def _reported(
    progress: Progress, constant: Constant, device: torch.device, shape: Shape, dtype: torch.dtype, backward: bool
) -> float:
    """`seconds`, with progress."""
    progress.say(f"{constant} = {constant.now}", f"{'×'.join(map(str, shape))}, {dtype}")
    taken = seconds(shape, dtype, backward, device)
    progress.advance(1)
    return taken


def _print(constant: Constant, times: dict[Any, float]) -> None:
    best = min(times, key=lambda value: times[value])
    direction = "backward" if constant.backward else "forward"
    print(f"\n{constant}, {direction}, {constant.branch}: now {constant.now}, best {best}", flush=True)
    rows = [
        (str(value), "failed" if math.isinf(taken) else f"{taken * 1e6:.1f}", "now" if value == constant.now else "")
        for value, taken in times.items()
    ]
    print(*tables(("value", "µs", ""), [rows]))
