"""Compile the kernels that the real launchers would launch, for any GPU, and read the machine code.

recorded(90)          inside the block, launchers run on CPU tensors; launches are recorded instead of executed
resources(cubin)      registers, stack and shared memory, as the driver would report them
machine_code(cubin)   disassembled
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .driver import StandInDriver
from .interpret import kernel_modules


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel's name, its grid, and the compiled kernel."""

    name: str
    grid: tuple[int, int, int]
    compiled: Any

    @property
    def key(self) -> str:
        """Equal for launches that run the same compiled variant."""
        return self.compiled.hash

    @property
    def ttir(self) -> str:
        """The kernel in Triton's intermediate representation."""
        return self.compiled.asm["ttir"]

    @property
    def num_warps(self) -> int:
        return self.compiled.metadata.num_warps


class _RecordingDriver(StandInDriver):
    """Launches nothing."""

    def __init__(self, architecture: int | str) -> None:
        super().__init__(architecture, lambda *arguments: (object(), object(), 0, 0, 1024))

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def recorded(architecture: int | str, *modules: ModuleType) -> Iterator[list[Launch]]:
    """Inside the block, launchers run on CPU tensors and compile for `architecture`. Yields the launches, in order."""
    launches: list[Launch] = []
    kernels = {
        id(kernel): kernel
        for module in (modules or kernel_modules())
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction)
    }.values()
    run = JITFunction.run

    def run_and_record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=warmup, **keywords)
        launches.append(Launch(self.__name__, (*grid, 1, 1)[:3], compiled))
        return compiled

    with ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(mock.patch.dict(kernel.device_caches, clear=True))
        stack.enter_context(mock.patch.object(driver, "_active", _RecordingDriver(architecture)))
        stack.enter_context(mock.patch.object(JITFunction, "run", run_and_record))
        yield launches


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG (registers per thread), STACK and LOCAL (bytes, including spills) and SHARED (bytes)."""
    report = _cuobjdump("-res-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def machine_code(cubin: bytes) -> str:
    """The machine code, disassembled."""
    return _cuobjdump("-sass", cubin)
