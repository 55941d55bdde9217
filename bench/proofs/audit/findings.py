"""What the audit finds out about a case: what it compiles to, for each target, and the bytes its launches move.

Needs triton but no GPU. Every finding is of the launchers that users call, run on CPU tensors that are never filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import torch

from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward
from fastenc.kernels.launch import CPU_MULTIPROCESSORS
from fastenc.kernels.plan import SUM_N_C, VECTOR_BYTES, Plan, make_plan

from ...engine.record import Network
from ..access_width import share
from ..compile import Launch, recorded, resources
from ..hot_loops import hot_loops, programs_per_sm
from ..interpret import Traffic, interpreted, sampled_programs
from ..programs import FLOAT_BYTES, kinds
from ..ptx import executing
from .cases import EXAMPLE_1, Case, Precision, norm_inputs
from .rows import Compiled, Count, Requests, Row, Variants, vector_bytes

EPS = 1e-5
OTHER_BATCHES = (3, 8, 32)
# Ordinary sizes, and those with most variants of all volumes with sides from 8, 16 and 24 to 128.
OTHER_VOLUMES = ((32, 32, 32), (40, 48, 36), (64, 64, 64), (24, 24, 24), (16, 16, 19), (8, 8, 17))


def plan_of(case: Case) -> Plan:
    """The plan that the launcher follows for a CPU tensor."""
    N, C, S = case.N, case.C, case.S
    return make_plan(N, C, S, case.itemsize, case.channels_last, CPU_MULTIPROCESSORS, case.backward, case.residual)


def launch(case: Case) -> None:
    """Call the launcher as the autograd function does, with float32 parameters and every gradient asked for."""
    dtype = getattr(torch, case.dtype)
    if case.channels_last:
        x = torch.empty((case.N, case.S, case.C), dtype=dtype).movedim(2, 1)
    else:
        x = torch.empty((case.N, case.C, case.S), dtype=dtype)
    residual = torch.empty_like(x) if case.residual else None
    weight, bias, slope = (torch.empty(case.C) for _ in range(3))
    if case.backward:
        dy, statistics = torch.empty_like(x), torch.empty(2, case.N * case.C)
        instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics, residual=residual)
    else:
        instance_norm_prelu_forward(x, weight, bias, slope, EPS, residual=residual)


def compile_cases(architecture: int | str, cases: Iterable[Case]) -> list[Compiled]:
    """Compile the launches of `cases` for `architecture`; a variant that cases share is compiled and read once."""
    known: dict[str, Compiled] = {}
    compiled = []
    with recorded(architecture) as launches:
        for case in cases:
            launches.clear()
            try:
                launch(case)
            except Exception as error:
                compiled.append(Compiled(failure=f"{type(error).__name__}: {error}"))
                continue
            for made in launches:
                if made.key not in known:
                    known[made.key] = read(made, vector_bytes(case, plan_of(case).branch == "one pass"))
            compiled.append(_worst([known[made.key] for made in launches]))
    return compiled


def read(made: Launch, width: int = VECTOR_BYTES) -> Compiled:
    """What one launch compiled to. width: bytes that its threads should move at a time."""
    atomics = made.ttir.count("tt.atomic_")
    cubin = made.compiled.asm.get("cubin")
    if cubin is None:
        return Compiled((made.name,), atomics=atomics)
    used, shared = resources(cubin), made.compiled.metadata.shared
    spills = used["STACK"] + used["LOCAL"]
    compiled = Compiled((made.name,), used["REG"], spills, shared, share(made, width), atomics)
    if made.compiled.metadata.target.arch != 90 or made.name.endswith("_sum_n"):
        return compiled
    programs = programs_per_sm(used["REG"], made.num_warps, shared)
    return replace(compiled, programs=programs, loops=hot_loops(made))


def _worst(launches: Sequence[Compiled]) -> Compiled:
    shares = [each.vector_share for each in launches if each.vector_share is not None]
    return Compiled(
        launches=tuple(name for each in launches for name in each.launches),
        registers=_most(each.registers for each in launches),
        spills=_most(each.spills for each in launches),
        shared=_most(each.shared for each in launches),
        vector_share=min(shares, default=None),
        atomics=sum(each.atomics for each in launches),
        programs=min((each.programs for each in launches if each.programs is not None), default=None),
        loops=tuple(dict.fromkeys(loop for each in launches for loop in each.loops)),
    )


def _most(figures: Iterable[int | None]) -> int | None:
    return max((figure for figure in figures if figure is not None), default=None)


def count_cases(cases: Iterable[Case]) -> list[Count]:
    """Interpret the launches of `cases` and count: of the programs that move the same, one stands for all."""
    with interpreted():
        return [_count(case) for case in cases]


def _count(case: Case) -> Count:
    plan = plan_of(case)
    interpreted_programs = programs = 0

    def choose(kernel: str, grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        nonlocal interpreted_programs, programs
        launched = prod(grid)
        programs += launched
        numbers, counts = _kinds(case, plan, kernel, launched)
        if counts.sum() != launched:
            raise RuntimeError(f"{case}: the plan makes {counts.sum()} programs of {kernel}, launched were {launched}")
        for number, alike in zip(numbers.tolist(), counts.tolist(), strict=True):
            traffic.alike = alike
            interpreted_programs += 1
            second, first = divmod(launched - 1 - number if kernel.endswith("_apply") else number, grid[0])
            yield first, second, 0

    # Tensors are as the allocator left them, so arithmetic on them may overflow.
    with Traffic() as traffic, sampled_programs(choose), np.errstate(all="ignore"):
        launch(case)
    return Count(traffic.sectors, interpreted_programs, programs)


def _kinds(case: Case, plan: Plan, kernel: str, launched: int) -> tuple[np.ndarray, np.ndarray]:
    """One program number of each kind, and how many there are of it."""
    if kernel.endswith(
        "_sum_n"
    ):  # the N·C sums are one channels-last sample (C, N); three of them make the second axis
        numbers, counts = kinds(1, case.C, case.N, FLOAT_BYTES, True, SUM_N_C)
        sums = launched // int(counts.sum())
        return np.concatenate([numbers + i * counts.sum() for i in range(sums)]), np.tile(counts, sums)
    combining = plan.combines_apart and launched == plan.grid[0]  # the launch without tiles
    shape, chunk_size = (case.N, case.C, case.S), plan.tiles * plan.BLOCK_S
    return kinds(*shape, case.itemsize, case.channels_last, plan.BLOCK_C, plan.chunks, chunk_size, combining)


def row_of(case: Case, count: Count, compiled: dict[str, Compiled]) -> Row:
    """The audit's row of a case."""
    plan = plan_of(case)
    in_apply = plan.chunks > 1 and not plan.combines_apart
    return Row(case, plan.branch == "one pass", count, compiled, plan.branch == "slab", in_apply)


def representatives(cases: Iterable[Case]) -> list[Case]:
    """The smallest case of each branch, layout, dtype, direction and kind of residual."""
    smallest: dict[tuple[object, ...], Case] = {}
    for case in sorted(cases, key=lambda case: case.x_bytes):
        plan = plan_of(case)
        kind = plan.branch, plan.combines_apart, case.channels_last, case.dtype, case.backward, case.residual
        smallest.setdefault(kind, case)
    return list(smallest.values())


def count_requests(case: Case) -> list[Requests]:
    """Execute the sm_90 code of the middle program of each launch, and count what its warps request."""
    with executing(90) as machine:
        machine.choose = lambda kernel, grid: [prod(grid) // 2]
        launch(case)
    ways = "load", "copy", "store"
    return [
        Requests(case, f"{number} {made.name}", *(made.counts.sectors_per_request(way) or None for way in ways))
        for number, made in enumerate(machine.launches, 1)
    ]


def example_variants(dtype: Precision, channels_last: bool) -> Variants:
    """Count the compiled variants of Example 1's layers, for sm_90."""
    network, size = EXAMPLE_1
    example = _variants(2, network, size, dtype, channels_last)
    batches = [_variants(N, network, size, dtype, channels_last) for N in OTHER_BATCHES]
    volumes = [_variants(2, network, other, dtype, channels_last) for other in OTHER_VOLUMES]
    return Variants(
        dtype=dtype,
        channels_last=channels_last,
        example=len(example),
        other_batch=len(frozenset.union(*batches) - example),
        other_volume=max(len(volume - example) for volume in volumes),
    )


def _variants(N: int, network: Network, size: Sequence[int], dtype: Precision, channels_last: bool) -> frozenset[str]:
    with recorded(90) as launches:
        for C, S in norm_inputs(network, size):
            for backward in (False, True):
                launch(Case("variants", N, C, S, dtype, channels_last, backward))
    return frozenset(made.key for made in launches)
