"""The closed-form backward of fastenc.reference against autograd, in float64."""

import pytest
import torch

from fastenc import reference


@pytest.mark.parametrize("shape", [(1, 3, 7), (2, 3, 4, 5), (3, 2, 3, 2, 4)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["per channel", "shared", "number"])
def test_closed_form_backward(shape: tuple[int, ...], affine: bool, kind: str) -> None:
    C = shape[1]
    x, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(C, dtype=torch.float64) if affine else None for _ in range(2))
    slope = {"per channel": torch.rand(C).double() - 0.5, "shared": torch.rand(1).double(), "number": 0.1}[kind]
    leaves = [t.requires_grad_() for t in (x, weight, bias, slope) if isinstance(t, torch.Tensor)]
    expected = torch.autograd.grad(reference.forward(x, weight, bias, slope), leaves, dy)
    found = [g for g in reference.backward(dy, x, weight, bias, slope) if g is not None]
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_closed_form_backward_has_right_derivatives() -> None:
    x, dy = (torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias, slope = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(reference.backward, (dy, x, weight, bias, slope))
