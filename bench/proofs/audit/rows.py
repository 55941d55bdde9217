"""What the audit finds, its rows, and which ceilings they break. Nothing here needs triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastenc.kernels.plan import REDUCED_VECTOR, SECTOR_BYTES, VECTOR_BYTES

from .. import ceilings
from .cases import Case, Precision, layout

if TYPE_CHECKING:
    from ..hot_loops import HotLoop


@dataclass(frozen=True)
class Compiled:
    """A case compiled for one target: the worst of its launches in each respect.

    launches: the kernels' names, in order. registers: of a thread. spills: bytes of stack of a thread. shared: bytes of
    a block. vector_share: of the bytes that accesses to x, y, r and their gradients move, the share that moves
    `vector_bytes` at a time. These four are None for ROCm. atomics: in triton's intermediate code. failure: why it does
    not compile. programs: that an SM holds at a time; loops: those that stream x, in order; both for sm_90 only.
    """

    launches: tuple[str, ...] = ()
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    vector_share: float | None = None
    atomics: int = 0
    failure: str | None = None
    programs: int | None = None
    loops: tuple[HotLoop, ...] = ()


@dataclass(frozen=True)
class Count:
    """Bytes loaded and stored in whole sectors, counted on `interpreted` programs that stand for all `programs`."""

    bytes: int
    interpreted: int
    programs: int


@dataclass(frozen=True)
class Variants:
    """Compiled variants of Example 1, forward and backward; the most that another batch or another volume adds."""

    dtype: Precision
    channels_last: bool
    example: int
    other_batch: int
    other_volume: int


@dataclass(frozen=True)
class Requests:
    """How well the warps of one program of a launch coalesce: 32-byte sectors per request, None without requests.

    A request is one instruction of one warp. The fewest sectors are 16 where each lane moves 16 bytes, and 4 where it
    moves 4. launch: the launch's number and the kernel. copy: asynchronous copies to shared memory, which load x in
    pipelined loops.
    """

    case: Case
    launch: str
    load: float | None
    copy: float | None
    store: float | None


@dataclass(frozen=True)
class Row:
    """The findings about one case.

    one_pass: rows are held on chip, so x is read once.
    compiled: by target.
    slab: the second read of x comes from L1 or L2.
    in_apply: the programs of apply combine the partial results of their rows.
    """

    case: Case
    one_pass: bool
    count: Count
    compiled: dict[str, Compiled]
    slab: bool = False
    in_apply: bool = False

    @property
    def moved(self) -> float:
        """Bytes loaded and stored over the bytes of x."""
        return self.count.bytes / self.case.x_bytes

    @property
    def ceiling(self) -> float:
        """The largest allowed value of `moved`."""
        case, shape = self.case, (self.case.N, self.case.C, self.case.S)
        split = not self.one_pass
        return ceilings.traffic_ceiling(*shape, case.itemsize, case.backward, split, case.residual, self.in_apply)

    @property
    def short(self) -> bool:
        """Whether the row is short enough for one pass, but read twice."""
        case = self.case
        required = ceilings.one_pass_required(case.S, case.channels_last, case.backward, case.residual)
        return required and not self.one_pass

    @property
    def split_excused(self) -> bool:
        """Whether the row is short, but slices of its channels would move partial sectors."""
        return self.short and self.case.channels_last and self.case.C * self.case.itemsize % SECTOR_BYTES != 0


def vector_bytes(case: Case, one_pass: bool) -> int:
    """The bytes that a thread moves at a time where the contiguous axis allows it: fewer where it reduces channels."""
    reduces = one_pass and case.channels_last and not case.backward
    return min(VECTOR_BYTES, REDUCED_VECTOR * case.itemsize) if reduces else VECTOR_BYTES


def violations(row: Row) -> list[str]:
    """A sentence for each ceiling that a row breaks."""
    return [f"{row.case}: {what}" for what in _broken(row)]


def _broken(row: Row) -> Iterator[str]:
    case = row.case
    if row.moved > row.ceiling:
        yield f"moves {row.moved:.4f} times the bytes of x, ceiling {row.ceiling:.4f}"
    if row.short and not row.split_excused:
        yield f"reads x twice, where rows of {case.S} positions must be read once"
    held = case.dtype == "bfloat16" and case.channels_last and case.C >= ceilings.LOOP_CHANNELS and not case.residual
    vectors = (case.C if case.channels_last else case.S) * case.itemsize % VECTOR_BYTES == 0
    for target, compiled in row.compiled.items():
        if target not in ceilings.SHARED_BYTES:
            continue
        if compiled.failure is not None:
            yield f"does not compile for {target}: {compiled.failure}"
            continue
        if compiled.spills:
            yield f"spills {compiled.spills} bytes a thread on {target}"
        most = ceilings.SHARED_BYTES[target]
        if (compiled.shared or 0) > most:
            yield f"takes {compiled.shared} bytes of shared memory on {target}, where a block has {most}"
        if vectors and (compiled.vector_share or 0.0) < ceilings.VECTOR_SHARE:
            moved, width = 100 * (compiled.vector_share or 0.0), vector_bytes(case, row.one_pass)
            yield f"moves only {moved:.0f} % of x in {width}-byte accesses on {target}"
        for loop in compiled.loops if held else ():
            if loop.instructions > ceilings.LOOP_INSTRUCTIONS[loop.work]:
                yield f"takes {loop.instructions:.1f} instructions an element in the loop of {loop.work} on {target}"
            if loop.barriers > ceilings.LOOP_BARRIERS:
                yield f"has {loop.barriers} barriers a tile in the loop of {loop.work} on {target}"
        if compiled.atomics:
            yield f"has {compiled.atomics} atomic operations on {target}"


def variant_violations(variants: Variants) -> list[str]:
    """A sentence for each ceiling that the variants of Example 1 break. Ceilings apply to channels-last only."""
    if not variants.channels_last:
        return []
    counts = (
        ("", variants.example, ceilings.VARIANTS),
        (" more for other batch sizes", variants.other_batch, ceilings.VARIANTS_OTHER_BATCH),
        (" more for another input size", variants.other_volume, ceilings.VARIANTS_OTHER_SIZE),
    )
    which = f"Example 1 {variants.dtype} {layout(variants.channels_last)}"
    return [f"{which}: {count} compiled variants{what}, ceiling {most}" for what, count, most in counts if count > most]
