"""What surrounds the fused operation, on a GPU: layouts, live taps, memory, frozen and graphed inference, compiling."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastenc
from fastenc import convolution
from fastenc.bench.baselines.encoder import plain_encoder
from fastenc.bench.engine.agreement import distance
from fastenc.bench.engine.machine import settings
from fastenc.bench.engine.record import Network
from fastenc.convolution import channels_last, convolve

EXAMPLE_1 = Network(64, (3, 3, 3, 3, 3), 3, 32)
SIZE = (31, 32, 30)
CONVERSIONS = ("nchwtonhwc", "nhwctonchw", "converttensor")  # cuDNN's own kernels between layouts


def example_1() -> fastenc.EncoderNet3d:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return fastenc.EncoderNet3d(EXAMPLE_1.channel, EXAMPLE_1.layers, in_planes=3, out_length=32)


@pytest.fixture(scope="module")
def net() -> fastenc.EncoderNet3d:
    return example_1()


def small_input(N: int = 2) -> Tensor:
    return torch.randn(N, 3, *SIZE, generator=torch.Generator("cuda").manual_seed(N), device="cuda")


def gradients(network: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Output, then the gradients of its sum of squares in every parameter."""
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = network(x)
    found = torch.autograd.grad(y.float().square().sum(), list(network.parameters()))
    return [y.detach(), *found]


def test_copied_across_devices(net: fastenc.EncoderNet3d) -> None:
    """Moved to the CPU, copied and pickled there, and moved back: bitwise the same network."""
    there = pickle.loads(pickle.dumps(copy.deepcopy(net).cpu()))
    with fastenc.backend("auto"):
        assert {row.route for row in fastenc.explain(there, small_input().cpu())} == {"eager"}
    back = there.to("cuda")
    with torch.no_grad():
        assert torch.equal(back(small_input()), net(small_input()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_kernels_that_convert_a_layout(
    autocast: bool,
    recompute: bool,
    net: fastenc.EncoderNet3d,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """A conversion is reported: cuDNN decides which kernel a stem of 3 channels gets."""
    monkeypatch.setattr(net, "recompute", recompute)
    x = small_input()
    with settings(tf32=True, benchmark=False):  # as torch comes: exact float32 has few channels-last kernels in cuDNN
        gradients(net, x, autocast)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            gradients(net, x, autocast)
    names = {event.name for event in profiler.events()}
    assert any("forward_one_pass" in name for name in names), "the trace has the library's own kernels"
    converting = sorted(name for name in names if any(word in name.lower() for word in CONVERSIONS))
    if converting:
        record_property("kernels of cuDNN between layouts:", converting)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_recompute_is_bitwise_equal(autocast: bool, net: fastenc.EncoderNet3d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    x = small_input()
    kept = gradients(net, x, autocast)
    monkeypatch.setattr(net, "recompute", True)
    again = gradients(net, x, autocast)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most above what there was before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory(
    net: fastenc.EncoderNet3d, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Inference in place, two tensors of a layer in training, one with recompute. cuDNN's workspaces are in it."""
    with torch.device("cuda"):
        plain = plain_encoder(EXAMPLE_1)
    x = small_input(8)

    def infer(network: nn.Module) -> None:
        with torch.no_grad():
            network(x)

    def train(network: nn.Module) -> None:
        network(x).square().sum().backward()
        network.zero_grad(set_to_none=True)

    with settings(tf32=True, benchmark=False):  # as torch comes: cuDNN's exact float32 kernels want large workspaces
        record_property("peak memory of inference over eager's:", peak(lambda: infer(net)) / peak(lambda: infer(plain)))
        eager, kept = peak(lambda: train(plain)), peak(lambda: train(net))
        monkeypatch.setattr(net, "recompute", True)
        recomputed = peak(lambda: train(net))
    assert recomputed < kept < eager


@pytest.mark.parametrize(("size", "stride"), [((1, 1, 1), 1), ((2, 2, 2), 2), ((2, 2, 2), 1), ((1, 8, 8), 1)])
@pytest.mark.parametrize("N", [1, 8])
def test_live_taps(size: tuple[int, ...], stride: int, N: int) -> None:
    """In float64 against torch's own: only the order of the sums may differ."""
    torch.manual_seed(1)
    layer = nn.Conv3d(64, 32, 3, stride, 1).double().cuda()
    x = torch.randn(N, 64, *size, dtype=torch.float64, device="cuda")
    results = []
    for call in (lambda x: convolution.convolve(layer, x, True), layer):
        leaf = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        y = call(leaf)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, layer.weight, layer.bias])])
    for found, truth in zip(*results, strict=True):
        assert distance(found, truth) < 1e-12


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem(channels: int, check_near: Callable[[Tensor, Tensor], None]) -> None:
    torch.manual_seed(1)
    layer = nn.Conv3d(channels, 64, 5, padding=2, bias=False).cuda()
    x = torch.randn(2, channels, *SIZE, device="cuda")
    y = convolve(layer, channels_last(x), True)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    expected = nn.functional.conv3d(x.double(), layer.weight.double(), padding=2)
    check_near(y, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_frozen_and_graphed(dtype: torch.dtype | None, check_near: Callable[[Tensor, Tensor], None]) -> None:
    net = example_1().eval()
    x = small_input(1)
    frozen, graph = fastenc.freeze(net, dtype), fastenc.graphed(net, x, dtype)
    with torch.no_grad(), torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        expected = net(x)
    floor = {None: 4e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]  # cuDNN may choose other algorithms
    for call in (frozen, graph):
        assert call(x).dtype == expected.dtype
        assert distance(call(x), expected) < floor
        if dtype is None:
            check_near(call(x), expected)
    other = small_input(2)
    assert distance(graph(other), frozen(other)) < floor
    kept = graph(x)
    graph(torch.zeros_like(x))
    assert distance(kept, expected) < floor
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    graph.refresh()
    frozen.refresh()
    assert distance(graph(x), frozen(x)) < floor
    assert distance(graph(x), expected) > floor


def test_a_borrowed_output_is_overwritten() -> None:
    net, x = example_1().eval(), small_input(1)
    graph = fastenc.graphed(net, x, borrow=True)
    first = graph(x)
    copied = first.clone()
    assert graph(2 * x) is first
    assert not torch.equal(first, copied)


def test_an_error_inside_a_capture_leaves_the_model_usable() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = example_1()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if y.sum().item() else -y

    model, x = Asks().eval(), small_input(1)
    with pytest.raises(RuntimeError, match="could not be captured"):
        fastenc.graphed(model, x)
    with torch.no_grad():
        assert model(x).isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(2, device="cuda").isfinite().all()
    assert fastenc.graphed(model.net, x)(x).isfinite().all()


def test_training_as_graphed_callables() -> None:
    """What README shows for training: the same losses, step by step, as without graphs."""
    losses = []
    for graphs in (False, True):
        net, x = example_1(), small_input(2)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        call = torch.cuda.make_graphed_callables(net, (x.clone(),)) if graphs else net
        seen = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            loss = (call(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    assert distance(losses[1], losses[0]) < 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool, net: fastenc.EncoderNet3d) -> None:
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for N in (2, 3):
        expected = gradients(net, small_input(N), False)
        for found, truth in zip(gradients(compiled, small_input(N), False), expected, strict=True):
            assert distance(found, truth) < 6e-3  # the floor of `agreement` for gradients of single parameters
