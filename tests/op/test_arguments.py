"""instance_norm_prelu: what it refuses, and what it does on the eager route."""

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastenc
from fastenc import functional, reference, route
from fastenc.bench.proofs.interpret import interpreted


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        (
            {"x": torch.randn(2, 3)},
            ValueError,
            "x must be (N, C, *spatial) with at least one spatial axis, got shape (2, 3)",
        ),
        ({"x": torch.randn(0, 3, 4)}, ValueError, "at least one sample and one channel, got shape (0, 3, 4)"),
        ({"x": torch.randn(2, 0, 4)}, ValueError, "at least one sample and one channel, got shape (2, 0, 4)"),
        ({"x": torch.randn(2, 3, 1)}, ValueError, "Expected more than 1 spatial element when training, got input size"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have shape (3,) for x of shape (2, 3, 4, 4), got (4,)"),
        ({"bias": torch.ones(1)}, ValueError, "bias must have shape (3,) for x of shape (2, 3, 4, 4), got (1,)"),
        (
            {"slope": torch.ones(2)},
            ValueError,
            "slope must have shape (3,) or (1,) for x of shape (2, 3, 4, 4), got (2,)",
        ),
        ({"slope": torch.tensor(0.1)}, ValueError, "slope must have shape (3,) or (1,)"),
        ({"slope": "0.1"}, TypeError, "slope must be a torch.Tensor or a number, got str"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor, got float"),
        ({"bias": torch.ones(3).double()}, ValueError, "bias must be torch.float32 (x's dtype) or torch.float32, got"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"x": torch.randn(2, 3, 4, 4), "weight": torch.ones(3), "bias": torch.ones(3), "slope": 0.1} | change
    with interpreted(), fastenc.backend(backend), pytest.raises(error, match=re.escape(message)):
        fastenc.instance_norm_prelu(**arguments)


class Negating(nn.Parameter):
    """A slope whose PReLU has the other sign."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return -y if func is torch.prelu else y


def test_a_parameter_of_another_class_computes_in_its_own_way() -> None:
    x, slope = torch.randn(2, 3, 4, 5), Negating(torch.rand(3))
    expected = -nn.functional.prelu(nn.functional.instance_norm(x), slope.data)
    pair = fastenc.InstanceNormAct2d(3, nn.PReLU(3))
    pair.activation.weight = slope
    with interpreted(), fastenc.backend("auto"), mock.patch("fastenc.route.device_reason", return_value=None):
        for y in (fastenc.instance_norm_prelu(x, slope=slope), pair(x)):
            assert torch.equal(y.as_subclass(Tensor), expected)
    with (
        interpreted(),
        fastenc.backend("triton"),
        pytest.raises(RuntimeError, match="slope is a Negating, not a plain"),
    ):
        fastenc.instance_norm_prelu(x, slope=slope)


def test_no_spatial_position_is_what_torch_does() -> None:
    x = torch.randn(2, 3, 0, 4)
    with interpreted(), fastenc.backend("triton"):
        assert fastenc.instance_norm_prelu(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_eager_route_is_torchs_two_operations(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype)
    weight, bias, slope = (torch.rand(3).to(dtype) for _ in range(3))
    expected = torch.nn.functional.prelu(torch.nn.functional.instance_norm(x, weight=weight, bias=bias), slope)
    assert torch.equal(fastenc.instance_norm_prelu(x, weight, bias, slope), expected)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [*itertools.product((torch.bfloat16, torch.float16), ("eager", "triton")), (torch.float64, "eager")],
)
def test_every_mixture_of_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Each parameter in x's dtype or in float32, or None: y and the gradients, against float64."""
    choices = (dtype, torch.float32)
    mixtures = itertools.product((*choices, None), (*choices, None), (*choices, None), (False, True))
    for weight_dtype, bias_dtype, slope_dtype, add in mixtures:
        # x̂ is near 1 or −1 and |z| above 1/4: rounding takes none to the other side of 0.
        x = torch.tensor([1.0, -1.0]).repeat(144).view(3, 4, 2, 3, 4) + torch.rand(3, 4, 2, 3, 4) / 8
        x = x.to(dtype).requires_grad_()
        residual = (torch.rand(x.shape) / 4).to(dtype).requires_grad_() if add else None
        weight, bias, slope = (
            None if chosen is None else (torch.rand(4) / 4 + least).to(chosen).requires_grad_()
            for chosen, least in ((weight_dtype, 1.0), (bias_dtype, 0.0), (slope_dtype, 0.25))
        )
        leaves = [leaf for leaf in (x, weight, bias, slope, residual) if leaf is not None]
        results = []
        for wide in (False, True):
            given = {leaf: leaf.detach().double().requires_grad_() if wide else leaf for leaf in leaves}
            with interpreted(), fastenc.backend("eager" if wide else backend):
                y = fastenc.instance_norm_prelu(
                    given[x], given.get(weight), given.get(bias), 0.1 if slope is None else given[slope],
                    residual=given.get(residual),
                )  # fmt: skip
                dy = torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(dtype).to(y.dtype)
                results.append([y, *torch.autograd.grad(y, [*given.values()], dy)])
        assert [found.dtype for found in results[0]] == [dtype, *(leaf.dtype for leaf in leaves)]
        # A few roundings of x's dtype in y, dy and dz, and in sums of them.
        for found, truth in zip(*results, strict=True):
            eps = max(torch.finfo(dtype).eps, torch.finfo(found.dtype).eps)
            assert (found.double() - truth).norm() <= 16 * eps * (truth.norm() + 1)


def test_gradients_of_mixed_dtypes_are_rounded_once() -> None:
    """A float32 weight's gradient has float32's accuracy, whatever the bias's dtype; and the other way round."""
    x = torch.randn(3, 4, 2, 3, 4).bfloat16()
    dy = torch.randn_like(x)
    for dtypes in itertools.product((torch.bfloat16, torch.float32), repeat=3):
        leaves = [(torch.rand(4) + 0.25).to(dtype).requires_grad_() for dtype in dtypes]
        with interpreted(), fastenc.backend("triton"):
            found = torch.autograd.grad(fastenc.instance_norm_prelu(x, *leaves), leaves, dy)
        truth = reference.backward(dy.double(), x.double(), *(leaf.detach().double() for leaf in leaves))[1:]
        for dtype, mine, value in zip(dtypes, found, truth, strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - value).norm() <= max(1e-5, torch.finfo(dtype).eps) * value.norm()


def failing(error: Exception) -> Callable[..., object]:
    def launcher(*args: object) -> object:
        raise error

    return launcher


@pytest.fixture
def _a_gpu_that_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto", CPU tensors count as CUDA tensors, so that the fallback can be observed."""
    monkeypatch.setattr(route, "device_reason", lambda x: route._faults.get(x.device))
    monkeypatch.setattr(route, "_faults", {})
    monkeypatch.setattr(route, "_warned", set())


@pytest.mark.usefixtures("_a_gpu_that_is_a_cpu")
def test_a_kernel_that_cannot_run_here_falls_back_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    forward = functional.launchers()[0]
    broken = failing(RuntimeError("Failed to find C compiler."))
    x, weight, bias, slope = torch.randn(2, 3, 4, 5), torch.ones(3), torch.zeros(3), torch.rand(3)

    def result() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, slope)]
        y = fastenc.instance_norm_prelu(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    with fastenc.backend("eager"):
        expected = result()
    for launchers in ((broken, broken), (forward, broken)):
        route._faults.clear()
        route._warned.clear()
        monkeypatch.setattr(functional, "launchers", lambda pair=launchers: pair)
        recwarn.clear()
        with interpreted():
            for found in (result(), result()):
                for mine, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, theirs)
        warned = [str(w.message) for w in recwarn if "fastenc" in str(w.message)]
        assert len(warned) == 1
        assert "RuntimeError: Failed to find C compiler." in warned[0]
        with interpreted(), fastenc.backend("triton"), pytest.raises(RuntimeError, match="C compiler"):
            result()


@pytest.mark.usefixtures("_a_gpu_that_is_a_cpu")
def test_out_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = failing(torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(functional, "launchers", lambda: (broken, broken))
    with pytest.raises(torch.OutOfMemoryError):
        fastenc.instance_norm_prelu(torch.randn(2, 3, 4))
    assert not route._faults


def test_triton_is_imported_at_the_first_fused_call_only() -> None:
    import subprocess

    code = (
        "import sys, torch, fastenc; fastenc.instance_norm_prelu(torch.randn(2, 3, 4)); print('triton' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1] == "False"
