"""Beyond 2³¹ elements: offsets must be 64-bit. Memory is handed out lazily, and only the last rows' programs run."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastenc import reference
from fastenc.bench.proofs.interpret import interpreted, sampled_programs
from fastenc.kernels import formula
from fastenc.kernels import instance_norm_prelu_backward as backward_room
from fastenc.kernels import instance_norm_prelu_forward as forward_room
from fastenc.kernels.layout import MEMORY_FORMAT
from fastenc.kernels.plan import make_plan

# (N, C, S, channels-last): 2³¹ elements and a little more; one pass and split in both layouts.
SHAPES = {
    "one pass, contiguous": (1, 2**31 // 1000 + 8, 1000, False),
    "one pass, channels-last": (2**31 // (64 * 512) + 1, 64, 512, True),
    "split, contiguous": (1, 2**15 + 1, 2**16, False),
    "split, channels-last": (2**15 + 1, 8, 2**13, True),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, bool]:
    return request.param


def huge(N: int, C: int, S: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    """A tensor of that shape with random numbers in its last rows only, and those rows: a view (n, c, S, 1, 1)."""
    memory_format = MEMORY_FORMAT[5] if channels_last else torch.contiguous_format
    x = torch.empty((N, C, S, 1, 1), dtype=torch.bfloat16, memory_format=memory_format)
    assert x.numel() > 2**31
    last = x[-1:] if channels_last else x[:, -1:]
    last.copy_(torch.randn(last.shape))
    return x, last


def last_rows(programs: int) -> Callable[[str, tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The first and last programs of every launch: those that stream backwards do the last rows first."""

    def choose(kernel: str, grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        k = min(programs, grid[0])
        first, *others = {*range(k), *range(grid[0] - k, grid[0])}, range(grid[1]), range(grid[2])
        return list(itertools.product(sorted(first), *others))

    return choose


def programs(N: int, C: int, S: int, channels_last: bool, backward: bool) -> int:
    """How many programs of a launch that streams the last rows take."""
    plan = make_plan(N, C, S, 2, channels_last, 132, backward)
    if not channels_last:
        return plan.chunks
    return plan.chunks * -(-C // plan.BLOCK_C)


def check_forward(N: int, C: int, S: int, channels_last: bool) -> None:
    x, last = huge(N, C, S, channels_last)
    with interpreted(), sampled_programs(last_rows(programs(N, C, S, channels_last, False))):
        y, *_ = forward_room.instance_norm_prelu_forward(x, None, None, 0.25, 1e-5)
    found = y[-1:] if channels_last else y[:, -1:]
    torch.testing.assert_close(found, reference.forward(last.float()).bfloat16(), rtol=2**-7, atol=2**-7)


def check_backward(N: int, C: int, S: int, channels_last: bool) -> None:
    (x, last), (dy, last_dy) = (huge(N, C, S, channels_last) for _ in range(2))
    statistics = torch.zeros(2, N * C)
    mean, rstd = statistics
    wide = last.float()
    mean[-last.shape[1] :] = wide.mean((0, 2, 3, 4))
    rstd[-last.shape[1] :] = (wide.var((0, 2, 3, 4), correction=0) + 1e-5).rsqrt()
    with interpreted(), sampled_programs(last_rows(programs(N, C, S, channels_last, True))):
        dx, *_ = backward_room.instance_norm_prelu_backward(
            dy, x, None, None, 0.25, statistics, (True, False, False, False)
        )
    found = dx[-1:] if channels_last else dx[:, -1:]
    expected = reference.backward(last_dy.float(), wide)[0].bfloat16()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-6)


def test_forward(shape: tuple[int, int, int, bool]) -> None:
    check_forward(*shape)


def test_forward_of_very_long_rows() -> None:
    """A chunk's length times the most chunks that the combining launch looks at is beyond 2³¹ too."""
    check_forward(1, 2**11 + 1, 2**20, False)


def test_backward(shape: tuple[int, int, int, bool]) -> None:
    check_backward(*shape)


@pytest.fixture
def _offsets_in_int32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels with `locate` made 32-bit."""
    source = Path(formula.__file__).read_text(encoding="utf-8")
    narrow = source.replace(".to(tl.int64)", "").replace("tl.int64", "tl.int32")
    assert narrow != source
    path = tmp_path / "formula_in_int32.py"
    path.write_text(narrow, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "spread", InterpretedFunction(module.spread.fn))  # which `locate` calls
    for room in (forward_room, backward_room):
        monkeypatch.setattr(room, "locate", module.locate)


@pytest.mark.usefixtures("_offsets_in_int32")
@pytest.mark.parametrize("check", [check_forward, check_backward])
def test_int32_offsets_fail(shape: tuple[int, int, int, bool], check: Callable[..., None]) -> None:
    """The test above can fail: with 32-bit offsets the interpreter, made as strict as a GPU, stops at the overflow."""
    with pytest.raises(Exception, match="overflow"):
        check(*shape)
