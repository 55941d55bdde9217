"""The PTX machine finds the faults that are planted in compiled code, counts what runs, and gives the driver back."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from fastenc.bench.proofs.compile import recorded
from fastenc.bench.proofs.ptx import Fault, Machine, UnknownInstruction, execute, executing, unwritten

ARCHITECTURES = (80, 90, 100)
ROWS, S, BLOCK = 4, 1600, 512
Edit = Callable[[str, str], str]


@triton.jit
def row_sum(X, Y, S, BLOCK: tl.constexpr):
    """A pipelined loop (asynchronous copies), then a sum across lanes and warps."""
    s = tl.arange(0, BLOCK)
    lanes = tl.zeros([BLOCK], tl.float32)
    for s0 in tl.range(0, S, BLOCK, num_stages=3):
        lanes += tl.load(X + tl.program_id(0) * S + s0 + s, mask=s0 + s < S, other=0.0).to(tl.float32)
    tl.store(Y + tl.program_id(0), tl.sum(lanes))


@triton.jit
def double(X, Y, S, BLOCK: tl.constexpr):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + s, 2 * tl.load(X + s, mask=s < S, other=0.0), mask=s < S)


@triton.jit
def neighbours(X, BLOCK: tl.constexpr):
    """Each program adds the one after its own part to its own part: what it reads another one writes."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + s, tl.load(X + s) + tl.load(X + s + BLOCK))


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def moments(X, Y, S, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sum and 1/√Σx² of each column of x (S, C), by a pipelined loop and one reduction of a pair."""
    c = tl.arange(0, C)[None, :]
    sums = tl.zeros([BLOCK, C], tl.float32)
    squares = tl.zeros([BLOCK, C], tl.float32)
    for s0 in tl.range(0, S, BLOCK, num_stages=3):
        s = s0 + tl.arange(0, BLOCK)[:, None]
        x = tl.load(X + s * C + c, mask=s < S, other=0.0, eviction_policy="evict_first").to(tl.float32)
        sums += x
        squares += x * x
    sum, square = tl.reduce((sums, squares), 0, add_two)
    place = Y + tl.arange(0, C)
    tl.store(place, sum, eviction_policy="evict_last")
    tl.store(place + C, tl.rsqrt(square))


@triton.jit
def transposed(X, Y, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(Y + i * BLOCK + j, tl.trans(tl.load(X + i * BLOCK + j)))


def summed(edit: Edit | None = None, architecture: int = 90, x: Tensor | None = None) -> tuple[Tensor, Tensor, Machine]:
    """x, its rows' sums by the compiled kernel, edited, and the machine."""
    x = torch.arange(ROWS * S, dtype=torch.float32).view(ROWS, S) % 97 if x is None else x
    with executing(architecture) as machine:
        if edit is not None:
            machine.edit = edit
        y = torch.empty(ROWS)
        row_sum[(ROWS,)](x, y, S, BLOCK=BLOCK, num_warps=4)
    return x, y, machine


def replaced(pattern: str, by: str, which: int | None = None) -> Edit:
    """Replace all matches of the pattern in the PTX, or only match number `which`. There must be one."""

    def edit(name: str, ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        assert found, f"no {pattern} in {name}"
        for match in reversed(found if which is None else [found[which]]):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return edit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sound_code(dtype: torch.dtype, architecture: int) -> None:
    x, y, machine = summed(None, architecture, torch.randint(-9, 9, (ROWS, S)).to(dtype))
    assert torch.equal(y, x.float().sum(1))
    assert machine.launches[0].counts.instructions["cp.async.wait_group"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("C", [2, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_reduction_of_a_pair(dtype: torch.dtype, C: int, architecture: int) -> None:
    x = torch.randint(-9, 9, (300, C)).to(dtype)
    with executing(architecture):
        y = torch.empty(2, C)
        moments[(1,)](x, y, 300, C=C, BLOCK=64, num_warps=4)
    assert torch.equal(y[0], x.float().sum(0))
    torch.testing.assert_close(y[1], x.float().square().sum(0).rsqrt(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("which", [-1, -2])
def test_a_removed_barrier(which: int, architecture: int) -> None:
    """The two in the sum across warps: before the last reads, and before what they read is written."""
    with pytest.raises(Fault, match="another warp wrote, without a barrier between"):
        summed(replaced(r"bar\.sync\s+0;", "", which), architecture)


def test_a_write_after_a_read_without_a_barrier() -> None:
    """Every warp writes a word that the first warp has just read."""
    reads = r"(ld\.shared\.b32 %r\d+, \[ %r\d+ \+ 0 \];)"
    with pytest.raises(Fault, match="write of shared memory that another warp read"):
        summed(replaced(reads, r"\1 st.shared.b32 [global_smem], 0;"))


@pytest.mark.parametrize(
    "edit", [replaced(r"cp\.async\.wait_group\s+\d+;", ""), replaced(r"(wait_group\s+)1", r"\g<1>2")]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dropped_wait(edit: Edit, architecture: int) -> None:
    with pytest.raises(Fault, match="read of shared memory whose asynchronous copy has not arrived"):
        summed(edit, architecture)


def test_a_copy_onto_one_under_way() -> None:
    first = r"(cp\.async\.cg\.shared\.global [^;]*;)"
    with pytest.raises(Fault, match="write of shared memory whose asynchronous copy has not arrived"):
        summed(replaced(first, r"\1 \1", 0))


@pytest.mark.parametrize("which", range(5))
def test_a_wrong_shuffle_lane(which: int) -> None:
    x, y, _ = summed(replaced(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+)", r"\g<1>0", which))
    assert not torch.equal(y, x.sum(1))


@pytest.mark.parametrize(("kind", "shift"), [("load", 1 << 20), ("load", -(1 << 20)), ("store", 1 << 20)])
def test_an_address_outside_the_arguments(kind: str, shift: int) -> None:
    store = replaced(r"(st\.global\.b32 \[ %rd\d+ \+ )0", rf"\g<1>{shift}")
    load = replaced(r"(cp\.async\.c[ag]\.shared\.global [^,]*, \[ %rd\d+ \+ )0", rf"\g<1>{shift}")
    with pytest.raises(Fault, match=r"outside the storages of the launch's arguments: .*test_ptx_machine.py:\d+"):
        summed(load if kind == "load" else store)


def test_one_element_past_the_end() -> None:
    """The mask of the ragged end, off by one vector."""
    x, y = torch.ones(1000), torch.empty(1000)
    with executing(90) as machine:
        machine.edit = replaced(r"(setp\.lt\.s32\s+%p\d+, %r\d+, )%r\d+;", r"\g<1>1004;")
        with pytest.raises(Fault, match="outside the storages"):
            double[(2,)](x, y, 1000, BLOCK=512, num_warps=1)


def test_an_address_off_by_one_element() -> None:
    """Inside the storage and aligned: wrong numbers."""
    x, y = torch.arange(1024.0), torch.empty(1024)
    with executing(90) as machine:
        machine.edit = replaced(r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+ )0", r"\g<1>16", 0)
        double[(1,)](x, y, 1008, BLOCK=1024, num_warps=1)
    assert not torch.equal(y[:1008], 2 * x[:1008])


@pytest.mark.parametrize(
    "pattern", [r"(ld\.global\.v4\.b32 [^\[]*\[ %rd\d+ \+ )0", r"(st\.global\.v4\.b32 \[ %rd\d+ \+ )0"]
)
def test_a_misaligned_vector(pattern: str) -> None:
    x, y = torch.ones(1024), torch.empty(1024)
    with executing(90) as machine:
        machine.edit = replaced(pattern, r"\g<1>4")
        with pytest.raises(Fault, match="misaligned"):
            double[(1,)](x, y, 1008, BLOCK=1024, num_warps=1)


def test_a_misaligned_vector_in_shared_memory() -> None:
    with pytest.raises(Fault, match="misaligned"):
        summed(replaced(r"ld\.shared\.v4\.b32\s+(\{[^}]*\}), \[(%r\d+)\];", r"ld.shared.v4.b32 \1, [\2+8];"))


def test_an_access_outside_shared_memory() -> None:
    with pytest.raises(Fault, match=r"outside the \d+ bytes of shared memory"):
        summed(replaced(r"ld\.shared\.b32 %r(\d+), \[ (%r\d+) \+ 0 \]", r"ld.shared.b32 %r\1, [ \2 + 65536 ]"))


def test_shared_memory_that_nothing_wrote() -> None:
    with pytest.raises(Fault, match="never written"):
        summed(replaced(r"cp\.async\.c[ag]\.shared\.global [^;]*;", ""))


def test_two_values_for_one_word_of_shared_memory() -> None:
    with pytest.raises(Fault, match="different values"):
        summed(replaced(r"@%p\d+ st\.shared\.b32 \[ %r\d+ \+ 0 \]", "st.shared.b32 [ global_smem + 0 ]", 0))


def test_an_element_that_nothing_writes() -> None:
    x, y = torch.ones(1024), torch.ones(1024)
    for edit, missing in ((None, 0), (replaced(r"@%p\d+ st\.global[^;]*;", "", -1), 128)):
        with executing(90) as machine:
            y = torch.empty(1024)
            if edit is not None:
                machine.edit = edit
            double[(1,)](x, y, 1024, BLOCK=1024, num_warps=1)
        assert unwritten(y) == missing
        assert y.isnan().sum() == missing


@pytest.mark.parametrize("num_warps", [1, 4])
def test_two_programs_write_one_word(num_warps: int) -> None:
    with executing(90) as machine:
        machine.edit = replaced(r"%ctaid\.x", "0")
        with pytest.raises(Fault, match="two programs write one word"):
            double[(2,)](torch.ones(1024), torch.empty(1024), 1024, BLOCK=512, num_warps=num_warps)


def test_two_programs_of_different_batches_write_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastenc.bench.proofs.ptx.machine.LANES", 1)
    test_two_programs_write_one_word(1)


@pytest.mark.parametrize("lanes", [1, 1 << 14])
def test_a_program_reads_what_another_writes(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastenc.bench.proofs.ptx.machine.LANES", lanes)
    with executing(90):
        neighbours[(1,)](torch.ones(1024), BLOCK=512, num_warps=4)
        with pytest.raises(Fault, match="that another program writes is read"):
            neighbours[(2,)](torch.ones(1536), BLOCK=512, num_warps=4)


@pytest.mark.parametrize(
    ("pattern", "by", "named"),
    [
        (r"add\.f32", "frobnicate.f32", "frobnicate.f32"),
        (r"add\.f32", "add.sat.f32", "add.sat.f32"),
        (r"add\.f32", "add.rz.f32", "add.rz.f32"),
        (r"shfl\.sync\.bfly", "shfl.sync.sideways", "sideways"),
        (r"bar\.sync\s+0;", "bar.arrive 0, 64;", "bar.arrive"),
        (r"cp\.async\.cg", "cp.async.bulk", "cp.async.bulk"),
        (r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, \d+, )31", r"\g<1>7", ", 7,"),
        (r"mov\.u32 \t%r\d+, %tid\.x", "mov.u32 %r1, %clock", "%clock"),
    ],
)
def test_an_unknown_instruction_is_named(pattern: str, by: str, named: str) -> None:
    with pytest.raises(UnknownInstruction, match=re.escape(named)):
        summed(replaced(pattern, by))


def test_a_kernel_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "MOST_STEPS", 2000)
    with pytest.raises(Fault, match="does not end"):
        summed(replaced(r"@%p\d+ (bra\s+\$L__BB0_2)", r"\1"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_warps", [1, 4])
def test_a_layout_conversion(dtype: torch.dtype, num_warps: int, architecture: int) -> None:
    """Through shared memory, by ldmatrix and stmatrix where there are such."""
    x = torch.randn(32, 32).to(dtype)
    with executing(architecture):
        y = torch.empty_like(x)
        transposed[(1,)](x, y, BLOCK=32, num_warps=num_warps)
    assert torch.equal(y, x.T)


def test_counts() -> None:
    """16-byte accesses of a whole warp touch 16 sectors, and are counted one by one."""
    x, y = torch.ones(4096), torch.empty(4096)
    with executing(90) as machine:
        double[(4,)](x, y, 4096, BLOCK=1024, num_warps=2)
        double[(8,)](x[1:], y[1:], 4095, BLOCK=512, num_warps=1)
    whole, ragged = (launch.counts for launch in machine.launches)
    assert (machine.launches[0].name, machine.launches[0].grid, machine.launches[0].num_warps) == (
        "double",
        (4, 1, 1),
        2,
    )
    assert whole.requests == {"load": 32, "store": 32}
    assert whole.sectors == {"load": 512, "store": 512}
    assert whole.sectors_per_request("load") == 16
    assert whole.instructions["st.global.v4.b32"] == 32
    # 4-byte accesses, 128 bytes of a warp, across the borders of sectors: five of them, but for the last.
    assert ragged.requests == {"load": 128, "store": 128}
    assert ragged.sectors["load"] == 127 * 5 + 4
    assert whole.barriers == ragged.barriers == 0
    summing = summed()[2].launches[0].counts
    assert summing.barriers * 4 == summing.instructions["bar.sync"]
    assert summing.barriers % ROWS == 0
    assert summing.requests["copy"] == ROWS * 13  # of 128 elements, the last of a row of 64
    assert summing.sectors["copy"] == ROWS * S * 4 // 32


def test_chosen_programs() -> None:
    x = torch.ones(1024)
    with executing(90, choose=lambda name, grid: [grid[0] - 1]):
        y = torch.zeros(1024)
        double[(8,)](x, y, 1024, BLOCK=128, num_warps=1)
    assert y.nonzero()[:, 0].tolist() == list(range(896, 1024))


def test_offsets_beyond_two_to_the_31() -> None:
    """Memory that torch.empty hands out lazily; only the last program touches it."""
    elements = 2**31 + 1024
    x, y = torch.empty(elements, dtype=torch.int8), torch.empty(elements, dtype=torch.int8)
    x[-1024:] = 3
    with executing(90, choose=lambda name, grid: [grid[0] - 1]):
        huge[(elements // 1024,)](x, y, elements, BLOCK=1024, num_warps=1)
    assert (y[-1024:] == 6).all()


@triton.jit
def huge(X, Y, S, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + s, 2 * tl.load(X + s, mask=s < S, other=0), mask=s < S)


def test_the_driver_is_given_back() -> None:
    before = driver._active
    empty = torch.empty
    with pytest.raises(Fault):
        summed(replaced(r"%ctaid\.x", "0"))
    assert driver._active is before
    assert torch.empty is empty


def test_compiling_still_assembles() -> None:
    """What was executed is not what `recorded` finds in Triton's caches."""
    x, y = torch.ones(1024), torch.ones(1024)
    with executing(90):
        double[(1,)](x, y, 1024, BLOCK=1024)
    with recorded(90) as launches:
        double.device_caches.clear()
        double[(1,)](x, y, 1024, BLOCK=1024)
    assert launches[0].compiled.asm["cubin"][:4] == b"\x7fELF"
    double.device_caches.clear()


def test_an_expanded_argument() -> None:
    """Only the storage counts: a view may be larger or smaller."""
    x = torch.arange(4.0)
    with executing(90):
        y = torch.empty(4)
        double[(1,)](x[2:], y[2:], 2, BLOCK=32, num_warps=1)
    assert y[2:].tolist() == [4.0, 6.0]
    assert unwritten(y) == 2


def test_numpy_memory_of_any_alignment() -> None:
    raw = np.zeros(64, np.uint8)
    x = torch.from_numpy(raw[8:24].view(np.float32))
    x.fill_(1.5)
    with executing(90):
        y = torch.empty(4)
        double[(1,)](x, y, 4, BLOCK=32, num_warps=1)
    assert y.tolist() == [3.0] * 4
