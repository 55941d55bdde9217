"""What holds for every call, found out on random ones: `make test` draws the same each time, `make fuzz` others."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.accuracy import double, formula, gradients, hold, magnitudes, unavoidable
from support.backends import eager_norms, taken
from support.cases import DTYPES, NEEDS, Case, Tensors, arranged, cases, small_shapes, tensors
from support.plain import assert_all_near, twins
from support.plain import gradients as network_gradients
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastenc
from fastenc import functional, reference, route
from fastenc.bench.engine.agreement import OUTPUT, distances, judge
from fastenc.kernels.launch import prepared
from fastenc.kernels.layout import readable

KERNEL_DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.float64)


def examples(count: int) -> settings:
    """The same `count` examples each time; where tests/tools/fuzz.py runs, a tenth of them from its seed."""
    fuzzed = settings.get_current_profile_name() == "fuzz"
    return settings(
        max_examples=max(1, count // 10) if fuzzed else count,
        derandomize=not fuzzed,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def plain(x: Tensor, weight: Any, bias: Any, slope: Any, eps: float, residual: Tensor | None = None) -> Tensor:
    """The PyTorch lines that the operation replaces, with parameters of one dtype, as torch needs them."""
    if any(parameter is not None and parameter.dtype != x.dtype for parameter in (weight, bias)):
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    z = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    z = z if residual is None else z + residual
    return F.prelu(z, slope.to(z.dtype)) if isinstance(slope, Tensor) else F.leaky_relu(z, slope)


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What function returns, or the type of what it raises."""
    try:
        return function(*args, **options)
    except Exception as error:
        return type(error)


# ----------------------------------------------------------------------------------------------------------------------
# The eager route

# What no call may have: what it changes, and what is raised for it; None for whatever torch raises or returns.
Change = Callable[[Tensors], dict[str, Any]]
MISFITS: dict[str, tuple[Change, type[Exception] | None]] = {
    "no spatial axis": (lambda t: {"x": t.x.flatten(1)[:, 0], "residual": None}, ValueError),
    "no sample": (lambda t: {"x": t.x[:0], "residual": None}, ValueError),
    "no channel": (lambda t: {"x": t.x[:, :0], "weight": None, "bias": None, "slope": 0.1}, ValueError),
    "no position": (lambda t: {"x": t.x[..., :0], "dy": t.dy[..., :0], "residual": None}, None),
    "one position": (lambda t: {"x": t.x.flatten(2)[..., :1], "residual": None}, None),
    "weight too long": (lambda t: {"weight": t.x.new_ones(t.x.shape[1] + 1)}, ValueError),
    "bias of two axes": (lambda t: {"bias": t.x.new_ones(t.x.shape[1], 1)}, ValueError),
    "slope without an axis": (lambda t: {"slope": t.x.new_ones(())}, ValueError),
    "slope too long": (lambda t: {"slope": t.x.new_ones(t.x.shape[1] + 2)}, ValueError),
    "weight of another dtype": (lambda t: {"weight": other_dtype(t.x.new_ones(t.x.shape[1]))}, ValueError),
    "slope elsewhere": (lambda t: {"slope": torch.ones(1, dtype=t.x.dtype, device="meta")}, ValueError),
    "residual of another shape": (lambda t: {"residual": t.x[..., :0]}, ValueError),
    "residual of another dtype": (lambda t: {"residual": other_dtype(t.x)}, ValueError),
    "residual no tensor": (lambda t: {"residual": 1.0}, TypeError),
    "bias no tensor": (lambda t: {"bias": [0.0] * t.x.shape[1]}, TypeError),
    "slope no number": (lambda t: {"slope": "0.1"}, TypeError),
    "x of integers": (lambda t: bare(t.x.nan_to_num(0, 0, 0).int()), None),
    "x of complex numbers": (lambda t: bare(t.x.to(torch.complex64)), None),
}


def other_dtype(x: Tensor) -> Tensor:
    return x.half() if x.dtype != torch.float16 else x.bfloat16()


def bare(x: Tensor) -> dict[str, Any]:
    return {"x": x, "weight": None, "bias": None, "slope": 0.1, "residual": None}


@examples(1200)
@given(
    cases(small_shapes()),
    st.sampled_from([*[None] * 36, *MISFITS]),
    st.sampled_from(("auto", "eager")),
)
def test_eager_route_is_torchs_operations(case: Case, misfit: str | None, backend: str) -> None:
    """The results and gradients are bitwise equal. Strides and errors are the same."""
    call, raised = tensors(case), None
    if misfit is not None:
        change, raised = MISFITS[misfit]
        call = call._replace(**change(call))
    needs = case.needs if raised is None else ()
    with fastenc.backend(backend):
        found = outcome(gradients, fastenc.instance_norm_prelu, *call, needs=needs)
    expected = outcome(gradients, plain, *call, needs=needs) if raised is None else raised
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, check_stride=True, msg=name)


# What these tests found first: a constant channel whose mean float32 rounds, so that a deviation is left.
CONSTANT = Case(
    (1, 1, 2, 4), torch.float32, *[("contiguous", ())] * 3, False, False, "per channel", 0.0,
    torch.float32, 1e3, 0.0, True, 1e-5, (), 0,
)  # fmt: skip


@examples(300)
@given(cases(small_shapes()))
@example(CONSTANT)
def test_closed_form_backward(case: Case) -> None:
    """What double backward, and a backward kernel that cannot run, fall back on."""
    call = tensors(replace(case, needs=NEEDS, parameters=case.dtype))
    torchs, truth = gradients(plain, *call), gradients(formula, *map(double, call))
    found = [gradient for gradient in reference.backward(*call) if gradient is not None]
    ours = dict(zip(truth, [torchs["y"], *found], strict=True))
    hold(ours, torchs, truth, magnitudes(*call), unavoidable(*call))


# ----------------------------------------------------------------------------------------------------------------------
# Which route


class Annotated(Tensor):
    """A tensor of another type."""


def traced(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = []
    torch.jit.trace(lambda x: y.append(call(x)) or y[0], x, check_trace=False)
    return y[0]


class Passing(TorchDispatchMode):
    """Sees every aten operation, and runs it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[..., Tensor]:
    def run(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with context():
            return call(x)

    return run


# What PyTorch is doing at the time of a call, and the reason that it is for the eager route.
OBSERVED: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "nothing": (lambda call, x: call(x), None),
    "autocast": (under(lambda: torch.autocast("cpu", torch.bfloat16)), None),
    "no gradients": (under(torch.no_grad), None),
    "inference mode": (under(torch.inference_mode), None),
    "torch.func": (lambda call, x: torch.func.vjp(call, x)[0], route.TRANSFORM),
    "vmap": (lambda call, x: torch.vmap(call)(x[None])[0], route.TRANSFORM),
    "forward mode": (under(forward_ad.dual_level), route.FORWARD_MODE),
    "dispatch mode": (under(Passing), "a TorchDispatchMode is active, which sees aten operations only"),
    "subclass": (lambda call, x: call(x.as_subclass(Annotated)), "x is a Annotated, not a plain torch.Tensor"),
    "jit.trace": (traced, "torch.jit or the ONNX exporter is tracing"),
}


def expected_reason(backend: str, observed: str, dtype: torch.dtype, gpu: bool) -> str | None:
    """Why a call takes the eager route, as DESIGN tells it: the user's wish, PyTorch's, the dtype, the device."""
    if backend == "eager":
        return 'backend "eager" was asked for'
    if OBSERVED[observed][1] is not None:
        return OBSERVED[observed][1]
    if dtype == torch.float64:
        return "x is float64; the kernels compute in float32, bfloat16 and float16"
    if gpu:
        return None
    if backend == "auto":
        return "x is on the CPU; the kernels run on CUDA"
    return "x is on the CPU and the kernels are not interpreted (set TRITON_INTERPRET=1 before starting Python)"


@contextlib.contextmanager
def launches(gpu: bool) -> Iterator[list[Tensor]]:
    """Forward launches inside the block, which the formula answers; gpu: CPU tensors count as on a GPU."""
    seen = []

    def forward(
        x: Tensor, weight: Any, bias: Any, slope: Any, eps: float, dtype: Any, *rest: Any, residual: Any = None
    ) -> tuple[Tensor, Tensor]:
        seen.append(x)
        with torch.autocast("cpu", enabled=False):
            return plain(x, weight, bias, slope, eps, residual).to(dtype or x.dtype), x.new_empty(0)

    able = mock.patch.object(route, "device_reason", return_value=None) if gpu else contextlib.nullcontext()
    with able, mock.patch.object(functional, "launchers", return_value=(forward, None)):
        yield seen


@examples(800)
@given(cases(small_shapes()), st.sampled_from(route.BACKENDS), st.sampled_from(list(OBSERVED)), st.booleans())
def test_route_and_reason(case: Case, backend: str, observed: str, gpu: bool) -> None:
    _, x, *rest = tensors(replace(case, parameters=case.dtype))
    around, reason = OBSERVED[observed][0], expected_reason(backend, observed, case.dtype, gpu)
    leaf = x.requires_grad_("x" in case.needs and observed != "vmap")

    def run(function: Callable[..., Tensor]) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # jit.trace's
            return around(lambda x: function(x, *rest), leaf)

    with fastenc.backend(backend), launches(gpu) as launched, mock.patch.object(route.logger, "debug") as log:
        if backend == "triton" and reason is not None:
            with pytest.raises(RuntimeError) as error:
                run(fastenc.instance_norm_prelu)
            assert str(error.value) == f'backend "triton" was asked for, but {reason}'
            return
        y = run(fastenc.instance_norm_prelu)
    assert len(launched) == (reason is None)
    assert log.mock_calls == ([] if reason is None else [mock.call("eager route: %s", reason)])
    expected = run(plain)
    assert type(y) is type(expected)
    assert (y.dtype, y.shape, y.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad)


# ----------------------------------------------------------------------------------------------------------------------
# The Triton route


# numpy's words for the infinities and NaN of the Cases that overflow.
quiet = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def _interpreted() -> Iterator[None]:
    """The Triton route, and NaN in whatever torch.empty hands out."""
    with taken("triton"):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def as_near_as_torch(case: Case) -> None:
    """The rule of accuracy.py, and the layout: x's where the kernels read it, else channels-last if torch has that."""
    call = tensors(case)
    before = [value.clone() if isinstance(value, Tensor) else value for value in call]
    ours = gradients(fastenc.instance_norm_prelu, *call, needs=case.needs)
    truth = gradients(formula, *map(double, call), needs=case.needs)
    hold(ours, gradients(plain, *call, needs=case.needs), truth, magnitudes(*call), unavoidable(*call))
    x = call.x
    last = not x.is_contiguous() and (x.dim() > 3 or x.movedim(1, -1).is_contiguous())
    for name in {"y", "dx", "dresidual"} & ours.keys():
        assert (ours[name].movedim(1, -1) if last else ours[name]).is_contiguous(), name
    for name, value, was in zip(call._fields, call, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value.nan_to_num(), was.nan_to_num()), (
            f"{name} was written to"
        )


def one_pass(case: Case, backward: bool) -> bool:
    x = readable(tensors(case).x)
    launch = prepared(x.shape, x.stride(), x.itemsize, -1, backward, case.residual is not None)
    assert launch is not None
    return launch[3].branch == "one pass"


@quiet
@pytest.mark.usefixtures("_interpreted")
@examples(250)
@given(cases(small_shapes(), KERNEL_DTYPES))
def test_triton_route_in_one_pass(case: Case) -> None:
    assert one_pass(case, False)
    assert one_pass(case, True)
    as_near_as_torch(case)


# The smallest tensors whose rows are split: slices of 33 to 39 channels break sectors, so a program takes them all.
long_rows = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(16385, 34000))
wide_blocks = st.tuples(st.integers(1, 2), st.integers(33, 39), st.integers(257, 300))


@quiet
@pytest.mark.usefixtures("_interpreted")
@examples(50)
@given(cases(long_rows, KERNEL_DTYPES) | cases(wide_blocks, KERNEL_DTYPES, ("channels_last",)))
def test_triton_route_with_split_rows(case: Case) -> None:
    assert not one_pass(case, True)
    as_near_as_torch(case)


# ----------------------------------------------------------------------------------------------------------------------
# The network


@dataclass(frozen=True)
class Network:
    """An encoder and the size of its input, (N, in_planes, *spatial)."""

    channel: int
    layers: tuple[int, ...]
    kernel_size: tuple[int, ...]
    out_length: int | None
    recompute: bool
    size: tuple[int, ...]
    channels_last: bool
    seed: int

    def twins(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        order = len(self.kernel_size)
        net, plain = twins(
            self.channel, self.layers, self.kernel_size, self.size[1], self.out_length, order=order, dtype=dtype
        )
        net.recompute = self.recompute
        return net, plain

    def x(self, dtype: torch.dtype) -> Tensor:
        x = torch.randn(self.size, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64).to(dtype)
        return arranged(x, ("channels_last" if self.channels_last else "contiguous", ()))


@st.composite
def networks(draw: Any) -> Network:
    axes = draw(st.integers(1, 3))
    longest = {1: 24, 2: 12, 3: 8}[axes]
    return Network(
        draw(st.integers(1, 3)),
        tuple(draw(st.lists(st.integers(1, 2), min_size=2, max_size=3))),
        tuple(draw(st.integers(0, 4)) for _ in range(axes)),
        draw(st.sampled_from((None, 0, 1, 3))),
        draw(st.booleans()),
        (
            draw(st.sampled_from((1, 2, 3, 2, 0))),
            draw(st.integers(1, 3)),
            *(draw(st.integers(1, longest)) for _ in range(axes)),
        ),
        draw(st.booleans()),
        draw(st.integers(0, 999)),
    )


@examples(250)
@given(networks())
def test_network_is_the_plain_one(network: Network) -> None:
    net, plain_net = network.twins(torch.float64)
    x = network.x(torch.float64)
    found, expected = outcome(network_gradients, net, x), outcome(network_gradients, plain_net, x)
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected
    else:
        assert_all_near(found, expected)


@examples(40)
@given(networks())
def test_fused_network_is_as_near_as_the_plain_one(network: Network) -> None:
    net, plain_net = network.twins(torch.float32)
    x = network.x(torch.float32)
    with taken("fused"), eager_norms() as calls:
        found = outcome(network_gradients, net, x)
    with eager_norms() as plain_calls:
        eager = outcome(network_gradients, plain_net, x)
    if isinstance(eager, type) or isinstance(found, type):
        assert found is eager
        return
    assert calls.call_count == 0
    # Of two positions a norm makes ±1: hardly a gradient is left but rounding.
    assume(all(call.args[0].shape[2:].numel() > 2 for call in plain_calls.mock_calls))
    exact = parts(network_gradients(plain_net.double(), x.double()))
    verdict = judge(distances(parts(found), exact), distances(parts(eager), exact))
    assert verdict.agrees, verdict


def parts(results: list[Tensor]) -> dict[str, Tensor]:
    """Output, gradient of x, and the parameters' gradients as one: some are zero except for rounding."""
    y, dx, *others = results
    return {OUTPUT: y, "x": dx, "parameters": torch.cat([gradient.flatten() for gradient in others])}
