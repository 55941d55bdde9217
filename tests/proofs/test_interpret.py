"""The proof tools themselves: a tool that cannot find a fault proves nothing."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastenc.bench.proofs.interpret import Traffic, interpreted, sampled_programs
from fastenc.kernels import formula


@triton.jit
def copy_kernel(X, Y, S, BLOCK_S: tl.constexpr):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    tl.store(Y + s, tl.load(X + s, mask=s < S).to(tl.float32), mask=s < S)


@triton.jit
def unmasked_sum_kernel(X, Y, S, BLOCK_S: tl.constexpr):
    s = tl.arange(0, BLOCK_S)
    tl.store(Y, tl.sum(tl.load(X + s, mask=s < S).to(tl.float32), axis=0))


@triton.jit
def low_precision_kernel(X, Y):
    tl.store(Y, tl.load(X) + tl.load(X))


def this() -> object:
    import sys

    return sys.modules[__name__]


def test_counts_bytes_and_sectors() -> None:
    x, y = torch.randn(100), torch.empty(100)
    with interpreted(this()), Traffic() as traffic:
        copy_kernel[(4,)](x, y, 100, BLOCK_S=32)
    assert torch.equal(x, y)
    assert (traffic.loaded, traffic.stored, traffic.launches, traffic.atomics) == (400, 400, 1, 0)
    assert traffic.loaded_sectors >= 416


def test_bfloat16_is_rounded_to_nearest() -> None:
    x = torch.randn(64)
    y = torch.empty(64, dtype=torch.bfloat16)
    with interpreted(this()):
        copy_kernel[(2,)](x, y, 64, BLOCK_S=32)
    assert torch.equal(y, x.bfloat16())


def test_masked_lanes_without_other_are_poisoned() -> None:
    x, y = torch.ones(32), torch.empty(1)
    with interpreted(this()):
        unmasked_sum_kernel[(1,)](x, y, 20, BLOCK_S=32)
    assert y.isnan()


def test_bfloat16_arithmetic_is_refused() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    with interpreted(this()), pytest.raises(Exception, match="upcast to float32"):
        low_precision_kernel[(1,)](x, torch.empty_like(x))


def test_runs_only_the_chosen_programs() -> None:
    x, y = torch.ones(64), torch.zeros(64)
    with interpreted(this()), sampled_programs(lambda name, grid: [(grid[0] - 1, 0, 0)]):
        copy_kernel[(2,)](x, y, 64, BLOCK_S=32)
    assert y.tolist() == [0.0] * 32 + [1.0] * 32


def test_kernels_compile_again_after_the_block() -> None:
    before = dict(vars(tl))
    with interpreted():
        assert not isinstance(formula.prelu, JITFunction)
    assert isinstance(formula.prelu, JITFunction)
    assert dict(vars(tl)) == before
