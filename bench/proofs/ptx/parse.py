"""Parses PTX text into a Program: instructions with numbered registers, and labels resolved to positions."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from .faults import UnknownInstruction

WIDTHS = {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}  # bits of a register, by the letters of its name


@dataclass(frozen=True)
class Register:
    """A virtual register: its number in the program and its width in bits (1 for a predicate)."""

    number: int
    bits: int


# A vector is a tuple, an immediate is an int or a float; special registers, labels and parameters are names.
Operand: TypeAlias = "Register | Address | tuple[Operand, ...] | int | float | str"


@dataclass(frozen=True)
class Address:
    """[base + offset]. base: a register, or None for the start of shared memory."""

    base: Register | None
    offset: int


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate that enables its lanes, and the value that enables them."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text!r} ({self.source})" if self.source else repr(self.text)

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""

    def unknown(self) -> UnknownInstruction:
        return UnknownInstruction(f"the PTX machine does not know the instruction {self}")


@dataclass
class Program:
    """A kernel. dead[i]: registers that are not used after instruction i. target[i]: the target of a branch."""

    name: str
    threads: int
    parameters: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[str, Register] = field(default_factory=dict)
    dead: list[list[int]] = field(default_factory=list)
    target: dict[int, int] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """Read the single kernel of a PTX module.

    Raises:
        UnknownInstruction: an operand or a register has a form that Triton's PTX does not have today.
    """
    header, body = ptx.split(".reqntid", 1)
    name, parameters = re.findall(r"\.entry\s+(\w+)\(([^)]*)", header)[-1]
    threads, body = re.match(r"\s*(\d+)[^{]*\{(.*)", body, re.DOTALL).groups()  # type: ignore[union-attr]
    program = Program(name, int(threads), re.findall(r"\.param\s+\.(\w+)", parameters))
    labels: dict[str, int] = {}
    for statement, source in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(program.instructions)
        else:
            program.instructions.append(_instruction(statement, source, program.registers))
    for position, instruction in enumerate(program.instructions):
        if instruction.name == "bra":
            program.target[position] = labels[str(instruction.operands[0])]
        elif instruction.name in ("ret", "exit"):
            program.target[position] = len(program.instructions)
    program.dead = _dead(program)
    return program


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Labels and instructions of a function's body, each with its line of Python."""
    source = ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            source = comment.split()[0] if comment.strip() else ""
            source = source.rsplit(":", 1)[0]
        while label := re.match(r"(\$[\w$]+:)\s*", code):
            if label[1].startswith("$L__func_end"):
                return
            yield label[1], source
            code = code[label.end() :]
        if code[:1] not in ("", ".", "{", "}"):
            yield from ((part.strip(), source) for part in code.split(";") if part.strip(" }"))


def _instruction(statement: str, source: str, registers: dict[str, Register]) -> Instruction:
    found = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise UnknownInstruction(f"the PTX machine cannot read {statement!r}")
    negated, guard, opcode, rest = found.groups()
    name, *modifiers = opcode.split(".")
    operands = tuple(_operand(text, registers) for text in _split(rest))
    predicate = _register(guard, registers) if guard else None
    text = " ".join(statement.split())
    return Instruction(name, tuple(modifiers), operands, (predicate, not negated) if predicate else None, text, source)


def _split(text: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def _register(name: str, registers: dict[str, Register]) -> Register | None:
    """The register with this name, numbered on first use; None for a special register such as %tid.x."""
    found = re.fullmatch(r"%([a-z]+)\d+", name)
    if found is None or found[1] not in WIDTHS:
        return None
    return registers.setdefault(name, Register(len(registers), WIDTHS[found[1]]))


def _operand(text: str, registers: dict[str, Register]) -> Operand:
    if (known := registers.get(text)) is not None:
        return known
    if text.startswith("{"):
        return tuple(_operand(part, registers) for part in _split(text.strip("{} ")))
    if text.startswith("[") and "_param_" not in text:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        base = registers.get(found[1]) or _register(found[1], registers) if found else None
        if found is None or (base is None and found[1] != "global_smem"):
            raise UnknownInstruction(f"the PTX machine cannot read the address {text!r}")
        return Address(base, int(found[2] or 0))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return float(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return float(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if text == "global_smem":
        return 0
    register = _register(text.partition("|")[0], registers)
    return text.strip("[]") if register is None else register


def used(operand: Operand) -> Iterator[Register]:
    """The registers in an operand."""
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Address) and operand.base is not None:
        yield operand.base
    elif isinstance(operand, tuple):
        for part in operand:
            yield from used(part)


def _dead(program: Program) -> list[list[int]]:
    """For each instruction, the registers that are dead after it: after their last use, or at the end of its loop.

    Positions in the text are sufficient, because the threads at the lowest position always run first.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, instruction in enumerate(program.instructions):
        guard = () if instruction.guard is None else (instruction.guard[0],)
        for register in used((*instruction.operands, *guard)):
            first.setdefault(register.number, position)
            last[register.number] = position
    loops = sorted((end, start) for end, start in program.target.items() if start <= end)
    for end, start in loops:  # inner loops end before the outer ones
        for number, position in last.items():
            if first[number] < start <= position < end:
                last[number] = end
    dead: list[list[int]] = [[] for _ in program.instructions]
    for number, position in last.items():
        dead[position].append(number)
    return dead
