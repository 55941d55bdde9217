"""The arithmetic of PTX in numpy, for all instructions that do not access memory.

`operation` is called once per instruction, when a kernel is prepared. It returns the operands' types and a function of
arrays. Arrays have any shape that broadcasts to (programs, threads), so a value that all threads of a program share is
stored once. bfloat16 operands are widened to float32. A pair of float32 has a last axis of length 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .parse import Instruction

Array = NDArray[Any]

BITS = {"pred": 1, "bf16": 16, "f32x2": 64, "f16x2": 32, "bf16x2": 32}
UNSIGNED = {1: np.dtype(np.bool_), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
FLOATS = ("f16", "bf16", "f32", "f64", "f32x2")


class Operation(NamedTuple):
    """types: of the source operands, in order. compute: the function from the operands to the result."""

    types: tuple[str, ...]
    compute: Callable[..., Array]


@cache
def bits_of(type_: str) -> int:
    """The width of a PTX type in bits."""
    return BITS.get(type_) or int(type_.lstrip("busf"))


@cache
def dtype_of(type_: str) -> np.dtype[Any]:
    """The numpy dtype of a PTX type, or of its bits if numpy lacks the type."""
    if type_ == "pred" or type_[0] == "b" or type_ in BITS:
        return UNSIGNED[bits_of(type_)]
    return np.dtype(f"{type_[0]}{bits_of(type_) // 8}".replace("s", "i"))


def widened(bits: Array) -> Array:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """float32 → the bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), nearest.astype(np.uint16))


def to_float16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


def pair(values: Array) -> Array:
    """64-bit registers as two float32 each, on a last axis."""
    return np.ascontiguousarray(values)[..., None].view(np.float32)


def _select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(c.dtype)


def _shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def _field(a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits of a from `start`, sign-extended if a is signed."""
    bits = 8 * a.dtype.itemsize
    room = bits - length.astype(a.dtype)
    return (a << (room - start.astype(a.dtype))) >> room


def _funnel(a: Array, b: Array, count: Array, left: bool) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    count = (count & np.uint32(31)).astype(np.uint64)
    return (((both << count) >> np.uint64(32)) if left else (both >> count)).astype(np.uint32)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight bytes of (b, a), or its sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros((1, 1), np.uint32)
    for place in range(4):
        which = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> (8 * (which & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(which & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        result = result | (byte << np.uint32(8 * place))
    return result


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: the bit of `table` whose number is given by the bits of a, b and c."""
    result = np.zeros((1, 1), a.dtype)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            terms = [value if row & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def _quotient(a: Array, b: Array) -> Array:
    """Division toward zero. All ones if b is 0, as on the hardware."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(a), a // np.where(b == 0, b.dtype.type(1), b))
    down = a // np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a.dtype.type(-1), down + ((down < 0) & (down * b != a)))


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _high(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, floating: bool) -> Callable[[Array, Array], Array] | None:
    """The function of a comparison. For floats, `ltu` and similar names are also true for NaN, others are not."""
    if floating and name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if floating and name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if floating and name.endswith("u") and name[:-1] in COMPARISONS:
        compare = COMPARISONS[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return COMPARISONS.get(name)


def _convert(target: str, source: str, modifiers: tuple[str, ...]) -> Callable[[Array], Array] | None:
    kind = dtype_of(target)
    if target == "bf16":
        return (lambda a: to_bfloat16(a.astype(np.float32))) if source in ("f32", "f16") else None
    if target == "f16":
        return (lambda a: to_float16(a.astype(np.float32))) if source in ("f32", "bf16") else None
    if source in FLOATS and target not in FLOATS:
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        chosen = next((rounding[name] for name in modifiers if name in rounding), None)
        if chosen is None or kind.itemsize == 8:
            return None
        limits = np.iinfo(kind)
        return lambda a: np.nan_to_num(np.clip(chosen(a.astype(np.float64)), limits.min, limits.max)).astype(kind)
    return lambda a: a.astype(kind)


UNARY: dict[str, Callable[..., Array]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt,
    "rcp": lambda a: a.dtype.type(1) / a,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    "ex2": np.exp2, "lg2": np.log2,
}  # fmt: skip
BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def operation(instruction: Instruction) -> Operation | None:
    """The operation of an arithmetic instruction, or None if this module does not know it."""
    name, modifiers, type_ = instruction.name, instruction.modifiers, instruction.type
    floating = type_ in FLOATS
    if name == "setp":
        compare = _comparison(modifiers[0], floating)
        return Operation((type_, type_), compare) if compare and len(modifiers) == 2 else None
    if name == "cvt":
        return _conversion(modifiers)
    if name == "selp":
        return Operation((_raw(type_), _raw(type_), "pred"), _select)
    if name == "mov":
        return Operation((_raw(type_),), lambda a: a)
    if type_ in ("f16", "bf16"):
        return _mixed(name, modifiers)
    if name in UNARY and not {"sat", "rm", "rp", "rz"} & set(modifiers):
        return Operation((type_,), UNARY[name])
    if {"sat", "rm", "rp", "rz", "cc"} & set(modifiers):
        return None
    if name in BINARY:
        return Operation((type_, type_), BINARY[name])
    if name in ("shl", "shr"):
        return Operation((type_, "u32"), _shift_left if name == "shl" else _shift_right)
    if name in ("min", "max"):
        return _extreme(name, modifiers, floating)
    if name in ("mul", "mad"):
        return _product(name, modifiers, floating)
    if name == "fma" and floating:
        return Operation((type_,) * 3, _fma)
    if name == "div":
        return Operation((type_, type_), np.divide if floating else _quotient)
    if name == "rem":
        return Operation((type_, type_), _remainder)
    if name == "bfe" and type_ in ("u32", "s32"):
        return Operation((type_, "u32", "u32"), _field)
    if name == "shf" and "wrap" in modifiers:
        return Operation(("b32", "b32", "u32"), lambda a, b, count: _funnel(a, b, count, "l" in modifiers))
    if name == "prmt" and modifiers == ("b32",):
        return Operation(("b32", "b32", "u32"), _permute)
    if name == "lop3":
        return Operation(("b32", "b32", "b32", "u32"), _logic)
    return None


def _raw(type_: str) -> str:
    """The type of bits that are only moved."""
    return type_ if type_ == "pred" else f"b{bits_of(type_)}"


def _conversion(modifiers: tuple[str, ...]) -> Operation | None:
    target, source = modifiers[-2:]
    if target in ("bf16x2", "f16x2"):
        if source != "f32" or "relu" in modifiers:
            return None
        narrow = to_bfloat16 if target == "bf16x2" else to_float16
        # The first operand becomes the upper half.
        return Operation(
            ("f32", "f32"), lambda a, b: (narrow(a).astype(np.uint32) << np.uint32(16)) | narrow(b).astype(np.uint32)
        )
    if {"sat", "relu", "rz", "rm", "rp"} & set(modifiers):
        return None
    convert = _convert(target, source, modifiers)
    return Operation((source,), convert) if convert else None


def _mixed(name: str, modifiers: tuple[str, ...]) -> Operation | None:
    """Arithmetic of sm_100 on low-precision operands with a float32 result."""
    low = modifiers[-1]
    if len(modifiers) < 2 or modifiers[-2] != "f32":
        return None
    if name == "fma":
        return Operation((low, low, "f32"), _fma)
    if name in ("add", "sub"):
        return Operation((low, "f32"), lambda a, b: BINARY[name](a.astype(np.float32), b))
    return None


def _extreme(name: str, modifiers: tuple[str, ...], floating: bool) -> Operation | None:
    if {"relu", "xorsign", "abs"} & set(modifiers):
        return None
    passes_nan_over = floating and "NaN" not in modifiers
    functions = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}
    return Operation((modifiers[-1],) * 2, functions[name][passes_nan_over])


def _product(name: str, modifiers: tuple[str, ...], floating: bool) -> Operation | None:
    type_ = modifiers[-1]
    if floating:
        return Operation((type_,) * 3, _fma) if name == "mad" else Operation((type_, type_), np.multiply)
    if modifiers[0] == "wide":
        double = f"{type_[0]}{2 * bits_of(type_)}"
        wide, last = dtype_of(double), double
        multiply: Callable[..., Array] = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    elif modifiers[0] == "hi" and bits_of(type_) < 64:
        multiply, last = _high, type_
    elif modifiers[0] == "lo":
        multiply, last = np.multiply, type_
    else:
        return None
    if name == "mul":
        return Operation((type_, type_), multiply)
    return Operation((type_, type_, last), lambda a, b, c: multiply(a, b) + c)
