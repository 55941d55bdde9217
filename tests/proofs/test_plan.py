"""Launch plans: every row covered, nothing empty, the shapes that must be one pass, and no size of N in a constexpr."""

from math import gcd, prod

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastenc.bench.commands import gpu
from fastenc.kernels.plan import (
    ONE_PASS,
    ONE_PASS_RESIDUAL,
    PARTIALS,
    REDUCED_VECTOR,
    SECTOR_BYTES,
    SLAB_CHUNKS,
    SLAB_POSITIONS,
    SLAB_PROGRAMS_PER_SM,
    STREAM,
    VECTOR_BYTES,
    Plan,
    blocks,
    make_plan,
)

SMS = 132
shapes = st.tuples(
    st.integers(1, 64), st.integers(1, 2100), st.integers(2, 3_000_000), st.sampled_from([2, 4]), st.booleans()
)
Shape = tuple[int, int, int, int, bool]


@example((2, 64, 512, 2, True), False, False)  # one pass with 16 bytes side by side
@given(shapes, st.booleans(), st.booleans())
def test_covers_everything_once(shape: Shape, backward: bool, residual: bool) -> None:
    N, C, S, itemsize, channels_last = shape
    plan = make_plan(N, C, S, itemsize, channels_last, SMS, backward, residual)
    assert plan.grid == (blocks(N, C, plan.BLOCK_C, channels_last), plan.chunks)
    vector = gcd(C if channels_last else S, VECTOR_BYTES // itemsize)
    chunk = plan.tiles * plan.BLOCK_S
    assert (plan.chunks - 1) * chunk < S <= plan.chunks * chunk
    assert plan.BLOCK_S >= S if plan.branch == "one pass" else plan.chunks >= 1
    if plan.branch == "one pass":
        most = (ONE_PASS_RESIDUAL if residual else ONE_PASS)[channels_last, backward]
        assert most[0] >= plan.BLOCK_S * plan.BLOCK_C
        assert plan.num_warps <= most[1]
    else:
        tile, num_warps = STREAM[backward]
        scattered = vector * itemsize < VECTOR_BYTES or (plan.branch == "slab" and itemsize == 4)
        assert max(tile, 2 * plan.BLOCK_C) == plan.BLOCK_S * plan.BLOCK_C
        assert plan.num_warps == num_warps * (2 if scattered else 1)
    assert all(size & (size - 1) == 0 for size in (plan.BLOCK_S, plan.BLOCK_C, plan.VEC, plan.num_warps))
    reduces = channels_last and not backward and plan.branch == "one pass"
    assert (min(vector, REDUCED_VECTOR) if reduces else vector) == plan.VEC


@given(shapes, st.booleans(), st.booleans())
def test_batch_decides_no_constexpr(shape: Shape, backward: bool, residual: bool) -> None:
    N, C, S, itemsize, channels_last = shape

    def constexprs(plan: Plan) -> tuple[str | int, ...]:
        return plan.branch, plan.BLOCK_S, plan.BLOCK_C, plan.VEC, plan.num_warps, plan.COMBINE_K

    plans = (make_plan(n, C, S, itemsize, channels_last, SMS, backward, residual) for n in (N, 2 * N + 1))
    assert len({constexprs(plan) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("S", "C", "channels_last", "backward", "residual"),
    [
        (1024, 64, True, False, False), (512, 64, True, True, False), (32768, 8, False, False, False),
        (4096, 8, False, True, False), (1024, 64, True, False, True), (512, 64, True, True, True),
        (16384, 8, False, False, True), (4096, 8, False, True, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("itemsize", [2, 4])
def test_must_be_one_pass(S: int, C: int, channels_last: bool, backward: bool, residual: bool, itemsize: int) -> None:
    assert make_plan(2, C, S, itemsize, channels_last, SMS, backward, residual).branch == "one pass"


@given(shapes, st.booleans(), st.booleans())
def test_the_rule(shape: Shape, backward: bool, residual: bool) -> None:
    """Which branch, and how many launches: as the docstring of plan.py says."""
    N, C, S, itemsize, channels_last = shape
    plan = make_plan(N, C, S, itemsize, channels_last, SMS, backward, residual)
    if plan.branch == "slab":
        assert SLAB_POSITIONS[channels_last] >= S
        assert not (backward and residual)
        assert plan.BLOCK_C * itemsize <= SECTOR_BYTES
        slices = blocks(N, C, plan.BLOCK_C, channels_last)
        few = SLAB_PROGRAMS_PER_SM * SMS // slices >= SLAB_CHUNKS
        assert (plan.chunks > 1) <= few, "busy SMs need no second launch"
    if plan.combines_apart:
        assert plan.branch == "split"
        assert N * C * S * itemsize >= PARTIALS[0][0], "two launches, where each program can combine"
    elif plan.chunks > 1:
        share = next(share for volume, _, share in PARTIALS if N * C * S * itemsize >= volume)
        assert 8 * plan.chunks**2 <= share * S * itemsize, "what apply reads of partial results"


def test_a_residual_needs_a_split_backward() -> None:
    """dz then waits in memory, where each of a slab's two reads would need it."""
    branches = [make_plan(2, 64, 1024, 2, True, SMS, True, residual).branch for residual in (False, True)]
    assert branches == ["slab", "split"]


@pytest.mark.parametrize("backward", [False, True])
def test_slabs_that_keep_the_gpu_busy_are_one_launch(backward: bool) -> None:
    assert make_plan(12, 128, 3840, 2, True, SMS, backward).chunks == 1
    assert make_plan(11, 128, 3840, 2, True, SMS, backward).chunks > 1


def test_a_gpu_is_asked_about_every_branch() -> None:
    """`bench gpu` times the operation on a shape of each, channels-last in bfloat16, in both directions."""
    found = set()
    for each in gpu.plan(torch.device("cuda")):
        if each.kind == "instance_norm_prelu" and each.layout == "channels_last" and each.precision == "bfloat16":
            N, C, *spatial = each.shape
            plan = make_plan(N, C, prod(spatial), 2, True, SMS, each.mode == "backward")
            found.add((each.mode, plan.branch, 1 + (plan.chunks > 1) + plan.combines_apart))
    ways = [("one pass", 1), ("slab", 1), ("slab", 2), ("split", 2), ("split", 3)]
    assert found == {(mode, *way) for mode in ("forward", "backward") for way in ways}


@pytest.mark.parametrize("size", ["N", "C", "S"])
def test_refuses_an_empty_grid(size: str) -> None:
    sizes = {"N": 2, "C": 3, "S": 4} | {size: 0}
    with pytest.raises(ValueError, match=f"{size}=0"):
        make_plan(*sizes.values(), 4, True, SMS, False)
