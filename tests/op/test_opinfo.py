"""PyTorch's own sample inputs of InstanceNorm, PReLU and LeakyReLU, through the fused operation and through layers."""

from unittest import mock

import pytest
import torch
from support.backends import launches_replaced, taken
from support.opinfo import ACTIVATIONS, NORMS, SOURCES, activations, calls, distinct_calls, information, layers, outcome
from support.plain import assert_all_near
from test_forward_backward import check
from torch import Tensor, nn

import fastenc


def results(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return (y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_eager_is_bitwise_torchs_composition(name: str, dtype: torch.dtype) -> None:
    samples = list(calls(name, "cpu", dtype))
    assert samples
    for call in samples:
        found = results(fastenc.instance_norm_prelu(*call.arguments), call.leaves)
        expected = results(call.torchs(call.x), call.leaves)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in SOURCES), *((name, torch.bfloat16) for name in NORMS[2:])]
)
def test_kernels_by_the_rule(name: str, dtype: torch.dtype) -> None:
    """From float64 no farther than twice torch's own operations in the same dtype, plus a few ULP; backward too."""
    with taken("triton"):
        for call in distinct_calls(name, "cpu", dtype):
            x, weight, bias, slope, eps = call.arguments
            check(x, weight, bias, slope, torch.randn_like(x), eps)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("route", ["auto", "fused"])
def test_gradcheck(name: str, route: str) -> None:
    """With the settings of PyTorch's own tests. Fused, the formula stands for each launch."""
    from torch.testing._internal.common_utils import gradcheck, gradgradcheck

    wide = mock.patch("fastenc.route.DTYPES", frozenset((torch.float64,)))
    for call in distinct_calls(name, "cpu", torch.float64):

        def op(*leaves: Tensor, call=call) -> Tensor:
            given = iter(leaves)
            arguments = [next(given) if isinstance(value, Tensor) else value for value in call.arguments]
            return fastenc.instance_norm_prelu(*arguments)

        if route == "auto":
            assert gradcheck(op, call.leaves, check_forward_ad=True, check_batched_forward_grad=True)
            assert gradgradcheck(op, call.leaves, check_fwd_over_rev=True)
        else:
            with launches_replaced(), wide:
                assert gradcheck(op, call.leaves)
                assert gradgradcheck(op, call.leaves)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_samples_that_are_refused(backend: str) -> None:
    """What has no position or no channel, slopes without an axis, the error inputs of prelu: a ValueError."""
    refused = [
        (sample.x, sample.slope)
        for name in ACTIVATIONS
        for sample in activations(name, "cpu", torch.float32)
        if sample.x.dim() < 3 or (isinstance(sample.slope, Tensor) and sample.slope.dim() == 0)
    ]
    entry = information()["nn.functional.prelu"]
    errors = [error.sample_input for error in entry.error_inputs_func(entry, "cpu")]
    with taken(backend):
        for x, slope in [*refused, *((error.input, error.kwargs["weight"]) for error in errors)]:
            with pytest.raises(ValueError, match="slope must have" if x.dim() > 2 and x.numel() else "x must"):
                fastenc.instance_norm_prelu(x, slope=slope)
    assert len(refused) > len(errors) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS[:3])
@pytest.mark.parametrize("route", ["auto", "fused"])
def test_layers(route: str, name: str, training: bool) -> None:
    """Running statistics and inputs without a batch among them: the same numbers or the same kind of error."""
    with taken(route) as dtype:
        for layer, twin, x in layers(name, "cpu", dtype, training):
            found, expected = outcome(layer, x), outcome(twin, x)
            if isinstance(expected, type):
                assert found is expected
            else:
                assert_all_near(found, expected)


@pytest.mark.parametrize("route", ["auto", "fused"])
def test_layers_with_the_error_inputs_of_prelu(route: str) -> None:
    entry = information()["nn.functional.prelu"]
    with taken(route):
        for error in entry.error_inputs_func(entry, "cpu"):
            x, slope = error.sample_input.input, error.sample_input.kwargs["weight"]
            layer = fastenc.ConvModern1d(8, 2)
            layer.mconv[1].weight = nn.Parameter(slope)
            found, expected = outcome(layer, x), outcome(layer.mconv, x)
            assert isinstance(expected, type)
            assert found is expected
