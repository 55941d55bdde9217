"""Whichever launch of an operation fails, the eager route takes over with the right numbers; and only for a launch."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from support.fake_gpu import taken_for_cuda
from support.plain import assert_all_near, gradients
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import fastenc
from fastenc import convolution, route
from fastenc.bench.proofs.interpret import interpreted
from fastenc.kernels.layout import MEMORY_FORMAT

FORWARD, BACKWARD = torch.ops.fastenc.instance_norm_prelu, torch.ops.fastenc.instance_norm_prelu_backward
SPATIAL = (17, 241, 1)  # channels-last, where rows of so many positions are split
LACK = RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

pytestmark = pytest.mark.filterwarnings("ignore:fastenc takes the eager route")


@contextlib.contextmanager
def failing(at: int | None, error: Exception = LACK) -> Iterator[list[str]]:
    """Interpreted kernels, of whose launches number `at` fails, once; yields the names of all that were asked for."""
    made: list[str] = []
    launch = GridExecutor.__call__

    def launch_or_fail(executor: GridExecutor, *arguments: object, **options: object) -> object:
        made.append(executor.fn.__name__)
        if len(made) - 1 == at:
            raise error
        return launch(executor, *arguments, **options)

    with taken_for_cuda(), interpreted(), mock.patch.object(GridExecutor, "__call__", launch_or_fail):
        yield made


def small_input(C: int = 3) -> Tensor:
    return torch.randn(2, C, *SPATIAL).contiguous(memory_format=MEMORY_FORMAT[5])


def parameters() -> list[Tensor]:
    return [(1 + torch.rand(3)).requires_grad_() for _ in range(3)]


def trained() -> Callable[[], list[Tensor]]:
    x, leaves = small_input().requires_grad_(), parameters()

    def run() -> list[Tensor]:
        y = fastenc.instance_norm_prelu(x, *leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves])]

    return run


def with_a_residual() -> Callable[[], list[Tensor]]:
    x, r, leaves = small_input().requires_grad_(), small_input().requires_grad_(), parameters()

    def run() -> list[Tensor]:
        y = fastenc.instance_norm_prelu(x, *leaves, residual=r)
        with torch.no_grad():
            alone = fastenc.instance_norm_prelu(x, *leaves, residual=r)
        return [alone, y.detach(), *torch.autograd.grad(y.square().sum(), [x, r, *leaves])]

    return run


def recomputed() -> Callable[[], list[Tensor]]:
    """dx is written over the gradient that the formula would need, if the launch failed."""
    layer, x = fastenc.ConvModern3d(3, 2), small_input()
    layer.recompute = True
    return lambda: gradients(layer, x)


def in_place() -> Callable[[], list[Tensor]]:
    """Without gradients y is written over x, which the formula needs."""
    layer, x = fastenc.ConvModern3d(3, 2), small_input()

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [layer.run_fused(x.clone(memory_format=torch.preserve_format), True)[0]]

    return run


def operator() -> Callable[[], list[Tensor]]:
    """What torch.compile and torch.export write down; a fault that is known by then is no reason to refuse."""
    x, leaves = small_input().requires_grad_(), parameters()

    def run() -> list[Tensor]:
        weight, bias, slope = leaves
        y = FORWARD(x, weight, bias, slope, 0.0, 0.5, None)[0]
        assert y.stride() == x.stride()
        found = torch.autograd.grad(y.square().sum(), [x, *leaves])
        assert found[0].stride() == x.stride()
        return [y.detach(), *found]

    return run


def operator_with_a_residual() -> Callable[[], list[Tensor]]:
    x, r, leaves = small_input().requires_grad_(), small_input().requires_grad_(), parameters()

    def run() -> list[Tensor]:
        weight, bias, _ = leaves
        y = FORWARD(x, weight, bias, None, 0.1, 1e-5, None, r)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, r, weight, bias])]

    return run


@pytest.mark.parametrize(
    "case",
    [trained, with_a_residual, recomputed, in_place, operator, operator_with_a_residual],
    ids=lambda f: f.__name__,
)
def test_whichever_launch_fails(case: Callable[[], Callable[[], list[Tensor]]]) -> None:
    """Right when it happens, and right again once it is known."""
    run = case()
    with failing(None) as made:
        expected = run()
    streams = [name for name in made if name.startswith("forward_")]
    assert len(streams) > 1  # many launches, the last of which writes the tensor
    assert all("apply" in name or "slab" in name or "statistics" in name for name in streams)
    for at in range(len(made)):
        with failing(at):
            for _ in range(2):
                assert_all_near(run(), expected)
            assert "device kernel image is invalid" in str(route.reason(small_input()))


def test_out_of_memory_at_any_launch_is_raised_and_passes() -> None:
    """And leaves nothing half done: the same tensors give the same results afterwards."""
    run = trained()
    with failing(None) as made:
        expected = run()
    for at in range(len(made)):
        with failing(at, torch.OutOfMemoryError("CUDA out of memory.")), pytest.raises(torch.OutOfMemoryError):
            run()
    with failing(None):
        for mine, theirs in zip(run(), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_an_error_of_the_convolution_is_its_own() -> None:
    """Between the launches of a recomputed backward there is a convolution, which may fail for its own reasons."""
    run = recomputed()
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    with failing(None), mock.patch.object(convolution, "backward", side_effect=error):
        with pytest.raises(RuntimeError) as caught:
            run()
        assert caught.value is error
        assert route.reason(small_input()) is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["x's dtype", "autocast's"])
def test_what_an_operator_gives_by_the_formula_is_what_it_has_declared(dtype: torch.dtype | None) -> None:
    """dtypes, strides, and empty tensors for gradients that are not needed; of an x that is neither layout too."""
    x = small_input().transpose(2, 4)
    weight, bias, slope = (parameter.detach() for parameter in parameters())
    wanted = [True, False, True, True, False]

    def run() -> list[Tensor]:
        y, statistics = FORWARD(x, weight, bias, slope, 0.0, 1e-5, dtype)
        return [y, statistics, *BACKWARD(torch.ones_like(y), x, weight, bias, slope, 0.0, statistics, wanted)]

    with failing(None):
        expected = run()
    with failing(0):
        found = run()
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
