"""The backend that is asked for, the route a call takes, and the reason given for it."""

import copy
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import twins
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import fastenc
from fastenc import backend, explain
from fastenc.route import chosen

LAYERS = ["netbody.1.conv_list.0", "netbody.1.conv_scale", "netbody.2.conv_scale"]


@pytest.fixture(autouse=True)
def _backend_is_put_back() -> Iterator[None]:
    with backend("auto"):
        yield


def small_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 1, 6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)


def route() -> str:
    """The route that the first layer of a small network takes for float32 on the CPU, found from what runs."""
    net, _ = twins(2, [2, 1], dtype=torch.float32)
    with eager_norms() as calls:
        net(small_input())
    return "eager" if calls.call_count else "triton"


def test_backend_sets_at_once() -> None:
    with taken("auto"):
        backend("eager")
        assert route() == "eager"
    with taken("triton"):
        assert route() == "triton"
        for name in ("eager", "triton"):
            backend(name)
            assert route() == name


def test_backend_restores_what_was_before() -> None:
    with taken("triton"):
        with backend("eager"):
            assert route() == "eager"
            with backend("triton"):
                assert route() == "triton"
                with backend("auto"):
                    assert route() == "eager"
                assert route() == "triton"
            assert route() == "eager"
        assert route() == "triton"
        with pytest.raises(KeyError), backend("eager"):
            raise KeyError
        assert route() == "triton"


def test_one_object_applies_on_every_enter() -> None:
    eager = backend("eager")
    for _ in range(3):
        with eager:
            assert chosen() == "eager"
            with backend("triton"), eager:
                assert chosen() == "eager"
            with eager:
                assert chosen() == "eager"
            assert chosen() == "eager"
        assert chosen() == "auto"


def test_a_setting_in_a_block_ends_with_the_block() -> None:
    with backend("triton"):
        backend("eager")
        assert chosen() == "eager"
        with backend("auto"):
            inside = chosen()
        assert (inside, chosen()) == ("auto", "eager")
        kept = backend("auto")
        assert chosen() == "auto"
    assert chosen() == "auto"
    with backend("triton"), kept:
        assert chosen() == "auto"
    assert in_a_thread(chosen) == "auto"


class Network(nn.Module):
    @backend("eager")
    def forward(self, deep: int) -> list[str]:
        """The backend in each of `deep` calls."""
        with backend("triton"):
            below = self(deep - 1) if deep else []
        return [chosen(), *below]


def test_decorator() -> None:
    @backend("eager")
    def function(*names: str, last: str) -> tuple[str, ...]:
        """What it does."""
        return (chosen(), *names, last)

    assert chosen() == "auto"
    assert function("a", last="b") == ("eager", "a", "b")
    assert (function.__name__, function.__doc__) == ("function", "What it does.")
    assert Network()(2) == ["eager"] * 3
    with pytest.raises(ZeroDivisionError):
        backend("eager")(lambda: 1 / 0)()
    assert chosen() == "auto"


def test_decorated_generator_is_in_its_block_while_it_runs() -> None:
    @backend("eager")
    def generator() -> Iterator[str]:
        yield chosen()
        yield chosen()

    found = []
    for inside in generator():
        found += [inside, chosen()]
    assert found == ["eager", "auto", "eager", "auto"]


@pytest.mark.parametrize("kind", ["class", "async function"])
def test_what_cannot_be_decorated(kind: str) -> None:
    async def function() -> None: ...

    with pytest.raises(TypeError, match="backend decorates"):
        backend("eager")(Network if kind == "class" else function)
    assert chosen() == "auto"


def test_type_checkers_know_the_names() -> None:
    assert get_type_hints(backend.__init__)["name"] is fastenc.route.Backend


# Threads


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_a_block_is_its_threads_own() -> None:
    with backend("eager"):
        assert (chosen(), in_a_thread(chosen)) == ("eager", "auto")


def test_a_setting_is_for_all_threads() -> None:
    """Made in a thread without a block: this one is in the fixture's."""
    settings: list[backend] = []
    try:
        assert in_a_thread(lambda: [settings.append(backend("eager")), chosen()][1]) == "eager"
        assert (in_a_thread(chosen), chosen()) == ("eager", "auto")
    finally:
        in_a_thread(settings[0].__enter__)
    assert in_a_thread(chosen) == "auto"


@pytest.mark.parametrize("shared", [False, True])
def test_overlapping_blocks_of_threads(shared: bool) -> None:
    """Entered and left in turn, each thread has its own choice, and the process has what it had."""
    one = backend("eager")
    seen: dict[str, list[str]] = {"first": [], "second": []}
    turns = [threading.Event() for _ in range(4)]

    def first() -> None:
        with one:
            seen["first"].append(chosen())
            turns[0].set()
            turns[1].wait(5)
            seen["first"].append(chosen())
        seen["first"].append(chosen())
        turns[2].set()

    def second() -> None:
        turns[0].wait(5)
        with one if shared else backend("triton"):
            seen["second"].append(chosen())
            turns[1].set()
            turns[2].wait(5)
            seen["second"].append(chosen())
        seen["second"].append(chosen())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["first"] == ["eager", "eager", "auto"]
    assert seen["second"] == [*(["eager"] if shared else ["triton"]) * 2, "auto"]
    assert in_a_thread(chosen) == "auto"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_that_are_made_before_the_others_are_entered(order: tuple[int, int]) -> None:
    def made_and_entered() -> list[str]:
        blocks = [backend("eager"), backend("triton")]
        found = [chosen()]
        for i in order:
            with blocks[i]:
                found.append(chosen())
            found.append(chosen())
        return found

    names = ["eager", "triton"]
    between = "triton" if order[0] == 0 else "eager"  # the other setting is still in force
    assert in_a_thread(made_and_entered) == ["triton", names[order[0]], between, names[order[1]], "auto"]
    assert in_a_thread(chosen) == "auto"


def test_explain_in_two_threads_leaves_the_process_alone() -> None:
    inside, done = threading.Event(), threading.Event()
    others: list[str] = []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            done.wait(5)
            return x

    thread = threading.Thread(target=lambda: explain(Waits(), small_input()))
    thread.start()
    inside.wait(5)
    others.append(in_a_thread(chosen))
    explain(nn.Identity(), small_input())
    done.set()
    thread.join()
    assert [*others, chosen(), in_a_thread(chosen)] == ["auto"] * 3


# A separate process: once torch has made these threads, the process can no longer be forked for a backward.
DESCENDS = """
import os, sys, threading, torch
from fastenc import backend
from fastenc.route import chosen

class Descends(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.seen.add((threading.get_ident(), chosen()))
        if ctx.depth:
            with torch.enable_grad():
                Descends.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return dy, None, None

seen = set()
y = Descends.apply(torch.ones(1, requires_grad=True), 70, seen)
with backend(sys.argv[1]):
    y.backward()
print(len({thread for thread, _ in seen}) > 1, {name for _, name in seen}, flush=True)
os._exit(0)  # torch's threads do not always survive the end of the interpreter
"""


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_backward_threads_have_the_block_that_called_them(name: str) -> None:
    """A backward inside a backward, 70 deep: torch then continues in its own threads, as on a GPU."""
    printed = subprocess.check_output([sys.executable, "-c", DESCENDS, name], text=True)
    assert printed.strip() == f"True {{'{name}'}}"


def test_compiled_code_follows_the_backend() -> None:
    """One graph for each backend, and none for explaining, or for a thread's first block."""
    compiled = CompileCounter()
    torch._dynamo.reset()

    def f(x: Tensor) -> Tensor:
        return x + {"auto": 1, "triton": 2, "eager": 3}[chosen()]

    call = torch.compile(f, backend=compiled, fullgraph=True)
    x = torch.zeros(())
    for _ in range(2):
        assert call(x) == 1
        with backend("eager"):
            assert call(x) == 3
        with backend("triton"):
            assert call(x) == 2
        explain(nn.Identity(), small_input())
    assert compiled.frame_count == 3

    @torch.compile(backend="eager", fullgraph=True)
    def g(x: Tensor) -> Tensor:
        with backend("eager"):
            y = f(x)
        return 10 * y + f(x)

    assert g(x) == 31
    assert chosen() == "auto"


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 3])
def test_unknown_backend(name: Any) -> None:
    with taken("triton"):
        with pytest.raises(ValueError, match="auto") as error:
            backend(name)
        for word in ("triton", "eager", repr(name)):
            assert word in str(error.value)
        assert route() == "triton"  # nothing changed


def test_triton_refuses_float64_and_says_so() -> None:
    net, _ = twins(2, [2, 1])
    x = small_input(torch.float64)
    with taken("triton"):
        with pytest.raises(RuntimeError, match="float64"):
            net(x)
        with pytest.raises(RuntimeError, match="float64"):
            fastenc.instance_norm_prelu(x, None, None, 0.25)
        found = list(explain(net, x))
    assert [row.route for row in found] == ["eager"] * 3
    assert all("float64" in row.reason for row in found)


def test_triton_on_a_cpu_tensor_needs_the_interpreter() -> None:
    net, _ = twins(2, [2, 1], dtype=torch.float32)
    with backend("triton"), pytest.raises(RuntimeError):
        net(small_input())


def test_auto_on_a_cpu_is_eager_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    net, plain = twins(2, [2, 1], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with eager_norms() as calls:
            y = net(small_input())
    assert calls.call_count == 3
    assert torch.equal(y, plain(small_input()))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


class TwoArguments(fastenc.ConvModern3d):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * super().forward(x)


class Calls(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TwoArguments(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, 2.0) + self.layer(x, scale=1.0)


def test_explain_a_layer_with_a_second_argument() -> None:
    assert [row.name for row in explain(Calls(), torch.randn(1, 1, 4, 4, 4))] == ["layer", "layer"]


@pytest.mark.parametrize(("name", "words"), [("auto", "CUDA"), ("eager", "eager")])
def test_explain_and_the_log_give_the_reason(name: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    net, _ = twins(2, [2, 1], dtype=torch.float32)
    with backend(name):
        text, found = str(explain(net, small_input())), list(explain(net, small_input()))
        with caplog.at_level(logging.DEBUG, logger="fastenc"):
            net(small_input())
    assert [row.name for row in found] == LAYERS
    logged_text = "\n".join(r.getMessage() for r in caplog.records if r.name.split(".")[0] == "fastenc")
    for row in found:
        assert row.route == "eager"
        assert words in row.reason
        assert row.name in text
        assert row.reason in text
        assert row.reason in logged_text


def test_explain_on_the_triton_route() -> None:
    net, _ = twins(2, [2, 1], dtype=torch.float32)
    with taken("triton"):
        explained = explain(net, small_input())
        assert [(row.name, row.route, row.reason) for row in explained] == [(name, "triton", None) for name in LAYERS]
        assert all(name in str(explained) for name in LAYERS)


def test_explain_leaves_no_trace() -> None:
    net, _ = twins(2, [2, 1], dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    x = small_input().requires_grad_()
    net.eval()
    explain(net, x)
    assert not net.training
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(x.detach(), small_input())


def test_explain_leaves_the_running_statistics() -> None:
    layer = fastenc.ConvModern3d(2, 2, normalizer="batch")
    before = copy.deepcopy(layer.state_dict())
    explain(layer, torch.randn(2, 2, 4, 4, 4) + 1)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_explain_a_model_that_calls_a_layer_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = fastenc.ConvModern3d(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.unit(x=x)

    (row,) = explain(Model(), torch.randn(2, 2, 4, 4, 4))
    assert (row.name, row.route) == ("unit", "eager")


# A separate process: the environment, and what an import brings along


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("FASTENC_BACKEND", "TRITON_INTERPRET")}
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    variables["PYTHONPATH"] = os.pathsep.join([folder, variables.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=120
    )


NETWORK = """
import torch, fastenc
net, x = fastenc.EncoderNet3d(2, [1, 1]), torch.randn(1, 1, 6, 6, 6)
"""


def test_import_brings_no_triton_no_plots_no_tables_and_no_cuda() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastenc
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "matplotlib", "rich", "numpy", "nibabel", "nilearn", "pytest"}, new
assert not torch.cuda.is_initialized()
net = fastenc.EncoderNet3d(2, [1, 1])
net(torch.randn(1, 1, 6, 6, 6)).sum().backward()
str(fastenc.explain(net, torch.randn(1, 1, 6, 6, 6)))
assert "triton" not in sys.modules
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_without_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None
{NETWORK}
net(x).sum().backward()
str(fastenc.explain(net, x))
fastenc.backend("triton")
try:
    net(x)
except RuntimeError as error:
    assert "triton" in str(error), error
else:
    raise SystemExit("ran without triton")
assert all(row.route == "eager" and "triton" in row.reason for row in fastenc.explain(net, x))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("value", "reason"), [("eager", "eager"), ("auto", "CUDA"), ("", "CUDA")])
def test_environment_chooses_the_backend(value: str, reason: str) -> None:
    code = (
        f"{NETWORK}\nassert all({reason!r} in row.reason for row in fastenc.explain(net, x)), fastenc.explain(net, x)"
    )
    done = run(code, FASTENC_BACKEND=value)
    assert done.returncode == 0, done.stderr


def test_environment_asks_for_triton() -> None:
    code = f"{NETWORK}\nprint([row.route for row in fastenc.explain(net, x)])\nnet(x)\nprint('ran')"
    done = run(code, FASTENC_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["['triton', 'triton']", "ran"]


def test_environment_is_checked() -> None:
    done = run(NETWORK + "net(x)", FASTENC_BACKEND="cudnn")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError")
    for word in ("FASTENC_BACKEND", "cudnn", "auto", "triton", "eager"):
        assert word in last


def test_a_dispatch_mode_sees_aten_operations() -> None:
    """What counts or rewrites operations (a FLOP counter here) gets torch's own; "triton" says why it cannot."""
    net, plain = twins(2, [1, 1], in_planes=1, dtype=torch.float32)
    x = torch.randn(2, 1, 6, 5, 7)
    counts = []
    for model in (net, plain):
        with taken("fused"), eager_norms() as norms, FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
        assert norms.call_count == 2
    assert counts[0] == counts[1]
    with taken("triton"), FlopCounterMode(display=False), pytest.raises(RuntimeError, match="TorchDispatchMode"):
        net(x)
