"""cuDNN's peer against a stand-in for its package: a graph that runs torch's formula on what it is given."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc import reference
from fastenc.bench.baselines import cudnn_norm
from fastenc.bench.engine.record import Workload

OP = Workload("instance_norm_prelu", "backward", "float32", (2, 3, 4, 5, 3))
EPS = 1e-5


class Node:
    """A tensor of a graph."""

    def set_output(self, value: bool) -> "Node":
        return self

    def set_data_type(self, kind: str) -> "Node":
        self.kind = kind
        return self


class Graph:
    """Takes the calls in the order in which cuDNN wants them, and computes by the formula."""

    built = 0

    def __init__(self, intermediate_data_type: str, compute_data_type: str) -> None:
        assert intermediate_data_type == compute_data_type == "float32"
        self.steps: list[str] = []

    def tensor_like(self, tensor: Tensor) -> Node:
        return Node()

    def instancenorm(self, *, name: str, norm_forward_phase: str, **nodes: Node) -> list[Node]:
        self.nodes, self.made = nodes, [Node(), Node(), Node()]
        return self.made

    def instancenorm_backward(self, *, name: str, **nodes: Node) -> list[Node]:
        self.nodes, self.made = nodes, [Node(), Node(), Node()]
        return self.made

    def __getattr__(self, step: str) -> Any:
        return lambda *arguments: self.steps.append(step)

    def build_plans(self) -> None:
        assert self.steps == ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        type(self).built += 1

    def get_workspace_size(self) -> int:
        return 8

    def execute(self, tensors: dict[Node, Tensor], workspace: Tensor) -> None:
        given = {name: tensors[node] for name, node in self.nodes.items()}
        x, scale = given["input"].float(), given["scale"].flatten()
        axes = tuple(range(2, x.dim()))
        if "epsilon" in given:
            variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            eps = given["epsilon"].item()
            results = (
                F.instance_norm(x, weight=scale, bias=given["bias"].flatten(), eps=eps),
                mean,
                (variance + eps).rsqrt(),
            )
        else:
            variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            torch.testing.assert_close(given["mean"], mean)
            torch.testing.assert_close(given["inv_variance"], (variance + EPS).rsqrt())
            dx, dscale, _, _ = reference.backward(given["grad"].float(), x, scale, None, 1.0, EPS)
            assert dscale is not None
            results = (
                dx,
                dscale.view_as(given["scale"]),
                given["grad"].float().sum((0, *axes)).view_as(given["scale"]),
            )
        for node, result in zip(self.made, results, strict=True):
            assert node.kind == str(tensors[node].dtype).removeprefix("torch.")
            tensors[node].copy_(result)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cudnn: Any = types.ModuleType("cudnn")
    cudnn.pygraph = Graph
    cudnn.data_type = types.SimpleNamespace(FLOAT="float32", BFLOAT16="bfloat16", HALF="float16")
    cudnn.norm_forward_phase = types.SimpleNamespace(TRAINING="training")
    cudnn.heur_mode = types.SimpleNamespace(A="a", FALLBACK="fallback")
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    cudnn_norm._graphs.clear()
    Graph.built = 0
    yield
    cudnn_norm._graphs.clear()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("dtype", "volumes"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)])
def test_output_and_gradients(dtype: torch.dtype, volumes: int, memory_format: torch.memory_format) -> None:
    """Of x, and of x and a residual."""
    results = []
    for op in (cudnn_norm.instance_norm_prelu, reference.forward):
        torch.manual_seed(1)
        x, *residual = (
            torch.randn(OP.shape, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(volumes)
        )
        parameters = [torch.rand(3, dtype=dtype) for _ in range(3)]
        leaves = [each.requires_grad_() for each in (x, *parameters, *residual)]
        y = op(x, *parameters, EPS, *residual)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for found, truth in zip(*results, strict=True):
        assert found.dtype == truth.dtype
        # Between the two operations the volume and its gradient are rounded once more each than in one.
        atol = 8 * torch.finfo(dtype).eps * truth.abs().max().item()
        torch.testing.assert_close(found, truth, rtol=0, atol=atol)


def test_a_graph_is_built_once() -> None:
    x, parameter = torch.randn(OP.shape), torch.rand(3)
    for _ in range(3):
        cudnn_norm.instance_norm_prelu(x, parameter, parameter, parameter, EPS)
    assert Graph.built == 1
    cudnn_norm.instance_norm_prelu(x[:1], parameter, parameter, parameter, EPS)
    assert Graph.built == 2


def test_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cudnn_norm.absent(OP, torch.device("cpu")) == "cuDNN needs a CUDA GPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cudnn_norm.absent(OP, torch.device("cuda")) == "nvidia-cudnn-frontend is not installed"
