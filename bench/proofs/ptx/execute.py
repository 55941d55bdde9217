"""Run a parsed kernel over a batch of programs: each instruction once for all lanes that are at it.

After a branch, the threads at the lowest position run first. The others wait until these reach them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import Batch
from .counts import WARP, Counts
from .faults import Fault
from .operations import UNSIGNED
from .parse import Program
from .steps import Getter, Step, guard_of, step

Array = NDArray[Any]
MOST_STEPS = 5_000_000  # instructions of a batch; a kernel with more is taken to be endless
UNDEFINED = 0x7FBADBAD7FBADBAD  # the value of a register before it is written: a NaN


@dataclass
class Prepared:
    """A program with a function for each instruction and the number of warps that executed it."""

    program: Program
    steps: list[Step]
    guards: list[Getter | None]
    executed: list[int]
    undefined: list[Array]

    def counts(self, counts: Counts) -> None:
        """Add the executed instructions to `counts`, then reset to 0."""
        for instruction, warps in zip(self.program.instructions, self.executed, strict=True):
            if warps:
                counts.instructions[instruction.opcode] += warps
            if instruction.name in ("bar", "barrier") and "sync" in instruction.modifiers:
                counts.barriers += warps * WARP // self.program.threads if "warp" not in instruction.modifiers else 0
        self.executed = [0] * len(self.executed)


def prepared(program: Program) -> Prepared:
    """Find the function for each instruction.

    Raises:
        UnknownInstruction: the machine does not know an instruction.
    """
    steps = [step(instruction) for instruction in program.instructions]
    guards = [guard_of(instruction) for instruction in program.instructions]
    undefined = [
        np.full((1, 1), UNDEFINED & (1 << register.bits) - 1, UNSIGNED[register.bits])
        for register in program.registers.values()
    ]
    return Prepared(program, steps, guards, [0] * len(steps), undefined)


def run(kernel: Prepared, batch: Batch) -> None:
    """Execute the kernel from its first instruction until every thread has returned."""
    instructions, steps, executed = kernel.program.instructions, kernel.steps, kernel.executed
    dead, target, undefined, registers = kernel.program.dead, kernel.program.target, kernel.undefined, batch.registers
    end, position = len(instructions), 0
    waiting: dict[int, Array] = {}  # position → lanes; the active lanes are at the lowest position
    for _ in range(MOST_STEPS):
        if waiting and (position == end or position >= min(waiting)):
            position = _meet(batch, waiting, position, end)
        if position == end:
            return
        executed[position] += batch.warps
        if position in target:
            position = _branch(batch, kernel, waiting, position, target[position])
            continue
        steps[position](batch)
        for number in dead[position]:
            registers[number] = undefined[number]
        position += 1
    raise Fault(f"{kernel.program.name} does not end")


def _meet(batch: Batch, waiting: dict[int, Array], position: int, end: int) -> int:
    """Continue with the threads at the lowest position. Threads at the same position run together."""
    present = np.ones((1, 1), bool) if batch.active is None else batch.active
    waiting[position] = waiting[position] | present if position in waiting else present
    position = min(waiting)
    batch.activate(waiting.pop(position))
    return position


def _branch(batch: Batch, kernel: Prepared, waiting: dict[int, Array], position: int, target: int) -> int:
    guard = kernel.guards[position]
    if guard is None:
        return target
    taken = guard(batch) if batch.active is None else guard(batch) & batch.active
    here = np.True_ if batch.active is None else batch.active
    left = here & ~taken
    if not left.any():
        return target
    if taken.any():
        waiting[target] = waiting[target] | taken if target in waiting else taken
        batch.activate(left)
    return position + 1
