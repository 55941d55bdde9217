"""What the loops that stream a tensor cost, read from sm_90 machine code: instructions and barriers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .compile import Launch, machine_code

# `/*0a30*/  @P0 BRA 0x9a0 ;`: the address, and the operation behind a predicate.
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)

# Of an SM with compute capability 9.0: registers of a quarter, which it gives to a warp 256 at a time; bytes of shared
# memory, of which every program takes 1,024 more than it asks for; the most warps and programs.
QUARTER_REGISTERS, REGISTER_UNIT, SHARED_BYTES, SHARED_EXTRA, WARPS, PROGRAMS = 16384, 256, 233_472, 1024, 64, 32


@dataclass(frozen=True)
class HotLoop:
    """A loop over tiles. work: the direction and what is done with x, as in "forward apply".

    instructions: a thread's for each of its elements. barriers: for each tile.
    """

    work: str
    instructions: float
    barriers: int


def hot_loops(launch: Launch) -> tuple[HotLoop, ...]:
    """The loops of a kernel that stream x, in order: none of a one-pass kernel, two of a slab.

    A loop that stores is an apply, but where dr is stored with the sums; one that exchanges values between the threads
    is not hot: it combines partial results.
    """
    direction, _, kernel = launch.name.partition("_")
    constants, names = launch.compiled.src.constants, launch.compiled.src.fn.arg_names
    if kernel not in ("slab", "statistics", "sums", "combine_apply"):
        return ()
    tile = [constants[names.index(name),] for name in ("BLOCK_S", "BLOCK_C")]
    elements = tile[0] * tile[1] / (32 * launch.num_warps)
    first = "statistics" if direction == "forward" else "sums"
    found = []
    for operations in loops(machine_code(launch.compiled.asm["cubin"])):
        names_in = [operation.partition(".")[0] for operation in operations]
        if "SHFL" in names_in or not {"LDG", "LDGSTS"} & set(names_in):
            continue
        work = "apply" if "STG" in names_in and kernel != first else first
        if kernel == "combine_apply" and work != "apply":
            continue
        found.append(HotLoop(f"{direction} {work}", len(operations) / elements, names_in.count("BAR")))
    return tuple(found)


def loops(code: str) -> list[list[str]]:
    """The operations of each loop in disassembled code, from where a branch jumps back to up to that branch."""
    instructions = [(int(address, 16), operation, rest) for address, operation, rest in INSTRUCTION.findall(code)]
    place = {address: number for number, (address, _, _) in enumerate(instructions)}
    found = []
    for number, (address, operation, rest) in enumerate(instructions):
        target = re.findall(r"0x([0-9a-f]+)", rest)
        if operation.startswith("BRA") and target and int(target[-1], 16) < address:
            found.append((place[int(target[-1], 16)], number))
    return [[operation for _, operation, _ in instructions[start : end + 1]] for start, end in sorted(found)]


def programs_per_sm(registers: int, num_warps: int, shared: int) -> int:
    """How many programs an SM of compute capability 9.0 holds at a time."""
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = QUARTER_REGISTERS // a_warp * 4 // num_warps
    return min(by_registers, WARPS // num_warps, SHARED_BYTES // (shared + SHARED_EXTRA), PROGRAMS)
