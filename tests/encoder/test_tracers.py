"""Tracers and exporters: what they write down is the plain network, right at every size and free of fastenc.

"auto" is what every user without a GPU meets: the eager route, in float64 here. "fused" is the same as on a GPU, in
float32: there too jit, fx and ONNX trace the eager route. The operators that torch.compile and torch.export find on the
Triton route are in test_library.py.
"""

import io
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from support.backends import either_route, taken
from support.plain import assert_near, assert_same, small_input, small_twins
from torch import fx

pytestmark = pytest.mark.usefixtures("every_weight_is_big_enough")
OTHER_SIZE = (9, 8, 11)
vector_and_map = pytest.mark.parametrize("out_length", [2, None])


@either_route
@vector_and_map
def test_jit_trace_runs_at_other_sizes(out_length: int | None, route: str) -> None:
    """Traced where the deep maps are 2 and 1 elements wide: a kernel cut to that size would be wrong at the other."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype, out_length=out_length)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(net, small_input((4, 4, 4), dtype=dtype))
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
            buffer.seek(0)
            loaded = torch.jit.load(buffer)
        for size, batch in (((4, 4, 4), 2), (OTHER_SIZE, 3), ((5, 6, 7), 1), ((16, 3, 4), 2)):
            x = small_input(size, batch, dtype)
            for network in (traced, loaded):
                assert_same(network, plain, x)


@pytest.mark.parametrize(
    ("route", "dynamic", "out_length"),
    [("auto", False, 2), ("auto", True, None), ("fused", None, 2)],
)
def test_compile(route: str, dynamic: bool | None, out_length: int | None) -> None:
    """Dynamo and AOTAutograd trace forward and backward; a graph break is an error."""
    torch.compiler.reset()
    with taken(route) as dtype:
        net, plain = small_twins(dtype, out_length=out_length)
        compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for x in (small_input(dtype=dtype), small_input(OTHER_SIZE, batch=3, dtype=dtype)):
            assert_same(compiled, plain, x)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    """Forward only: half a minute of C++ already, and the backward is that of test_compile."""
    torch.compiler.reset()
    net, plain = small_twins(layers=[1, 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(small_input()), plain(small_input()))


@pytest.mark.parametrize(("strict", "out_length"), [(False, 2), (True, None)])
def test_export_holds_aten_only(strict: bool, out_length: int | None, tmp_path: Path) -> None:
    """Without a GPU: it runs where fastenc is not installed."""
    axes = {0: torch.export.Dim("batch", min=2), **dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)}
    net, plain = small_twins(out_length=out_length)
    program = torch.export.export(net, (small_input((8, 7, 9)),), dynamic_shapes=(axes,), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls
    for target in calls:
        if isinstance(target, torch._ops.OpOverload):
            assert target.namespace == "aten", target
    torch.export.save(program, tmp_path / "net.pt2")
    samples = [small_input((8, 7, 9)), small_input((12, 13, 11), batch=4)]
    torch.save(samples, tmp_path / "samples.pt")
    code = (
        "import sys, torch; sys.modules['fastenc'] = None; net = torch.export.load('net.pt2').module(); "
        "torch.save([net(x) for x in torch.load('samples.pt', weights_only=True)], 'results.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    for found, x in zip(torch.load(tmp_path / "results.pt", weights_only=True), samples, strict=True):
        assert_near(found, plain(x))


@either_route
@vector_and_map
def test_fx_symbolic_trace(out_length: int | None, route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype, out_length=out_length)
        graph = fx.symbolic_trace(net)
        leaves = {node.target for node in graph.graph.nodes if node.op == "call_module"}
        assert {"netbody.0", "netbody.1.conv_list.0.mconv.0", "netbody.1.conv_list.0.mconv.1"} <= leaves
        for x in (small_input(dtype=dtype), small_input(OTHER_SIZE, dtype=dtype)):
            assert_same(graph, plain, x)


@pytest.mark.parametrize(("route", "out_length"), [("auto", 2), ("fused", None)])
def test_onnx(route: str, out_length: int | None, tmp_path: Path) -> None:
    axes = {0: torch.export.Dim("batch", min=2), **dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)}
    path = tmp_path / "net.onnx"
    with taken(route):
        net, plain = small_twins(torch.float32, out_length=out_length)
        sample = small_input((8, 7, 9), dtype=torch.float32)
        torch.onnx.export(net.eval(), (sample,), path, dynamic_shapes=(axes,), dynamo=True, verbose=False)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (sample, small_input((12, 13, 11), batch=4, dtype=torch.float32)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_near(torch.from_numpy(found), plain(x))
