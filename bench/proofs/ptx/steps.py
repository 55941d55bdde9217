"""Each instruction as a function of a batch of programs. `step` is called once per instruction, for each kernel.

A register holds an array that broadcasts to (programs, threads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import operations
from .batch import Batch
from .counts import WARP
from .faults import Fault
from .memory import Access
from .operations import UNSIGNED, bits_of, dtype_of
from .parse import Address, Instruction, Operand, Register

Array = NDArray[Any]
Step: TypeAlias = Callable[[Batch], None]
Getter: TypeAlias = Callable[[Batch], Array]

# Without effect on a machine that has no caches and runs all programs in one thread.
IGNORED = ("fence", "membar", "prefetch", "griddepcontrol", "nanosleep")


def _get(operand: Operand, type_: str) -> Getter:
    """A function that reads an operand as a type. bfloat16 is widened, and a pair of float32 gets its own axis."""
    if type_ == "bf16":
        raw = _get(operand, "b16")
        return lambda batch: operations.widened(raw(batch))
    if type_ == "f32x2":
        raw = _get(operand, "b64")
        return lambda batch: operations.pair(raw(batch))
    dtype = dtype_of(type_)
    if isinstance(operand, Register):
        number, narrower = operand.number, UNSIGNED[bits_of(type_)]
        if operand.bits > bits_of(type_):
            return lambda batch: batch.registers[number].view(UNSIGNED[operand.bits]).astype(narrower).view(dtype)

        def register(batch: Batch) -> Array:
            value = batch.registers[number]
            return value if value.dtype is dtype else value.view(dtype)

        return register
    if isinstance(operand, str):
        return _special(operand, dtype)
    if isinstance(operand, int) and dtype.kind != "f":
        constant = np.full((1, 1), operand & (1 << bits_of(type_)) - 1, UNSIGNED[bits_of(type_)]).view(dtype)
    elif isinstance(operand, int):
        constant = np.full((1, 1), operand, UNSIGNED[bits_of(type_)]).view(dtype)
    elif isinstance(operand, float):
        constant = np.full((1, 1), operand, f"f{bits_of(type_) // 8}").view(dtype)
    else:
        raise TypeError(f"no value of type {type_} in {operand}")
    return lambda batch: constant


def _special(name: str, dtype: np.dtype[Any]) -> Getter:
    axis = "xyz".find(name[-1])
    kinds: dict[str, Callable[[Batch], Any]] = {
        "%tid": lambda batch: np.arange(batch.threads)[None] * (axis == 0),
        "%ntid": lambda batch: np.full((1, 1), batch.threads if axis == 0 else 1),
        "%nctaid": lambda batch: np.full((1, 1), batch.grid[axis]),
        "%ctaid": lambda batch: batch.programs // int(np.prod(batch.grid[:axis])) % batch.grid[axis],
        "%laneid": lambda batch: np.arange(batch.threads)[None] % WARP,
    }
    found = kinds[name.partition(".")[0]]
    return lambda batch: found(batch).astype(dtype)


def _put(operand: Operand, guard: Getter | None) -> Callable[[Batch, Array], None]:
    """A function that writes a register, in the lanes that are active and enabled by the guard."""
    if not isinstance(operand, Register):
        return lambda batch, value: None  # `_`, an unused result
    number, bits = operand.number, operand.bits
    itemsize = UNSIGNED[bits].itemsize

    def put(batch: Batch, value: Array) -> None:
        if value.dtype.itemsize != itemsize:
            value = value.astype(UNSIGNED[bits])
        mask = _mask(batch, guard)
        if mask is not None:
            value = np.where(mask, value, batch.registers[number].view(value.dtype))
        batch.registers[number] = value

    return put


def _mask(batch: Batch, guard: Getter | None) -> Array | None:
    if guard is None:
        return batch.active
    return guard(batch) if batch.active is None else guard(batch) & batch.active


def guard_of(instruction: Instruction) -> Getter | None:
    if instruction.guard is None:
        return None
    register, wanted = instruction.guard
    value = _get(register, "pred")
    return value if wanted else lambda batch: ~value(batch)


def step(instruction: Instruction) -> Step:
    """The function that executes an instruction on a batch.

    Raises:
        UnknownInstruction: the machine does not know the instruction or this form of it.
    """
    try:
        found = _lookup(instruction, guard_of(instruction))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise instruction.unknown() from error
    if found is None:
        raise instruction.unknown()
    return found


def _lookup(instruction: Instruction, guard: Getter | None) -> Step | None:
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("bra", "ret", "exit") or name in IGNORED or modifiers[:2] == ("warp", "sync"):
        return lambda batch: None
    if name == "mov" and any(isinstance(operand, tuple) for operand in instruction.operands):
        return _pack(instruction, guard)
    if name == "ld" and modifiers[0] == "param":
        return _parameter(instruction, guard)
    if name in ("ld", "st") and {"global", "shared"} & set(modifiers):
        return _load(instruction, guard) if name == "ld" else _store(instruction, guard)
    if name == "cp" and modifiers[0] == "async":
        return _asynchronous(instruction, guard)
    if name in ("ldmatrix", "stmatrix") and "m8n8" in modifiers and guard is None:
        return _matrix(instruction)
    if name in ("bar", "barrier") and "sync" in modifiers and instruction.operands == (0,) and guard is None:
        return lambda batch: batch.shared.barrier(batch.rows(instruction))
    if name == "shfl":
        return _shuffle(instruction, guard)
    if name == "createpolicy":
        put = _put(instruction.operands[0], guard)
        return lambda batch: put(batch, np.zeros((1, 1), np.uint64))
    operation = operations.operation(instruction)
    if operation is None or len(operation.types) != len(instruction.operands) - 1:
        return None
    return _arithmetic(instruction, guard, operation)


def _arithmetic(instruction: Instruction, guard: Getter | None, operation: operations.Operation) -> Step:
    put = _put(instruction.operands[0], guard)
    getters = [_get(operand, type_) for operand, type_ in zip(instruction.operands[1:], operation.types, strict=True)]
    compute = operation.compute
    if instruction.type == "f32x2":
        return lambda batch: put(
            batch, np.ascontiguousarray(compute(*[get(batch) for get in getters])).view(np.uint64)[..., 0]
        )
    return lambda batch: put(batch, compute(*[get(batch) for get in getters]))


def _pack(instruction: Instruction, guard: Getter | None) -> Step:
    """mov between a register and the vector of its parts, lowest part first."""
    target, source = instruction.operands
    bits = bits_of(instruction.type)
    dtype = UNSIGNED[bits]
    if isinstance(source, tuple):
        width = bits // len(source)
        parts = [_get(part, f"b{width}") for part in source]
        put = _put(target, guard)

        def pack(batch: Batch) -> None:
            value = parts[0](batch).astype(dtype)
            for place, part in enumerate(parts[1:], 1):
                value = value | (part(batch).astype(dtype) << dtype.type(width * place))
            put(batch, value)

        return pack
    if not isinstance(target, tuple):
        raise instruction.unknown()
    width = bits // len(target)
    get, puts = _get(source, f"b{bits}"), [_put(part, guard) for part in target]

    def unpack(batch: Batch) -> None:
        value = get(batch)
        for place, put in enumerate(puts):
            put(batch, (value >> dtype.type(width * place)).astype(UNSIGNED[width]))

    return unpack


def _parameter(instruction: Instruction, guard: Getter | None) -> Step:
    number = int(str(instruction.operands[1]).rpartition("_")[2])
    dtype, put = dtype_of(instruction.type), _put(instruction.operands[0], guard)

    def parameter(batch: Batch) -> None:
        value = batch.arguments[number]
        if isinstance(value, float):
            put(batch, np.full((1, 1), value, f"f{dtype.itemsize}"))
        else:
            put(batch, np.full((1, 1), value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype))

    return parameter


def _address(operand: Operand) -> Getter:
    if not isinstance(operand, Address):
        raise TypeError(f"no address: {operand}")
    base = _get(0, "u32") if operand.base is None else _get(operand.base, f"u{operand.base.bits}")
    return lambda batch: base(batch).astype(np.int64) + operand.offset


def _access(instruction: Instruction, guard: Getter | None, address: Getter, size: int, count: int) -> Any:
    """A function that returns the Access of a memory instruction on a batch."""
    return lambda batch: Access(
        address(batch), _mask(batch, guard), size, count, batch.shape, batch.programs, instruction
    )


def _elements(instruction: Instruction, vector: Operand) -> tuple[tuple[Operand, ...], int]:
    """The registers of a load or store, and the bytes of each. Raises TypeError if they do not match the type."""
    registers = vector if isinstance(vector, tuple) else (vector,)
    count = next((int(name[1:]) for name in instruction.modifiers if name in ("v2", "v4", "v8")), 1)
    size = bits_of(instruction.type) // 8
    if len(registers) != count or size * count > 32:
        raise TypeError("a vector of another length")
    return registers, size


def _load(instruction: Instruction, guard: Getter | None) -> Step:
    vector, address, *_ = instruction.operands  # a cache policy may follow
    registers, size = _elements(instruction, vector)
    access = _access(instruction, guard, _address(address), size, len(registers))
    puts = [_put(register, guard) for register in registers]
    everywhere, signed = "global" in instruction.modifiers, dtype_of(instruction.type)

    def load(batch: Batch) -> None:
        memory = batch.memory if everywhere else batch.shared
        for put, value in zip(puts, memory.load(access(batch)), strict=True):
            put(batch, value.view(signed))

    return load


def _store(instruction: Instruction, guard: Getter | None) -> Step:
    address, vector, *_ = instruction.operands
    registers, size = _elements(instruction, vector)
    access = _access(instruction, guard, _address(address), size, len(registers))
    values = [_get(register, f"b{8 * size}") for register in registers]
    everywhere = "global" in instruction.modifiers

    def store(batch: Batch) -> None:
        memory = batch.memory if everywhere else batch.shared
        memory.store(access(batch), [value(batch) for value in values])

    return store


def _asynchronous(instruction: Instruction, guard: Getter | None) -> Step:
    """cp.async: a copy from global to shared memory, the end of a group of copies, or a wait for groups."""
    modifiers, operands = instruction.modifiers, instruction.operands
    if modifiers[1] in ("commit_group", "wait_group", "wait_all"):
        if guard is not None:
            raise instruction.unknown()
        if modifiers[1] == "commit_group":
            return lambda batch: batch.shared.commit(batch.rows(instruction))
        pending = int(operands[0]) if modifiers[1] == "wait_group" else None  # type: ignore[arg-type]
        return lambda batch: batch.shared.wait(batch.rows(instruction), pending)
    if modifiers[1] not in ("ca", "cg") or operands[2] not in (4, 8, 16):
        raise instruction.unknown()
    words = int(operands[2]) // 4
    target = _access(instruction, guard, _address(operands[0]), 4, words)
    origin, length = _address(operands[1]), _get(operands[3] if len(operands) > 3 else 4 * words, "u32")

    def copy(batch: Batch) -> None:
        mask = _mask(batch, guard)
        read = length(batch) if mask is None else np.where(mask, length(batch), 0)
        if not ((read == 0) | (read == 4 * words)).all():
            raise instruction.unknown()  # a partial copy, which is not supported
        reads = read != 0
        source = Access(origin(batch), reads, 4, words, batch.shape, batch.programs, instruction)
        values = batch.memory.load(source, "copy")
        batch.shared.copy(target(batch), [np.where(reads, value, np.uint32(0)) for value in values])

    return copy


def _matrix(instruction: Instruction) -> Step:
    """ldmatrix, stmatrix: 8×8 matrices of 16-bit elements, whose rows the lanes 8j … 8j + 7 of a warp address.

    A lane holds two neighbours of a row, or of a column where they are transposed.
    """
    loads = instruction.name == "ldmatrix"
    vector, address_operand = instruction.operands if loads else reversed(instruction.operands)
    registers = vector if isinstance(vector, tuple) else (vector,)
    if f"x{len(registers)}" not in instruction.modifiers or instruction.type != "b16":
        raise instruction.unknown()
    address = _address(address_operand)
    puts, values = [_put(register, None) for register in registers], [_get(register, "b32") for register in registers]
    lane = np.arange(WARP)
    rows, columns = lane // 4, 2 * (lane % 4)
    if "trans" in instruction.modifiers:
        places = [(columns, rows), (columns + 1, rows)]
    else:
        places = [(rows, columns), (rows, columns + 1)]

    def matrix(batch: Batch) -> None:
        starts = np.broadcast_to(address(batch), batch.shape).reshape(-1, WARP)
        for j, (put, value) in enumerate(zip(puts, values, strict=True)):
            halves = []
            for half, (row, column) in enumerate(places):
                at = (starts[:, 8 * j + row] + 2 * column).reshape(batch.shape)
                access = Access(at, batch.active, 2, 1, batch.shape, batch.programs, instruction)
                if loads:
                    halves += batch.shared.load(access)
                else:
                    batch.shared.store(access, [(value(batch) >> np.uint32(16 * half)).astype(np.uint16)])
            if loads:
                put(batch, halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16)))

    return matrix


def _shuffle(instruction: Instruction, guard: Getter | None) -> Step:
    """shfl.sync over whole warps."""
    target, source, distance, clamp, members = instruction.operands
    kind = instruction.modifiers[1]
    if members not in (-1, 0xFFFFFFFF) or clamp != (0 if kind == "up" else 31):
        raise instruction.unknown()
    put, get, by = _put(target, guard), _get(source, "b32"), _get(distance, "u32")
    lanes: dict[str, Callable[[Array, Array], Array]] = {
        "bfly": lambda lane, by: lane ^ by,
        "idx": lambda lane, by: by & 31,
        "up": lambda lane, by: np.where(lane >= by, lane - by, lane),
        "down": lambda lane, by: np.where(lane + by < WARP, lane + by, lane),
    }
    chosen = lanes[kind]

    def shuffle(batch: Batch) -> None:
        if batch.active is not None:
            warps = np.broadcast_to(batch.active, batch.shape).reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault(f"not all lanes of a warp reach {instruction}")
        value = get(batch)
        if value.shape[1] > 1 or kind == "idx":
            value = np.broadcast_to(value, (max(len(value), len(by(batch))), batch.threads))
            thread = np.arange(batch.threads)
            lane = (thread & ~31) | chosen(thread & 31, by(batch).astype(np.int64) & 31)
            value = value[:, lane[0]] if len(lane) == 1 else np.take_along_axis(value, lane, axis=1)
        put(batch, value)

    return shuffle
