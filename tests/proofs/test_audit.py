"""The audit: counted bytes, findings from compiled code, ceilings, and the command."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from fastenc import EncoderNet3d
from fastenc.bench.__main__ import main
from fastenc.bench.commands import audit
from fastenc.bench.engine.record import Network
from fastenc.bench.proofs import access_width, ceilings, interpret
from fastenc.bench.proofs.audit import cases, findings, rows, table
from fastenc.bench.proofs.audit.cases import Case
from fastenc.bench.proofs.audit.findings import Compiled, Count, Variants
from fastenc.bench.proofs.audit.rows import Row
from fastenc.bench.proofs.compile import machine_code, recorded
from fastenc.bench.proofs.hot_loops import HotLoop, loops, programs_per_sm

THIS = sys.modules[__name__]


# ----------------------------------------------------------------------------------------------------------------------
# What is audited


@pytest.mark.parametrize(("layers", "size"), [((2, 1, 3), (9, 8, 5)), ((3, 3), (7, 7, 7)), ((1, 1), (4, 5, 6))])
def test_norm_inputs_are_what_the_network_normalises(layers: tuple[int, ...], size: tuple[int, ...]) -> None:
    seen = []
    net = EncoderNet3d(2, layers)
    for module in net.modules():
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    net(torch.randn(1, 1, *size))
    expected = [(shape[1], shape[2:].numel()) for shape in seen]
    assert cases.norm_inputs(Network(2, layers, 1, 0), size) == list(dict.fromkeys(expected))


def test_example_1_of_the_seed() -> None:
    assert cases.norm_inputs(*cases.EXAMPLE_1) == [
        (64, 29760), (64, 3840), (128, 3840), (128, 512), (256, 512), (256, 64), (512, 64), (512, 8), (1024, 8),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize(
    ("N", "C", "S", "dtype", "backward", "residual"),
    [
        (2, 3, 1000, "bfloat16", False, False), (3, 70, 8, "float32", True, False), (2, 5, 41, "bfloat16", True, True),
        (2, 20, 1025, "bfloat16", True, False), (1, 24, 1500, "bfloat16", False, True),
        (1, 1, 40_000, "float32", False, False), (1, 1, 20_000, "bfloat16", True, True),
    ],
)  # fmt: skip
def test_one_program_of_each_kind_counts_them_all(
    N: int, C: int, S: int, dtype: cases.Precision, backward: bool, residual: bool
) -> None:
    for channels_last in (True, False):
        case = Case("", N, C, S, dtype, channels_last, backward, residual)
        (count,) = findings.count_cases([case])
        with interpret.interpreted(), interpret.Traffic() as traffic, np.errstate(all="ignore"):
            findings.launch(case)
        assert count.bytes == traffic.sectors, case


def test_counting_says_how_many_programs_were_interpreted() -> None:
    case = Case("", 8, 64, 3840, "float32", False, False)  # a program for each of 512 rows, all alike
    assert findings.count_cases([case]) == [Count(2 * case.x_bytes + 512 * 5 * 32, 1, 512)]


def test_a_grid_that_the_plan_does_not_explain_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(findings.plan_of(Case("", 8, 64, 3840, "float32", False, False)), BLOCK_C=2)
    monkeypatch.setattr(findings, "plan_of", lambda case: other)
    with pytest.raises(RuntimeError, match="256 programs of forward_one_pass, launched were 512"):
        findings.count_cases([Case("", 8, 64, 3840, "float32", False, False)])


# ----------------------------------------------------------------------------------------------------------------------
# Compiled code


@triton.jit
def narrow_and_wide(X, Y, Other, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + 3 * i)
    tl.store(
        Y + i,
        x,
    )
    tl.store(Other + 3 * i, x)


@triton.jit
def read_elsewhere(R):
    return tl.load(R + 3 * tl.arange(0, 1024))


@triton.jit
def one_narrow_of_two(R, Y, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), read_elsewhere(R))


@triton.jit
def hungry(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, x / tl.sum(x))


@triton.jit
def racing(X):
    tl.atomic_add(X, 1.0)


def test_share_of_wide_accesses_counts_bytes_of_streamed_tensors_only() -> None:
    """Accesses in functions that a kernel calls count too."""
    x = torch.empty(4096)
    with recorded(90, THIS) as launches:
        narrow_and_wide[(1,)](x, x, x, BLOCK=1024)
        one_narrow_of_two[(1,)](x, x, BLOCK=1024)
    for launch in launches:
        assert access_width.share(launch, 16) == 0.5
        assert access_width.share(launch, 4) == 1.0


@pytest.mark.parametrize(
    ("C", "S", "dtype", "channels_last", "width"),
    [
        (24, 1000, "bfloat16", True, 16), (20, 1000, "bfloat16", True, 8), (3, 1000, "float32", True, 4),
        (8, 1000, "bfloat16", False, 16), (8, 1002, "float32", False, 8), (8, 1001, "bfloat16", False, 2),
    ],
)  # fmt: skip
def test_accesses_are_as_wide_as_the_contiguous_axis_allows(
    C: int, S: int, dtype: cases.Precision, channels_last: bool, width: int
) -> None:
    with recorded(90) as launches:
        findings.launch(Case("", 1, C, S, dtype, channels_last, True))
        findings.launch(Case("", 1, C, S, dtype, channels_last, True, residual=True))
    streams = [launch for launch in launches if access_width.share(launch, 1) is not None]
    assert streams
    for launch in streams:
        assert access_width.share(launch, width) >= ceilings.VECTOR_SHARE, launch.name
        assert access_width.share(launch, 2 * width) < 0.05, launch.name


def test_spills_are_seen() -> None:
    x = torch.empty(4096)
    with recorded(90, THIS) as launches:
        hungry[(1,)](x, x, BLOCK=4096, num_warps=1, maxnreg=64)
        hungry[(1,)](x, x, BLOCK=4096, num_warps=8)
    starved, fed = launches
    assert findings.read(starved).spills > 0
    assert re.search(r"\b(?:STL|LDL)\b", machine_code(starved.compiled.asm["cubin"]))
    assert findings.read(fed).spills == 0
    assert findings.read(fed).registers < findings.read(starved).registers == 64


@pytest.mark.parametrize(
    ("N", "C", "S", "backward", "works"),
    [
        (8, 64, 512, False, []), (8, 64, 2000, False, ["forward statistics", "forward apply"]),
        (1, 64, 20_000, True, ["backward sums", "backward apply"]),
    ],
)  # fmt: skip
def test_hot_loops(N: int, C: int, S: int, backward: bool, works: list[str]) -> None:
    """None of whole rows, two of a slab and of a split row, within their ceilings."""
    case = Case("", N, C, S, "bfloat16", True, backward)
    (compiled,) = findings.compile_cases(90, [case])
    assert [loop.work for loop in compiled.loops] == works
    assert all(3 < loop.instructions <= ceilings.LOOP_INSTRUCTIONS[loop.work] for loop in compiled.loops)
    assert [loop.barriers for loop in compiled.loops] == [2, 0][: len(works)]  # the first reading is pipelined
    assert compiled.programs is not None
    (other,) = findings.compile_cases(80, [case])
    assert (other.loops, other.programs) == ((), None)


def test_loops_are_found_by_their_branches_back() -> None:
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x1 */
        /*0010*/                   LDG.E R0, [R2] ;          /* 0x1 */
        /*0020*/              @!P0 BRA 0x40 ;                /* 0x1 */
        /*0030*/               @P1 BRA 0x10 ;                /* 0x1 */
        /*0040*/                   BRA 0x40 ;                /* 0x1 */
    """
    assert loops(code) == [["LDG.E", "BRA", "BRA"]]


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "programs"),
    [(128, 4, 0, 4), (129, 4, 0, 3), (32, 4, 0, 16), (32, 1, 0, 32), (64, 32, 0, 1), (32, 4, 100_000, 2)],
)
def test_programs_of_an_sm(registers: int, num_warps: int, shared: int, programs: int) -> None:
    assert programs_per_sm(registers, num_warps, shared) == programs


def test_atomics_are_seen() -> None:
    with recorded(90, THIS) as launches:
        racing[(1,)](torch.empty(1))
    assert findings.read(launches[0]).atomics == 1


def test_what_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(findings, "instance_norm_prelu_forward", fail)
    failed, fine = findings.compile_cases(
        90, [Case("", 1, 8, 64, "float32", True, backward) for backward in (False, True)]
    )
    assert failed.failure == "ValueError: no such thing"
    assert fine.failure is None
    assert fine.launches == ("backward_one_pass",)


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings

GOOD = Compiled(("kernel",), registers=64, spills=0, shared=1024, vector_share=1.0)


def a_row(
    C: int = 64,
    S: int = 1000,
    channels_last: bool = True,
    backward: bool = False,
    one_pass: bool = True,
    bytes_over_x: float = 2.0,
    compiled: Compiled = GOOD,
    residual: bool = False,
) -> Row:
    case = Case("", 2, C, S, "bfloat16", channels_last, backward, residual)
    moved = round(bytes_over_x * case.x_bytes)
    return Row(case, one_pass, Count(moved, 1, 1), {"sm_80": GOOD, "sm_90": compiled, "gfx942": Compiled()})


@pytest.mark.parametrize(
    ("S", "backward", "split", "ceiling"),
    [
        (8_000_001, False, False, 2.02), (8_000_000, False, False, 2.02), (7_999_999, False, False, 2.05),
        (1_000_000, False, False, 2.05), (999_999, False, False, 2.3), (8_000_000, False, True, 3.03),
        (1_000_000, False, True, 3.15), (1000, False, True, 3.5), (8_000_000, True, False, 3.03),
        (1_000_000, True, False, 3.1), (1000, True, False, 3.5), (8_000_000, True, True, 5.05),
        (1_000_000, True, True, 5.3), (1000, True, True, 6.0),
    ],
)  # fmt: skip
def test_ceilings_are_the_designs(S: int, backward: bool, split: bool, ceiling: float) -> None:
    row = (44 + 12 / 4 if backward else 20) / (S / 4)  # N = 4, itemsize 1: x has S bytes
    assert ceilings.traffic_ceiling(4, 1, S // 4, 1, backward, split) == pytest.approx(ceiling + row, rel=1e-5)
    added = ceilings.traffic_ceiling(4, 1, S // 4, 1, backward, split, residual=True) - ceiling - row
    assert added == pytest.approx(2 if backward else 1, rel=1e-4)  # r read; backward r read, dr written
    combining = ceilings.traffic_ceiling(4, 1, S // 4, 1, backward, split, in_apply=True) - ceiling - row
    assert combining == pytest.approx(0.15, rel=1e-4)
    large = [ceilings.traffic_ceiling(4, 1, 4_000_000, 1, backward, split, in_apply=own) for own in (False, True)]
    assert large[0] == large[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (a_row(bytes_over_x=2.3099), []),
        (a_row(bytes_over_x=2.3101), ["moves 2.3101 times the bytes of x, ceiling 2.3100"]),
        (a_row(backward=True, bytes_over_x=3.6), ["moves 3.6000 times"]),
        (a_row(residual=True, bytes_over_x=3.3099), []),
        (a_row(residual=True, bytes_over_x=3.3101), ["moves 3.3101 times the bytes of x, ceiling 3.3100"]),
        (a_row(S=1024, one_pass=False), ["reads x twice, where rows of 1024 positions must be read once"]),
        (a_row(S=1025, one_pass=False), []),
        (a_row(C=24, one_pass=False), []),
        (a_row(C=24, S=32768, channels_last=False, one_pass=False), ["reads x twice"]),
        (a_row(S=32769, channels_last=False, one_pass=False), []),
        (a_row(S=4096, channels_last=False, backward=True, one_pass=False), ["reads x twice"]),
        (a_row(S=4096, channels_last=False, backward=True, one_pass=False, residual=True), ["reads x twice"]),
        (a_row(S=16384, channels_last=False, one_pass=False, residual=True), ["reads x twice"]),
        (a_row(S=16385, channels_last=False, one_pass=False, residual=True), []),
        (a_row(S=4097, channels_last=False, backward=True, one_pass=False), []),
        (a_row(compiled=replace(GOOD, spills=8)), ["spills 8 bytes a thread on sm_90"]),
        (a_row(compiled=replace(GOOD, shared=232_449)), ["takes 232449 bytes of shared memory on sm_90"]),
        (a_row(compiled=replace(GOOD, vector_share=0.94)), ["moves only 94 % of x in 8-byte accesses on sm_90"]),
        (
            a_row(channels_last=False, compiled=replace(GOOD, vector_share=0.94)),
            ["moves only 94 % of x in 16-byte accesses on sm_90"],
        ),
        (a_row(compiled=replace(GOOD, vector_share=None)), ["moves only 0 %"]),
        (a_row(C=20, compiled=replace(GOOD, vector_share=0.0)), []),
        (a_row(C=20, channels_last=False, compiled=replace(GOOD, vector_share=0.0)), ["moves only 0 %"]),
        (a_row(compiled=replace(GOOD, atomics=1)), ["has 1 atomic operations on sm_90"]),
        (a_row(compiled=replace(GOOD, loops=(HotLoop("forward apply", 10.0, 3),))), []),
        (
            a_row(compiled=replace(GOOD, loops=(HotLoop("forward apply", 10.1, 4),))),
            ["takes 10.1 instructions an element in the loop of forward apply on sm_90", "has 4 barriers a tile"],
        ),
        (a_row(C=24, compiled=replace(GOOD, loops=(HotLoop("forward apply", 99.0, 9),))), []),
        (
            a_row(residual=True, bytes_over_x=3.0, compiled=replace(GOOD, loops=(HotLoop("forward apply", 99.0, 9),))),
            [],
        ),
        (a_row(compiled=Compiled(failure="Error: no")), ["does not compile for sm_90: Error: no"]),
    ],
)
def test_broken_ceilings(row: Row, words: list[str]) -> None:
    broken = rows.violations(row)
    assert len(broken) == len(words)
    for text, expected in zip(broken, words, strict=True):
        assert text.startswith(f"{row.case}: {expected}")


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (Variants("float32", True, 40, 0, 6), []),
        (
            Variants("float32", True, 41, 1, 7),
            ["41 compiled", "1 compiled variants more for other batch", "7 compiled"],
        ),
        (Variants("float32", False, 41, 1, 7), []),
    ],
)
def test_which_variants_break_a_ceiling(variants: Variants, words: list[str]) -> None:
    broken = rows.variant_violations(variants)
    assert len(broken) == len(words)
    assert all(expected in text for text, expected in zip(broken, words, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_example_1_compiles_few_variants(dtype: cases.Precision) -> None:
    """Forward and backward, with other batches and other volumes."""
    variants = findings.example_variants(dtype, True)
    assert variants.example > 8
    assert rows.variant_violations(variants) == []


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape for one target and ROCm, and the variants in one precision and layout, all in this process."""
    monkeypatch.setattr(audit, "shapes", lambda: [("small", 2, 24, 104)])
    monkeypatch.setattr(audit, "residual_shapes", lambda: [("with r", 2, 24, 104)])
    monkeypatch.setattr(audit, "TARGETS", {"sm_90": 90, "gfx942": "gfx942"})
    monkeypatch.setattr(audit, "EXAMPLES", [("bfloat16", True)])
    monkeypatch.setattr(audit, "MOST_PROCESSES", 1)
    monkeypatch.setattr(findings, "OTHER_VOLUMES", [(32, 32, 32)])


@pytest.mark.usefixtures("small")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["audit", "--json", str(tmp_path / "audit.json")]) == 0
    found = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert found["schema"] == audit.SCHEMA
    assert found["violations"] == []
    assert len({json.dumps(row["case"]) for row in found["rows"]}) == 16
    for row in found["rows"]:
        case, compiled = row["case"], row["compiled"]["sm_90"]
        origin = "with r" if case["residual"] else "small"
        assert (case["origin"], case["N"], case["C"], case["S"], row["one_pass"]) == (origin, 2, 24, 104, True)
        least = (5 if case["backward"] else 3) if case["residual"] else (3 if case["backward"] else 2)
        assert least < row["moved"] < row["ceiling"] < least + 1
        assert 0 < row["count"]["interpreted"] <= row["count"]["programs"]
        assert len(compiled["launches"]) == (2 if case["backward"] else 1)
        assert 0 < compiled["registers"] <= 255
        assert (compiled["spills"], compiled["vector_share"], compiled["atomics"]) == (0, 1.0, 0)
        assert row["compiled"]["gfx942"]["failure"] is None
    (variants,) = found["variants"]
    assert (variants["dtype"], variants["channels_last"]) == ("bfloat16", True)
    assert 10 < variants["example"] <= ceilings.VARIANTS

    out = capsys.readouterr().out
    requests = found["requests"]
    assert len(requests) == sum(len(row["compiled"]["sm_90"]["launches"]) for row in found["rows"])
    assert all(4 <= each["store"] <= 16 for each in requests if "sum_n" not in each["launch"])
    assert sum("2×24×104" in line for line in out.splitlines()) == 16 + len(requests)
    assert any(line == "with r:" for line in out.splitlines())
    assert f"{found['rows'][0]['moved']:.4f}" in out
    assert "gfx942: 16 of 16 rows compile" in out
    assert f"Example 1 bfloat16 channels-last: {variants['example']} compiled variants, 0 more" in out
    assert out.endswith("every ceiling holds\n")


@pytest.mark.usefixtures("small")
def test_broken_ceilings_are_listed_last_and_end_in_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "residual_shapes", list)
    monkeypatch.setitem(ceilings.TRAFFIC, (False, False), (1.9, 1.9, 1.9))
    monkeypatch.setattr(ceilings, "VARIANTS", 9)
    monkeypatch.setattr(audit, "TARGETS", {"sm_90": 90})
    assert main(["audit", "--json", str(tmp_path / "audit.json")]) == 1
    broken = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["violations"]
    assert capsys.readouterr().out.endswith("\n".join([f"{len(broken)} broken ceilings:", *broken]) + "\n")
    assert broken[-1].startswith("Example 1 bfloat16 channels-last: ")
    assert broken[-1].endswith(" compiled variants, ceiling 9")
    assert {text.split(" moves ")[0] for text in broken[:-1]} >= {
        "2×24×104 bfloat16 channels-last forward:", "2×24×104 float32 contiguous forward:",
    }  # fmt: skip
    assert not any("backward" in text for text in broken)


def test_two_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "TARGETS", {"sm_90": 90})
    monkeypatch.setattr(audit, "EXAMPLES", [])
    audited = [Case("", 2, 24, 104, "bfloat16", True, backward) for backward in (False, True)]
    assert audit.audit(audited, 2) == audit.audit(audited, 1)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "audit", None)


@pytest.mark.usefixtures("no_work")
def test_unwritable_file_is_an_error_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "audit.json", tmp_path):
        assert main(["audit", "--json", str(path)]) == 2
        assert f"--json: cannot write to {path}: " in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
def test_environments_that_cannot_be_audited(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert main(["audit"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["audit"]) == 2
    assert "needs triton" in capsys.readouterr().err


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        a_row(),
        a_row(one_pass=False, bytes_over_x=3.0),
        a_row(C=24, one_pass=False),
        a_row(compiled=replace(GOOD, spills=8)),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    table.print_table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "250")
    table.print_table(rows)
    plain = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        cells = " ".join(table.cells(row)).split()
        assert cells in plain or [*cells, "!"] in plain
    assert [table.cells(row)[4] for row in rows] == ["once", "twice", "twice*", "once"]
    compiled = replace(GOOD, programs=4, loops=(HotLoop("forward apply", 9.5, 2),))
    slab = replace(rows[1], slab=True, compiled={"sm_90": compiled})
    assert (table.cells(slab)[4], table.cells(slab)[-3:]) == ("twice, L2", ("4", "9.5", "2"))
    assert any("second read comes from L1 or L2" in line for line in table.summary([slab], [], []))


def test_requests_of_warps() -> None:
    """16 bytes a lane are 16 sectors, 4 bytes 4. Pipelined loops load x by copies. Odd C break vectors, not sectors."""
    wide = {each.launch: each for each in findings.count_requests(Case("", 2, 128, 20_000, "bfloat16", True, False))}
    assert wide["1 forward_statistics"].copy == 16
    (apply,) = (each for name, each in wide.items() if name.endswith("_apply") and each.store == 16)
    assert apply.copy is None
    (one_pass,) = findings.count_requests(Case("", 1, 4, 4096, "float32", False, False))
    assert one_pass.store is not None
    assert one_pass.store > 15  # of y; the statistics are scalars
    odd = findings.count_requests(Case("", 2, 3, 20_000, "float32", True, False))
    assert all(each.copy is None or each.copy <= 4 + 1 for each in odd)


def test_representatives_are_the_smallest_of_each_branch() -> None:
    several = [Case("", N, C, S, "bfloat16", True, False) for N, C, S in ((8, 64, 8), (1, 64, 8), (2, 128, 32_768))]
    assert findings.representatives(several) == several[1:]


def test_table_of_requests(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("", 2, 24, 104, "float32", True, False, residual=True)
    monkeypatch.setenv("COLUMNS", "120")
    table.print_requests([findings.Requests(case, "1 forward_one_pass", 15.96, None, 16.0)])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "one_pass" in line)
    assert " ".join(line.split()) == "2×24×104 residual channels-last float32 1 forward_one_pass 16.0 – 16.0"


def test_progress_is_printed_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "TARGETS", {})
    monkeypatch.setattr(audit, "EXAMPLES", [])
    audit.audit([Case("", 2, 24, 104, "float32", True, False)], 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "audit: 0 of 2" in captured.err
