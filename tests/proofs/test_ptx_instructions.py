"""Every kind of instruction that the PTX machine knows, on hand-written code, against exact arithmetic in Python."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastenc.bench.proofs.ptx import Fault, Machine

KINDS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}
INTEGERS = [0, 1, 2, 3, 5, 7, 31, 32, 33, 63, 64, 100, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2]
FLOATS = [
    0.0, -0.0, 1.0, -1.0, 1.5, 3.1415927, -2.7182817, 1e-3, 1e10, 65504.0, 65519.9, 65520.0, 1e-8, 3.4e38, -1e-40,
    math.inf, -math.inf, math.nan, 1.00390625, 1.01171875, 2.5, -2.5, 0.5, 2147483648.0, -3e9, 7.99,
]  # fmt: skip


def kernel(body: str, parameters: int, threads: int = 32) -> str:
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters))
    return f".visible .entry k(\n{declared}\n)\n.reqntid {threads}\n{{\n{body}\n\tret;\n}}\n"


def run(body: str, *tensors: torch.Tensor, threads: int = 32, grid: int = 1, shared: int = 0) -> None:
    loads = "".join(f"ld.param.b64 %rd{90 + i}, [k_param_{i}];\n" for i in range(len(tensors)))
    Machine().launch(kernel(loads + body, len(tensors), threads), (grid, 1, 1), list(tensors), threads // 32, shared)


def register(type_: str) -> str:
    return {16: "rs", 32: "r", 64: "rd"}[bits(type_)]


def bits(type_: str) -> int:
    return {"f32x2": 64, "bf16x2": 32, "f16x2": 32, "bf16": 16}.get(type_) or int(type_.lstrip("busf"))


def results(opcode: str, types: str, operands: list[list[int]], immediates: str = "") -> list[int]:
    """The result's bits for each lane, whose operands are given as bits. types: of the operands, then of the result.

    opcode may also be whole code, which ends in `;` and leaves the result in register 70.
    """
    *sources, target = types.split()
    lanes = len(operands[0])
    tensors = [torch.tensor(np.array(column, np.uint64).view(np.int64)) for column in operands]
    code = "mov.u32 %r80, %tid.x;\nmul.wide.u32 %rd80, %r80, 8;\n"
    for i, type_ in enumerate(sources):
        code += f"add.s64 %rd{81 + i}, %rd{90 + i}, %rd80;\n"
        code += f"ld.global.b{bits(type_)} {{ %{register(type_)}{i} }}, [ %rd{81 + i} + 0 ];\n"
    given = ", ".join(f"%{register(type_)}{i}" for i, type_ in enumerate(sources))
    place = f"%{register(target)}70"
    code += f"{opcode}\n" if opcode.endswith(";") else f"{opcode} {place}, {given}{immediates};\n"
    code += f"add.s64 %rd79, %rd{90 + len(sources)}, %rd80;\nst.global.b{bits(target)} [ %rd79 + 0 ], {{ {place} }};\n"
    out = torch.zeros(-(-lanes // 32) * 32, dtype=torch.int64)
    padded = [torch.cat([t, t[:1].expand(len(out) - lanes)]) for t in tensors]
    run(code, *padded, out, threads=len(out))
    return [value & (1 << bits(target)) - 1 for value in out[:lanes].tolist()]


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def pairs(values: list[int]) -> list[list[int]]:
    return [[a for a in values for _ in values], [b for _ in values for b in values]]


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: (a * b) >> 32,
    "mul.hi.u32": lambda a, b: (a * b) >> 32,
    "min.s32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: a >> min(b % 2**32, 31),
    "div.s32": lambda a, b: toward_zero(a, b) if b else 0,
    "rem.s32": lambda a, b: a - b * toward_zero(a, b) if b else 0,
    "div.u32": lambda a, b: a // b if b else 0,
    "rem.u32": lambda a, b: a % b if b else 0,
}


@pytest.mark.parametrize("opcode", INTEGER_OPERATIONS)
def test_integers(opcode: str) -> None:
    division = opcode.startswith(("div", "rem"))
    a, b = pairs([value for value in INTEGERS if value or not division])
    found = results(opcode, "b32 b32 b32", [a, b])
    for x, y, result in zip(a, b, found, strict=True):
        given = [signed(v, 32) if ".s32" in opcode else v for v in (x, y)]
        assert result == INTEGER_OPERATIONS[opcode](*given) % 2**32, (opcode, given)


@pytest.mark.parametrize(("opcode", "sign"), [("mul.wide.s32", True), ("mul.wide.u32", False)])
def test_wide_products(opcode: str, sign: bool) -> None:
    a, b = pairs(INTEGERS)
    c = [(3**i) % 2**64 for i in range(len(a))]
    for mad in (False, True):
        operands = [a, b, c] if mad else [a, b]
        types = "b32 b32 b64 b64" if mad else "b32 b32 b64"
        found = results(opcode.replace("mul", "mad") if mad else opcode, types, operands)
        for x, y, z, result in zip(a, b, c, found, strict=True):
            exact = (signed(x, 32) * signed(y, 32)) if sign else x * y
            assert result == (exact + (z if mad else 0)) % 2**64


@pytest.mark.parametrize(
    ("opcode", "types", "exact"),
    [
        ("cvt.s64.s32", "b32 b64", lambda a: signed(a, 32) % 2**64),
        ("cvt.u64.u32", "b32 b64", lambda a: a),
        ("cvt.u32.u64", "b64 b32", lambda a: a % 2**32),
        ("cvt.u16.u32", "b32 b16", lambda a: a % 2**16),
        ("cvt.u32.u16", "b16 b32", lambda a: a % 2**16),
        ("cvt.s32.s16", "b16 b32", lambda a: signed(a % 2**16, 16) % 2**32),
        ("not.b32", "b32 b32", lambda a: a ^ 0xFFFFFFFF),
        ("neg.s32", "b32 b32", lambda a: -a % 2**32),
    ],
)
def test_integer_conversions(opcode: str, types: str, exact: Callable[[int], int]) -> None:
    values = [value << shift for value in INTEGERS for shift in ((0, 7) if types.startswith("b64") else (0,))]
    assert results(opcode, types, [values]) == [exact(value) for value in values]


@pytest.mark.parametrize(
    ("opcode", "immediates", "exact"),
    [
        ("bfe.u32", ", 2, 6", lambda a: (a >> 2) & 63),
        ("bfe.s32", ", 2, 1", lambda a: -((a >> 2) & 1) % 2**32),
        ("bfe.s32", ", 4, 8", lambda a: signed((a >> 4) & 255, 8) % 2**32),
        ("shf.l.wrap.b32", ", 0x12345678, 3", lambda a: ((0x12345678 << 32 | a) << 3 >> 32) % 2**32),
        ("shf.r.wrap.b32", ", 0x12345678, 35", lambda a: ((0x12345678 << 32 | a) >> 3) % 2**32),
        ("prmt.b32", ", 0x89ABCDEF, 0x5410U", lambda a: (0xCDEF << 16) | a % 2**16),
        ("prmt.b32", ", 0x89ABCDEF, 0x7632", lambda a: (0x89AB << 16) | a >> 16),
        ("prmt.b32", ", 0, 0x8880", lambda a: (0xFFFFFF00 if a & 128 else 0) | a % 256),
        ("lop3.b32", ", 0x0F0F0F0F, 0x33333333, 0xE8", lambda a: (a & 0x0F0F0F0F) | (a & 0x33333333) | 0x03030303),
    ],
)
def test_bit_fields(opcode: str, immediates: str, exact: Callable[[int], int]) -> None:
    assert results(opcode, "b32 b32", [INTEGERS], immediates) == [exact(value) for value in INTEGERS]


def float_bits(value: float, kind: str = "f") -> int:
    return int.from_bytes(struct.pack(kind, np.float32(value) if kind == "f" else value), "little")


def as_float(value: int, kind: str = "f") -> float:
    return float(struct.unpack(kind, value.to_bytes(struct.calcsize(kind), "little"))[0])


def rounded(exact: Fraction, mantissa: int, least: int, most: float) -> float:
    """The nearest binary float with `mantissa` bits, ties to even, spaced by 2**least at least."""
    if exact == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(exact)))
    exponent += (abs(exact) >= Fraction(2) ** (exponent + 1)) - (abs(exact) < Fraction(2) ** exponent)
    unit = Fraction(2) ** max(exponent - mantissa + 1, least)
    value = float(round(exact / unit) * unit)
    return value if abs(value) <= most else math.copysign(math.inf, value)


FORMATS: dict[str, Any] = {
    "f32": (24, -149, 3.4028234663852886e38), "f16": (11, -24, 65504.0), "bf16": (8, -133, 3.3895313892515355e38),
}  # fmt: skip


def same(found: float, expected: float) -> bool:
    return (math.isnan(found) and math.isnan(expected)) or found == expected


def exactly(function: Callable[..., Any], *given: float) -> float:
    """function in exact arithmetic, rounded to float32; on what is not finite, in floats."""
    if all(math.isfinite(value) for value in given):
        try:
            return rounded(Fraction(function(*map(Fraction, given))), *FORMATS["f32"])
        except ZeroDivisionError:
            return math.nan if given[0] == 0 else math.copysign(math.inf, given[0]) * math.copysign(1, given[1])
    with np.errstate(all="ignore"):
        return float(function(*map(np.float64, given)))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.f32", lambda a, b: a + b),
        ("sub.f32", lambda a, b: a - b),
        ("mul.f32", lambda a, b: a * b),
        ("div.rn.f32", lambda a, b: a / b),
        ("div.full.f32", lambda a, b: a / b),
        ("fma.rn.f32", lambda a, b, c: a * b + c),
    ],
)
def test_floats(opcode: str, function: Callable[..., Any]) -> None:
    a, b = pairs([float_bits(value) for value in FLOATS])
    operands = [a, b, b[::-1]] if "fma" in opcode else [a, b]
    found = results(opcode, " ".join(["f32"] * (len(operands) + 1)), operands)
    for given, result in zip(zip(*operands, strict=True), found, strict=True):
        values = [as_float(value) for value in given]
        assert same(as_float(result), exactly(function, *values)), (opcode, values)


def test_pairs_of_floats() -> None:
    a, b = pairs([float_bits(value) for value in FLOATS])
    c = b[::-1]
    packed = [
        [low | high << 32 for low, high in zip(column, column[1:] + column[:1], strict=True)] for column in (a, b, c)
    ]
    for opcode, count in (("add.f32x2", 2), ("sub.f32x2", 2), ("mul.f32x2", 2), ("fma.rn.f32x2", 3)):
        one = results(opcode.replace("x2", ""), " ".join(["f32"] * (count + 1)), [a, b, c][:count])
        two = results(opcode, " ".join(["f32x2"] * (count + 1)), packed[:count])
        assert [value % 2**32 for value in two] == one
        assert [value >> 32 for value in two] == one[1:] + one[:1]


@pytest.mark.parametrize("low", ["f16", "bf16"])
def test_to_low_precision_and_back(low: str) -> None:
    values = [float_bits(value) for value in FLOATS]
    narrow = results(f"cvt.rn.{low}.f32", f"f32 {low}", [values])
    wide = results(f"cvt.f32.{low}", f"{low} f32", [narrow])
    for value, result in zip(FLOATS, wide, strict=True):
        exact = rounded(Fraction(float(np.float32(value))), *FORMATS[low]) if math.isfinite(value) else value
        assert same(as_float(result), exact), value
    both = results(f"cvt.rn.{low}x2.f32", "f32 f32 b32", [values, values[::-1]])
    assert both == [high << 16 | low_ for high, low_ in zip(narrow, narrow[::-1], strict=True)]
    for opcode, sign in (("add", 1), ("sub", -1)):
        mixed = results(f"{opcode}.rn.f32.{low}", f"{low} f32 f32", [narrow, values[::-1]])
        for x, y, result in zip(wide, values[::-1], mixed, strict=True):
            assert same(as_float(result), exactly(lambda a, b, s=sign: a + s * b, as_float(x), as_float(y)))


def test_floats_and_integers() -> None:
    for opcode, types, exact in (
        ("cvt.rn.f32.s32", "b32 f32", lambda a: signed(a, 32)),
        ("cvt.rn.f32.u32", "b32 f32", lambda a: a),
        ("cvt.rn.f32.s64", "b64 f32", lambda a: a),
        ("cvt.rn.f32.u64", "b64 f32", lambda a: a),
    ):
        for value, result in zip(INTEGERS, results(opcode, types, [INTEGERS]), strict=True):
            assert as_float(result) == rounded(Fraction(exact(value)), *FORMATS["f32"]), (opcode, value)
    values = [float_bits(value) for value in FLOATS]
    for opcode, rounding in (
        ("cvt.rzi.s32.f32", math.trunc),
        ("cvt.rmi.s32.f32", math.floor),
        ("cvt.rni.s32.f32", round),
    ):
        for value, result in zip(FLOATS, results(opcode, "f32 b32", [values]), strict=True):
            clipped = 0 if math.isnan(value) else min(max(value, -(2.0**31)), 2.0**31 - 1)
            assert signed(result, 32) == rounding(float(np.float32(clipped)) if abs(clipped) < 2e9 else clipped), value


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not (a < b or a > b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b,
    "geu": lambda a, b: not a < b,
    "nan": lambda a, b: math.isnan(a) or math.isnan(b),
    "num": lambda a, b: not math.isnan(a) and not math.isnan(b),
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons(comparison: str) -> None:
    """Ordered ones are false of NaN, unordered ones true; selected by it, and guarded by it."""
    a, b = pairs([float_bits(value) for value in FLOATS])
    expected = [COMPARISONS[comparison](as_float(x), as_float(y)) for x, y in zip(a, b, strict=True)]
    for ending in (
        "selp.b32 %r70, 1, 0, %p1;",
        "mov.b32 %r70, 0; @%p1 mov.b32 %r70, 1;",
        "mov.b32 %r70, 1; @!%p1 mov.b32 %r70, 0;",
    ):
        code = f"setp.{comparison}.f32 %p1, %r0, %r1; {ending}"
        assert results(code, "b32 b32 b32", [a, b]) == expected


@pytest.mark.parametrize("opcode", ["and", "or", "xor"])
def test_predicates(opcode: str) -> None:
    code = f"setp.ne.b32 %p1, %r0, 0; setp.ne.b32 %p2, %r1, 0; {opcode}.pred %p3, %p1, %p2; mov.pred %p4, -1;"
    code += "and.pred %p5, %p3, %p4; selp.b32 %r70, 1, 0, %p5;"
    found = results(code, "b32 b32 b32", [[0, 0, 1, 1], [0, 1, 0, 1]])
    assert found == {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "xor": [0, 1, 1, 0]}[opcode]


def test_packing() -> None:
    code = "mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r2, {%rs2, %rs1}; mov.b64 %rd70, {%r2, %r1};"
    assert results(code, "b32 b32 b64", [[0x12345678], [0x9ABCDEF0]]) == [0x9ABCDEF056781234]
    code = "mov.b64 {%r2, %r3}, %rd0; sub.s32 %r70, %r3, %r2;"
    assert results(code, "b64 b32", [[7 << 32 | 5]]) == [2]


@pytest.mark.parametrize(
    ("opcode", "function"), [("min.f32", min), ("max.f32", max), ("min.NaN.f32", min), ("max.NaN.f32", max)]
)
def test_extremes(opcode: str, function: Callable[[float, float], float]) -> None:
    """NaN loses, unless the instruction says otherwise."""
    a, b = pairs([float_bits(value) for value in FLOATS])
    for x, y, result in zip(a, b, results(opcode, "f32 f32 f32", [a, b]), strict=True):
        given = [as_float(x), as_float(y)]
        numbers = [value for value in given if not math.isnan(value)]
        expected = function(numbers) if len(numbers) == 2 or (numbers and "NaN" not in opcode) else math.nan
        assert same(as_float(result), expected), given


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("sqrt.rn.f32", math.sqrt),
        ("rsqrt.approx.ftz.f32", lambda a: 1 / math.sqrt(a)),
        ("rcp.rn.f32", lambda a: 1 / a),
        ("neg.f32", lambda a: -a),
        ("abs.f32", abs),
    ],
)
def test_functions(opcode: str, function: Callable[[float], float]) -> None:
    values = [value for value in FLOATS if 1e-30 < value < 1e30]
    found = results(opcode, "f32 f32", [[float_bits(value) for value in values]])
    for value, result in zip(values, found, strict=True):
        expected = function(float(np.float32(value)))
        assert abs(as_float(result) - expected) <= 2**-23 * abs(expected)


@pytest.mark.parametrize(
    ("kind", "by", "clamp", "lane"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 7, 31, lambda lane: 7),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
    ],
)
def test_shuffles(kind: str, by: int, clamp: int, lane: Callable[[int], int]) -> None:
    values = [3 * i for i in range(64)]
    found = results(f"shfl.sync.{kind}.b32 %r70, %r0, {by}, {clamp}, -1;", "b32 b32", [values])
    assert found == [3 * (i // 32 * 32 + lane(i % 32)) for i in range(64)]


def threads(body: str, count: int = 64, grid: int = 1) -> list[int]:
    """%r70 of each thread of each program, after the body: %r1 is the thread's number, %r2 the program's."""
    out = torch.full((grid * count,), -1, dtype=torch.int32)
    start = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\nmad.lo.s32 %r4, %r2, %r3, %r1;\n"
    end = "\nmul.wide.u32 %rd1, %r4, 4;\nadd.s64 %rd2, %rd90, %rd1;\nst.global.b32 [ %rd2 + 0 ], { %r70 };"
    run(start + body + end, out, threads=count, grid=grid, shared=16)
    return out.tolist()


LOOP = """
    mov.b32 %r70, 0;
    mov.b32 %r5, {most};
$again:
    setp.ge.s32 %p1, %r70, %r5;
    @%p1 bra $done;
    add.s32 %r70, %r70, 1;
    bra.uni $again;
$done:
"""


def test_threads_that_part_at_a_branch_meet_again() -> None:
    body = """
        setp.lt.u32 %p1, %r1, 5;
        @%p1 bra $small;
        mov.b32 %r70, 20;
        bra.uni $both;
    $small:
        mov.b32 %r70, 10;
    $both:
        bar.sync 0;
        add.s32 %r70, %r70, %r1;"""
    assert threads(body) == [i + (10 if i < 5 else 20) for i in range(64)]


def test_loops_of_different_length() -> None:
    assert threads(LOOP.format(most="%r1")) == list(range(64))
    assert threads(LOOP.format(most="%r2"), count=32, grid=7) == [i // 32 for i in range(7 * 32)]


def test_threads_that_return_early() -> None:
    assert threads("mov.b32 %r70, %r1; setp.eq.b32 %p1, %r1, 9; @%p1 ret;") == [-1 if i == 9 else i for i in range(64)]


@pytest.mark.parametrize("what", ["bar.sync 0;", "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "cp.async.commit_group;"])
@pytest.mark.parametrize("least", [5, 32])
def test_what_all_threads_must_reach(what: str, least: int) -> None:
    """A barrier is for all threads of a program, a shuffle for all lanes of a warp."""
    body = f"mov.b32 %r70, %r1;\nsetp.lt.u32 %p1, %r1, {least};\n@%p1 bra $over;\n{what}\n$over:\n"
    if what.startswith("shfl") and least == 32:
        assert threads(body) == list(range(64))
    else:
        with pytest.raises(Fault, match="not all"):
            threads(body)


def test_a_barrier_after_loops_of_different_length() -> None:
    body = LOOP.format(most="%r2") + "mov.b32 %r6, global_smem; setp.eq.b32 %p2, %r1, 0;"
    body += "@%p2 st.shared.b32 [ %r6 + 0 ], %r70; bar.sync 0; ld.shared.b32 %r70, [ %r6 + 0 ];"
    assert threads(body, count=64, grid=3) == [i // 64 for i in range(3 * 64)]
    with pytest.raises(Fault, match="without a barrier"):
        threads(body.replace("bar.sync 0;", ""), count=64, grid=3)
