"""The private names of torch that fastenc uses exist in this torch, and only _torch.py imports them."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastenc
from fastenc import _torch

PRIVATE = re.compile(
    r"torch\._C|_SingleLevelFunction|_functorch|_dynamo_marked|nn\.modules\.module import _|_contextlib"
)


@pytest.mark.parametrize("name", _torch.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(_torch, name) is not None


def test_attributes_exist() -> None:
    assert isinstance(_torch.forward_ad._current_level, int)
    assert isinstance(torch.empty(0)._version, int)
    assert callable(torch.Tensor._make_wrapper_subclass)
    module = vars(nn.ReLU())
    hooks = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
    assert hooks <= set(module)
    assert hasattr(nn.Module, "_compiled_call_impl")
    assert callable(nn.Module._replicate_for_data_parallel)
    assert callable(getattr(nn.Conv3d, _torch.CONV_FORWARD))


def test_only_one_file_imports_them() -> None:
    folder = Path(fastenc.__file__).parent
    files = [path for path in folder.rglob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))]
    assert [path.name for path in files] == ["_torch.py"]


def test_constant_in_graphs() -> None:
    """The mark is read by torch.compile: the function runs once, while the graph is traced."""
    calls: list[int] = []

    @_torch.constant_in_graphs
    def count() -> int:
        calls.append(1)
        return len(calls)

    compiled = torch.compile(lambda x: x + count(), backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert compiled(x).tolist() == compiled(x).tolist() == [1.0, 1.0]
