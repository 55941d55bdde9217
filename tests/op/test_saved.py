"""What the Triton route saves for the backward: tensors, and no None among them, which torchviz and others fail on."""

from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import small_input, small_twins
from torch import Tensor, nn

import fastenc
from fastenc.saved import save, saved


def saved_by(y: Tensor) -> Iterator[tuple[str, Any]]:
    """The name of each node of y's graph that is a Python Function's, and what it saved."""
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "saved_tensors"):
            yield node.name(), node.saved_tensors


def pair(x: Tensor, affine: bool, slope: Any, residual: Any) -> Tensor:
    parameters = [torch.ones(3, requires_grad=True)] * 2 if affine else [None, None]
    return fastenc.instance_norm_prelu(x, *parameters, slope, residual=residual)


def accelerated(x: Tensor, affine: bool, slope: Any, residual: Any) -> Tensor:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm3d(3, affine=affine)
            self.activation = nn.LeakyReLU(slope) if isinstance(slope, float) else nn.PReLU(slope.numel())

        def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
            z = self.norm(x)
            return self.activation(z if residual is None else z + residual)

    return fastenc.accelerate(Block())(x, residual)


def operator(x: Tensor, affine: bool, slope: Any, residual: Any) -> Tensor:
    shared, number = (slope, 0.0) if isinstance(slope, Tensor) else (None, slope)
    weight = torch.ones(3) if affine else None
    return torch.ops.fastenc.instance_norm_prelu(x, weight, None, shared, number, 1e-5, None, residual)[0]


@pytest.mark.parametrize("call", [pair, accelerated, operator])
def test_operation(call: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 4, 2, 3, requires_grad=True)
    for affine, slope, residual in product((True, False), (0.1, torch.rand(3)), (None, torch.randn_like(x))):
        with taken("fused"):
            kept = [tensors for _, tensors in saved_by(call(x, affine, slope, residual))]
        assert any(kept)
        assert all(isinstance(tensor, Tensor) for tensors in kept for tensor in tensors)


@pytest.mark.parametrize("route", ["triton", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_network(recompute: bool, route: str) -> None:
    net, _ = small_twins(torch.float32)
    net.recompute = recompute
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm3d) and module is not net.netbody[1].conv_scale.mconv[0]:
            module.bias = None
    with launches_replaced(), fastenc.backend("eager" if route == "eager" else "auto"):
        kept = list(saved_by(net(small_input(dtype=torch.float32))))
    names = {name for name, _ in kept}
    assert (names & {"InstanceNormPReLUBackward", "RecomputedUnitBackward"}) or route == "eager"
    assert all(isinstance(tensor, Tensor) for _, tensors in kept for tensor in tensors)


@pytest.mark.parametrize("absent", [(), (1,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_what_is_saved_comes_back(absent: tuple[int, ...]) -> None:
    tensors = [None if i in absent else torch.tensor(float(i)) for i in range(4)]
    ctx: Any = SimpleNamespace(save_for_backward=lambda *tensors: setattr(ctx, "saved_tensors", tensors))
    save(ctx, *tensors)
    assert None not in ctx.saved_tensors
    for found, expected in zip(saved(ctx), tensors, strict=True):
        assert found is expected
