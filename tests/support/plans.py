"""Plans that only large tensors, or fewer SMs, would get, for small tensors: with other constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

from torch import Tensor

from fastenc.kernels import launch, plan
from fastenc.kernels.plan import Plan

LONG, SLAB = (1, 8, 25, 27, 41), (1, 8, 17, 11, 16)  # 27,675 positions; 2,992, a slab in float32


@dataclass(frozen=True)
class Other:
    """Constants of plan.py, the number of SMs, a shape and its layout, and whether a plan is the one that is meant."""

    constants: dict[str, object]
    sms: int
    shape: tuple[tuple[int, ...], str]
    reached: Callable[[Plan], bool]


APART = {"PARTIALS": ((0, 128, 0.0),)}
PLANS = {
    "slab in one launch": Other({}, 1, (SLAB, "channels_last"), lambda p: (p.branch, p.chunks) == ("slab", 1)),
    "slab in two launches": Other({}, 132, (SLAB, "channels_last"), lambda p: p.branch == "slab" and p.chunks > 1),
    "combined apart, channels-last": Other(APART, 132, (LONG, "channels_last"), lambda p: p.combines_apart),
    "combined apart, contiguous": Other(
        APART | {"ONE_PASS": plan.ONE_PASS | {(False, False): (8192, 8, 32)}, "SLAB_POSITIONS": {False: 0, True: 0}},
        132, (LONG, "contiguous"), lambda p: p.combines_apart,
    ),
    "more chunks than are combined at a time": Other(
        {"COMBINE_TILE": 128}, 132, (LONG, "channels_last"), lambda p: p.chunks > p.COMBINE_K
    ),
}  # fmt: skip


@contextmanager
def planned(name: str) -> Iterator[Callable[[Tensor, bool, bool], Plan]]:
    """Launchers follow the plans of that name inside the block; yields the plan for (x, backward, residual)."""
    other = PLANS[name]

    def plan_for(x: Tensor, backward: bool, residual: bool) -> Plan:
        found = launch.prepared(x.shape, x.stride(), x.itemsize, -1, backward, residual)
        assert found is not None
        return found[3]

    with ExitStack() as stack:
        for constant, value in other.constants.items():
            stack.enter_context(mock.patch.object(plan, constant, value))
        stack.enter_context(mock.patch.object(launch, "CPU_MULTIPROCESSORS", other.sms))
        launch.prepared.cache_clear()
        stack.callback(launch.prepared.cache_clear)
        yield plan_for
