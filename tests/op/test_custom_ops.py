"""The operators of the Triton route under torch.compile and torch.export: kernels interpreted, graphs counted.

"fused" is "auto" as it is on a GPU. What the eager route leaves to tracers is in test_tracers.py.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import taken
from support.plain import assert_all_near, assert_near, assert_same, gradients, small_input, small_twins
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.library import opcheck
from torch.onnx._internal.exporter._flags import set_onnx_exporting_flag

import fastenc
import fastenc.library
from fastenc.bench.proofs.interpret import sampled_programs
from fastenc.bench.suites import bench_host_cost

OPERATOR = torch.ops.fastenc.instance_norm_prelu.default
BACKWARD = torch.ops.fastenc.instance_norm_prelu_backward.default
OTHER_SIZE = (9, 8, 11)


def fused_nodes(graph: torch.fx.Graph) -> int:
    return sum(node.target in (OPERATOR, BACKWARD) for node in graph.nodes)


class Compiled:
    """function compiled whole, forward and backward, and the number of operators in each graph that came of it."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        torch.compiler.reset()
        self.graphs: list[int] = []
        self.parameters = getattr(function, "parameters", None)

        def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            self.graphs.append(fused_nodes(module.graph))
            return module.forward

        self.function = torch.compile(function, backend=aot_autograd(fw_compiler=look), **{"fullgraph": True} | options)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def arranged(shape: tuple[int, ...], arrangement: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape).to(dtype)
    if arrangement == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if arrangement == "neither":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


@pytest.mark.parametrize(
    ("arrangement", "affine", "slope", "dtype"),
    [
        ("contiguous", True, torch.tensor([0.1, 0.2, -0.3]), torch.float32),
        ("channels_last", False, 0.1, torch.bfloat16),
        ("neither", True, torch.tensor([0.2]), torch.float16),
    ],
)
def test_opcheck(arrangement: str, affine: bool, slope: Tensor | float, dtype: torch.dtype) -> None:
    shared, number = (slope.requires_grad_(), 0.0) if isinstance(slope, Tensor) else (None, slope)
    weight, bias = (torch.randn(3, requires_grad=True) if affine else None for _ in range(2))
    with taken("fused"):
        x = arranged((2, 3, 2, 3, 2), arrangement, dtype).requires_grad_()
        for output in (None, torch.bfloat16):
            opcheck(OPERATOR, (x, weight, bias, shared, number, 1e-5, output))
        plain = [None if t is None else t.detach() for t in (x, weight, bias, shared)]
        _, statistics = OPERATOR(*plain, number, 1e-5, None)
        for needs in ([True] * 5, [True, *[False] * 4], [False, affine, False, shared is not None, False]):
            opcheck(BACKWARD, (arranged(x.shape, "contiguous", dtype), *plain, number, statistics, needs))


SHAPES = [(2, 3, 4), (2, 1, 4), (1, 3, 4, 5), (2, 1, 1, 5), (2, 3, 4, 5, 6), (1, 1, 2, 1, 1), (2, 8, 17, 16, 16)]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 2, 2, 2)])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "neither"])
def test_fakes_promise_what_the_kernels_return(shape: tuple[int, ...], arrangement: str) -> None:
    C = shape[1]
    dtypes = [(torch.float32, None), (torch.bfloat16, torch.float32)]
    with taken("fused"), sampled_programs(lambda name, grid: []):
        for (dtype, output), needs in itertools.product(dtypes, ([True] * 5, [False, True, False, False, False])):
            x, dy = arranged(shape, arrangement, dtype), arranged(shape, "contiguous", output or dtype)
            parameters = [torch.ones(C, dtype=dtype), torch.zeros(C), torch.rand(1)]
            results = OPERATOR(x, *parameters, 0.0, 1e-5, output)
            results += BACKWARD(dy, x, *parameters, 0.0, results[1], needs)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in (dy, x, *parameters)]
                promised = OPERATOR(*fakes[1:], 0.0, 1e-5, output)
                promised += BACKWARD(*fakes, 0.0, promised[1], needs)
            for found, expected in zip(results, promised, strict=True):
                assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert len({t.untyped_storage().data_ptr() for t in results if t.numel()}) == sum(
                t.numel() > 0 for t in results
            ), "results share no memory"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ["auto", "fused", "triton"])
def test_compiled_op(route: str, dynamic: bool) -> None:
    with taken(route) as dtype:
        compiled = Compiled(fastenc.instance_norm_prelu, dynamic=dynamic)
        parameters = [torch.randn(3, dtype=dtype, requires_grad=True) for _ in range(3)]
        for shape in ((2, 3, 4, 5, 6), (3, 3, 6, 5, 4)):
            x = arranged(shape, "channels_last", dtype).requires_grad_()
            found, expected = (op(x, *parameters, 1e-3) for op in (compiled, fastenc.instance_norm_prelu))
            assert found.stride() == expected.stride()
            outcomes = [torch.autograd.grad(y.square().sum(), [x, *parameters]) for y in (found, expected)]
            assert_all_near((found, *outcomes[0]), (expected, *outcomes[1]))
    assert compiled.graphs == ([0] if route == "auto" else [1]) * (2 if dynamic else 4)


@pytest.mark.parametrize("slope", [torch.tensor([0.25]), 0.1], ids=["prelu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_op_under_autocast(dtype: torch.dtype, slope: Tensor | float) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    with taken("fused"):
        compiled = Compiled(fastenc.instance_norm_prelu)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (op(x, None, None, slope) for op in (compiled, fastenc.instance_norm_prelu))
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, expected)))
    assert compiled.graphs == [1, 1]


@pytest.mark.parametrize("route", ["fused", "triton"])
def test_compiled_network(route: str) -> None:
    """Every layer is one operator, and another size compiles nothing."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype, out_length=None)
        compiled = Compiled(net, dynamic=True)
        for x in (small_input(dtype=dtype), small_input(OTHER_SIZE, batch=3, dtype=dtype)):
            found = compiled(x)
            assert found.stride() == net(x).stride()
            assert_near(found, plain(x))
        grads = torch.autograd.grad(found.square().sum(), list(net.parameters()))
        assert_all_near(grads, torch.autograd.grad(plain(x).square().sum(), list(plain.parameters())))
    assert compiled.graphs == [3, 3]


def test_another_backend_compiles_again() -> None:
    with taken("fused") as dtype:
        net, plain = small_twins(dtype)
        compiled = Compiled(net)
        for name in ("auto", "eager", "auto"):
            with fastenc.backend(name), torch.no_grad():
                assert_near(compiled(small_input(dtype=dtype)), plain(small_input(dtype=dtype)))
    assert compiled.graphs == [3, 0]


def test_triton_backend_raises_with_reason() -> None:
    net, _ = small_twins(torch.float64)
    with taken("triton"), pytest.raises(RuntimeError, match="float64"):
        Compiled(net, fullgraph=False)(small_input())


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(lambda module, args, y: 2 * y + 1),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda module, args: (3 * args[0] - 1,)),
    "backward": lambda module: module.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],)),
}


@pytest.mark.parametrize("place", ["mconv.0", "mconv.1"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_compiled_too(kind: str, place: str) -> None:
    """torch.compile itself breaks the graph at a backward hook."""
    with taken("fused") as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        for network in (net, plain):
            HOOKS[kind](network.get_submodule(f"netbody.1.conv_scale.{place}"))
        compiled = Compiled(net, fullgraph=kind != "backward")
        assert_same(compiled, plain, small_input(dtype=dtype))
    assert sum(compiled.graphs) == 2  # the other layer, forward and backward


TRANSFORMS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "vmap": lambda net: lambda x: torch.vmap(lambda sample: net(sample[None])[0])(x),
    "grad": lambda net: torch.func.grad(lambda x: net(x).square().sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_inside_stays_plain(name: str) -> None:
    with taken("fused") as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        compiled = Compiled(TRANSFORMS[name](net))
        x = small_input(dtype=dtype)
        assert_near(compiled(x), TRANSFORMS[name](plain)(x))
    assert set(compiled.graphs) == {0}


@pytest.fixture(scope="module", params=[False, True], ids=["not strict", "strict"])
def exported(request: pytest.FixtureRequest) -> torch.export.ExportedProgram:
    axes = {0: torch.export.Dim("batch", min=2), **dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)}
    with taken("fused") as dtype:
        net, _ = small_twins(dtype)
        x = small_input((8, 7, 9), dtype=dtype)
        return torch.export.export(net, (x,), dynamic_shapes=(axes,), strict=request.param)


def test_export_on_the_triton_route(exported: torch.export.ExportedProgram) -> None:
    """Three operators for three layers; run, differentiated once and twice, at another size."""
    assert fused_nodes(exported.graph) == fused_nodes(exported.run_decompositions().graph) == 3
    with taken("fused") as dtype:
        _, plain = small_twins(dtype)
        module, x = exported.module(), small_input(OTHER_SIZE, batch=3, dtype=dtype)
        assert_all_near(gradients(module, x)[:2], gradients(plain, x)[:2])
        penalties = []
        for network in (module, plain):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(slope.square().sum(), x)[0])
        assert_near(*penalties)


def test_an_operator_loses_no_tangent(exported: torch.export.ExportedProgram) -> None:
    """That of a gradient goes through the formula; that of an input is refused, where a zero would come back."""
    with taken("fused") as dtype:
        _, plain = small_twins(dtype)
        module, x = exported.module(), small_input(OTHER_SIZE, batch=3, dtype=dtype).requires_grad_()
        y = module(x)
        moved = torch.arange(1.0, 1 + y.numel(), dtype=dtype).view_as(y)
        with dual_level():
            (gradient,) = torch.autograd.grad(y, x, make_dual(torch.ones_like(y), moved))
            found = unpack_dual(gradient).tangent
            with pytest.raises((RuntimeError, NotImplementedError)):
                module(make_dual(x.detach(), x.detach()))
        assert_near(found, torch.autograd.grad(plain(x), x, moved)[0])
        with pytest.raises(RuntimeError, match="forward-mode differentiation is active"):
            torch.func.jvp(module, (x.detach(),), (x.detach(),))


def test_an_operator_where_no_kernel_runs_says_so() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="x is on the CPU; the kernels run on CUDA"):
        OPERATOR(x, None, None, None, 0.1, 1e-5, None)
    with pytest.raises(RuntimeError, match="x is on the CPU; the kernels run on CUDA"):
        BACKWARD(x, x, None, None, None, 0.1, torch.ones(2, 6), [True] * 5)


@pytest.mark.parametrize(("capability", "nodes"), [((8, 0), 1), ((7, 5), 0)])
@pytest.mark.parametrize("strict", [False, True])
def test_a_gpu_is_asked_while_tracing(
    capability: tuple[int, int], nodes: int, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake CUDA tensor stands for a GPU, whose capability is a constant of the graph."""

    class Op(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fastenc.instance_norm_prelu(x, slope=0.1)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    fastenc.route._lacking.cache_clear()
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, device="cuda")
    program = torch.export.export(Op(), (x,), strict=strict)
    fastenc.route._lacking.cache_clear()
    assert fused_nodes(program.graph) == nodes


@pytest.mark.parametrize("strict", [False, True])
def test_the_onnx_exporter_gets_aten(strict: bool) -> None:
    """Strict mode too: Dynamo by itself answers that no ONNX export is running."""
    with taken("fused") as dtype:
        net, _ = small_twins(dtype, layers=[1, 1])
        program = set_onnx_exporting_flag(torch.export.export)(net, (small_input(dtype=dtype),), strict=strict)
    assert fused_nodes(program.graph) == 0


@pytest.mark.parametrize("direction", bench_host_cost.LIMITS)
def test_the_host_cost_benchmark_takes_the_triton_route(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(bench_host_cost, "_no_launch", lambda *arguments, **options: launched.append(arguments))
    with bench_host_cost.stubbed():
        for call in bench_host_cost.work(direction, "channels_last", torch.float32).values():
            call()
    assert len(launched) == {"forward": 1, "forward and backward": 3}[direction]
