"""A replacement for Triton's driver that executes compiled PTX, so that launchers run on CPU tensors.

Nothing is assembled: the "binary" that Triton passes to the driver is the PTX itself.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from ..driver import StandInDriver
from .batch import Batch
from .counts import Counts
from .execute import Prepared, prepared, run
from .faults import Fault
from .memory import Global, Shared
from .operations import bits_of
from .parse import parse

LANES = 16384  # threads that run at a time, so that their registers stay in the cache
POISON = 0xFF  # each byte of a tensor from torch.empty: a NaN in every dtype, which arithmetic never produces

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """An executed launch: the kernel's name, its grid, the warps of a program, and its counts."""

    name: str
    grid: Grid
    num_warps: int
    counts: Counts


@dataclass
class Machine:
    """What `executing` yields.

    launches: the launches so far.
    edit: gets a kernel's name and PTX, and returns the PTX to execute.
    choose: gets a kernel's name and grid, and returns the programs to run. None: all.
    """

    launches: list[Launch] = field(default_factory=list)
    edit: Callable[[str, str], str] = lambda name, ptx: ptx
    choose: Callable[[str, Grid], Iterable[int]] | None = None

    def launch(self, ptx: str, grid: Grid, arguments: list[Any], num_warps: int, shared_bytes: int) -> None:
        """Execute the programs of the grid.

        Raises:
            Fault: the code does something that is an error on a GPU.
            UnknownInstruction: the machine does not know an instruction.
        """
        name = parsed(ptx).program.name
        kernel = parsed(self.edit(name, ptx))
        program = kernel.program
        if program.threads != 32 * num_warps:
            raise Fault(f"{name} is compiled for {program.threads} threads and launched with {num_warps} warps")
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        counts = Counts()
        granule = {space: _granule(kernel, space) for space in ("global", "shared")}
        memory = Global(((s.data_ptr(), s.nbytes()) for s in storages), granule["global"], counts)
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        values = [float(v) if kind == "f32" else int(v) for v, kind in zip(values, program.parameters, strict=False)]
        values += [0] * (len(program.parameters) - len(values))  # scratch memory, which these kernels do not use
        numbers = np.array(sorted(range(prod(grid)) if self.choose is None else self.choose(name, grid)), np.int64)
        step = max(1, LANES // program.threads)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, len(numbers), step):
                    programs = numbers[first : first + step, None]
                    shared = Shared(len(programs), shared_bytes, granule["shared"])
                    batch = Batch(programs, program.threads, grid, values, memory, shared, list(kernel.undefined))
                    run(kernel, batch)
            memory.finish()
        except Fault as fault:
            raise Fault(f"{name}, grid {grid}: {fault}") from None
        finally:
            kernel.counts(counts)
        self.launches.append(Launch(name, grid, num_warps, counts))


@lru_cache(maxsize=128)
def parsed(ptx: str) -> Prepared:
    """The kernel of this PTX, ready to run."""
    enabled = gc.isenabled()
    gc.disable()  # the collector would visit the many new objects repeatedly, which takes three quarters of the time
    try:
        return prepared(parse(ptx))
    finally:
        if enabled:
            gc.enable()


def _granule(kernel: Prepared, space: str) -> int:
    """Bytes of the smallest access to this memory, at most a word. Races are detected in this unit."""
    sizes = [4]
    for instruction in kernel.program.instructions:
        if space in instruction.modifiers and instruction.name in ("ld", "st", "ldmatrix", "stmatrix"):
            sizes.append(bits_of(instruction.type) // 8)
    return min(sizes)


class _Driver(StandInDriver):
    """Executes launches on the machine."""

    def __init__(self, architecture: int, machine: Machine) -> None:
        super().__init__(architecture, lambda name, binary, shared, device: (None, binary.decode(), 0, 0, 1024))
        self.machine = machine

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
            arguments = rest[4:]  # after the packed metadata, the launch's metadata and two hooks
            given = [value for value, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
            # The currently active driver, because a compiled kernel outlives the block in which it was compiled.
            driver.active.machine.launch(ptx, (x, y, z), given, metadata.num_warps, metadata.shared)

        return launch

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # Triton caches kernels by device: each architecture is one


def _without_assembler(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook for its compiler stages. Replaces ptxas by the identity; without arguments, returns a cache key."""
    if not arguments:
        return "executed as PTX", "'executed as PTX'"
    stages = arguments[1]
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextmanager
def _driver(architecture: int, machine: Machine) -> Iterator[None]:
    """Inside the block, Triton compiles for the machine and launches on it."""
    active = mock.patch.object(driver, "_active", _Driver(architecture, machine))
    with knobs.runtime.scope(), knobs.cache.scope(), active:
        knobs.runtime.add_stages_inspection_hook = _without_assembler
        # A separate cache: the keys of Triton 3.6 ignore the hook, so it would later use the PTX as machine code.
        knobs.cache.dir = os.path.join(knobs.cache.dir, "executed")
        yield


def unwritten(tensor: Tensor) -> int:
    """The number of elements of a tensor from torch.empty that are still unwritten."""
    size = tensor.element_size()
    return int((tensor.detach().contiguous().view(-1, 1).view(torch.uint8) == POISON).view(-1, size).all(1).sum())


@contextmanager
def _poisoned() -> Iterator[None]:
    """Inside the block, torch.empty and torch.empty_like return poison."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*arguments: Any, **keywords: Any) -> Tensor:
            tensor = empty(*arguments, **keywords)
            if tensor.device.type == "cpu" and tensor.numel():
                tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(POISON)
            return tensor

        return filled

    with mock.patch.multiple(torch, empty=poisoned(torch.empty), empty_like=poisoned(torch.empty_like)):
        yield


@contextmanager
def executing(architecture: int = 90, choose: Callable[[str, Grid], Iterable[int]] | None = None) -> Iterator[Machine]:
    """Inside the block, Triton launches run their compiled PTX on CPU tensors.

    Args:
        architecture: the compute capability to compile for, such as 80, 90 or 100.
        choose: gets a kernel's name and grid and returns the programs to run, for tensors that are too large to run
            completely. torch.empty is not poisoned then.
    """
    machine = Machine(choose=choose)
    with _driver(architecture, machine), _poisoned() if choose is None else nullcontext():
        yield machine
