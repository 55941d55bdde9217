"""Repeats are bitwise equal on both routes, and no operation runs that torch knows not to be repeatable.

On a GPU what could break this is a sum whose order is not fixed. Here programs run one after another, so the order is
what the tests change: whatever it is, the bits are the same.
"""

import contextlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.accuracy import gradients
from support.backends import taken
from support.plain import gradients as network_gradients
from support.plain import small_twins
from torch import Tensor, nn
from torch.profiler import profile

import fastenc
from fastenc import convolution
from fastenc.bench.proofs.interpret import Traffic, sampled_programs

ROUTES = ("auto", "fused")
# (C, *spatial): 33 channels break sectors, so that few positions are split already.
SHAPES = {
    ("contiguous", "one pass"): (8, 4, 5, 6),
    ("contiguous", "split"): (1, 33, 32, 33),
    ("channels_last", "one pass"): (8, 4, 5, 6),
    ("channels_last", "split"): (33, 6, 7, 8),
}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

# aten's names for what torch.use_deterministic_algorithms documents: what raises on CUDA, and what gives up its order
# only in that mode, but for convolutions.
NOT_REPEATABLE = re.compile(
    r"_?(adaptive_)?avg_pool[23]d_backward|adaptive_max_pool2d_backward|max_pool3d_with_indices_backward"
    r"|fractional_max_pool[23]d_backward|max_unpool[23]d|(upsample_\w+|grid_sampler_[23]d)_backward"
    r"|(reflection|replication)_pad[123]d_backward|nll_loss\w*|_?ctc_loss_backward|_embedding_bag\w*"
    r"|put_?|histc|bincount|median|cumsum|(_unsafe_|_)?index_(put|add|copy|select|reduce)\w*"
    r"|scatter\w*|gather_backward|repeat_interleave"
)


def shuffled(name: str, grid: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The programs of a launch out of order."""
    programs = list(itertools.product(*map(range, grid)))
    return random.Random(0).sample(programs, len(programs))


def assert_repeats(call: Callable[[], list[Tensor]], route: str) -> None:
    """The same bits whatever the order of the programs, with and without torch's deterministic mode.

    In that mode torch.empty hands out NaN: what is read before it is written would show.
    """
    results = []
    for deterministic, out_of_order in ((True, False), (True, True), (False, False)):
        with taken(route), sampled_programs(shuffled) if out_of_order else contextlib.nullcontext():
            torch.use_deterministic_algorithms(deterministic)
            try:
                results.append(call())
            finally:
                torch.use_deterministic_algorithms(False)
    first, *others = results
    assert all(tensor.isfinite().all() for tensor in first)
    for other in others:
        assert len(other) == len(first)
        assert all(map(torch.equal, first, other))


def tensors(layout: str, rows: str) -> list[Tensor]:
    """x, dy and a residual."""
    shape = (2, *SHAPES[layout, rows])
    return [torch.randn(shape).contiguous(memory_format=MEMORY_FORMATS[layout]) for _ in range(3)]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("layout", "rows"), SHAPES)
@pytest.mark.parametrize("route", ROUTES)
def test_operation(route: str, layout: str, rows: str, residual: bool) -> None:
    x, dy, r = tensors(layout, rows)
    C = x.shape[1]
    parameters = torch.randn(C), torch.randn(C), torch.rand(1)

    def call() -> list[Tensor]:
        op = fastenc.instance_norm_prelu
        return list(gradients(op, dy, x, *parameters, 1e-5, r if residual else None).values())

    assert_repeats(call, route)


@pytest.mark.parametrize(("layout", "rows"), SHAPES)
def test_no_atomic_operation(layout: str, rows: str) -> None:
    x, dy, r = tensors(layout, rows)
    C = x.shape[1]
    with taken("triton"), Traffic() as traffic:
        for residual in (None, r):
            given = x, torch.randn(C), torch.randn(C), torch.rand(C), 1e-5, residual
            gradients(fastenc.instance_norm_prelu, dy, *given)
    assert traffic.launches > 0
    assert traffic.atomics == 0


def trained(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Losses and parameters of two steps from where net is; net comes back as it was."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    after = [parameter.detach().clone() for parameter in net.parameters()]
    net.load_state_dict(before)
    return [*losses, *after]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("route", ROUTES)
def test_network(route: str, recompute: bool) -> None:
    net, _ = small_twins(torch.float32, channel=4, in_planes=3)
    net.recompute = recompute
    x = torch.randn(2, 3, 9, 8, 10)
    assert_repeats(lambda: network_gradients(net, x), route)
    assert_repeats(lambda: trained(net, x), route)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The fused route of CPU tensors with what it does on CUDA tensors alone: the pool, and the live taps."""
    plan_convolution = convolution.plan_convolution

    def cuda_plan(*arguments: Any) -> convolution.ConvPlan | None:
        return plan_convolution(*arguments[:7], "cuda", *arguments[8:])

    cuda = mock.patch.object(Tensor, "is_cuda", True, create=True)
    with taken("fused"), cuda, mock.patch.object(convolution, "plan_convolution", cuda_plan):
        yield


def operations(run: Callable[[], Any]) -> set[str]:
    """aten's names of all that run, in the forward and in the backward."""
    with profile() as trace:
        run()
    return {event.name.removeprefix("aten::") for event in trace.events() if event.name.startswith("aten::")}


@pytest.mark.parametrize("out_length", [3, None], ids=["vector", "map"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_fused_network_runs_nothing_that_does_not_repeat(recompute: bool, out_length: int | None) -> None:
    """Down to maps of 1³, where convolutions are products of live taps."""
    net, _ = small_twins(torch.float32, layers=[2, 1, 2, 1], out_length=out_length)
    net.recompute = recompute
    x = torch.randn(2, 1, 9, 8, 10)
    with as_on_a_gpu():
        found = operations(lambda: network_gradients(net, x))
    assert {"mm", "convolution_backward"} <= found
    assert [name for name in sorted(found) if NOT_REPEATABLE.fullmatch(name)] == []


def test_a_pool_that_does_not_repeat_is_noticed() -> None:
    """The test above would see it."""
    x = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    found = operations(lambda: nn.AdaptiveAvgPool3d(2)(x).sum().backward())
    assert any(NOT_REPEATABLE.fullmatch(name) for name in found)
