"""InstanceNormAct1d, 2d, 3d against the pair of modules that each replaces."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import assert_all_near, gradients
from torch import Tensor, nn

import fastenc

MODULE: dict[int, Any] = {1: fastenc.InstanceNormAct1d, 2: fastenc.InstanceNormAct2d, 3: fastenc.InstanceNormAct3d}
NORM: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SIZE = {1: (11,), 2: (5, 6), 3: (3, 4, 5)}
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.PReLU, lambda: nn.PReLU(4), lambda: nn.LeakyReLU(0.1), nn.ReLU, lambda: nn.ReLU(inplace=True),
]  # fmt: skip


def twins(activation: nn.Module, order: int, affine: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """The module, the pair with its parameters, and an input."""
    ours = MODULE[order](4, activation, eps=1e-3, affine=affine)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter))
    pair = nn.Sequential(NORM[order](4, eps=1e-3, affine=affine), copy.deepcopy(activation))
    for mine, its in zip(ours.parameters(), pair.parameters(), strict=True):
        its.data.copy_(mine)
    return ours, pair, torch.randn(2, 4, *SIZE[order])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_the_pair(activation: Callable[[], nn.Module], order: int, affine: bool) -> None:
    ours, pair, x = twins(activation(), order, affine)
    expected = gradients(pair, x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours, x), expected, strict=True)), "on the eager route"
    with taken("fused"), eager_norms() as norms:
        found = gradients(ours, x)
        assert norms.call_count == 0
    assert_all_near(found, expected)


def test_hooks_and_replaced_children() -> None:
    ours, pair, x = twins(nn.LeakyReLU(0.1), 3, True)
    for norm in ours.norm, pair[0]:
        norm.register_forward_hook(lambda module, args, output: 2 * output)
    with taken("fused"):
        assert_all_near(gradients(ours, x), gradients(pair, x))
        ours.activation, pair[1] = nn.Tanh(), nn.Tanh()
        assert_all_near(gradients(ours, x), gradients(pair, x))
    with taken("triton"), pytest.raises(RuntimeError, match="a hook is registered on InstanceNorm3d"):
        ours(x)


def test_explained_and_not_accelerated_again() -> None:
    ours = nn.Sequential(MODULE[3](4, nn.ReLU()))
    with taken("fused"):
        (row,) = fastenc.explain(ours, torch.randn(2, 4, 3, 3, 3))
    assert row.route == "triton"
    (norm,) = fastenc.accelerate(ours).accelerated
    assert norm.outcome == "left"
    assert "fuse already" in norm.detail


class Gated(nn.Module):
    """Two tensors, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = MODULE[3](4, nn.PReLU()), MODULE[3](4, nn.ReLU())

    def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
        return self.left(x) * self.right(gate)


def test_explained_with_several_tensors_and_keywords() -> None:
    x, gate = torch.randn(2, 4, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)
    with taken("fused"):
        rows = list(fastenc.explain(Gated(), x, gate=gate.double()))
    assert [(row.name, row.route) for row in rows] == [("left", "triton"), ("right", "eager")]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        fastenc.explain(x, Gated())  # type: ignore[arg-type]


def test_compiles() -> None:
    torch.compiler.reset()
    ours, pair, x = twins(nn.PReLU(4), 3, True)
    with taken("fused"), torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), pair(x))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU, "relu", None])
def test_other_activations(activation: Any) -> None:
    with pytest.raises(
        TypeError, match=r"activation must be a module of one of nn\.PReLU, nn\.LeakyReLU, nn\.ReLU, got"
    ):
        fastenc.InstanceNormAct3d(4, activation)


def test_other_slopes() -> None:
    with pytest.raises(ValueError, match="activation must have 1 slope or num_features=4, got 3"):
        fastenc.InstanceNormAct3d(4, nn.PReLU(3))


def test_slopes_of_a_wrong_length_given_later() -> None:
    """torch's own error, whatever the kernel would make of them."""
    for wrong in (2, 3, 8):
        ours, pair, x = twins(nn.PReLU(4), 3, True)
        for prelu in (ours.activation, pair[1]):
            prelu.weight = nn.Parameter(torch.ones(wrong))
        with pytest.raises(RuntimeError) as expected:
            pair(x)
        with taken("fused"), pytest.raises(RuntimeError) as found:
            ours(x)
        assert str(found.value) == str(expected.value)
