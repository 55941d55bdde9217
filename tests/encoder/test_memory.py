"""The memory of a network: tensors saved for the backward, with and without recompute, and the peak of inference.

The network is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3) at full size. The formula replaces the launches.
"""

from collections.abc import Callable

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_all_near, gradients, small_input, small_twins, twins
from torch import Tensor, nn
from torch.profiler import profile

import fastenc
from fastenc import EncoderNet3d, explain

SIZE = (31, 32, 30)


@pytest.fixture(scope="module")
def example_1() -> tuple[nn.Module, nn.Module]:
    return twins(64, [3, 3, 3, 3, 3], in_planes=3, out_length=32, dtype=torch.float32)


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, Parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    assert y.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)


def test_tensors_saved_for_the_backward(example_1: tuple[nn.Module, nn.Module]) -> None:
    """Eager saves three tensors per layer, fastenc two, and one with recompute."""
    net, plain = example_1
    x = torch.randn(2, 3, *SIZE)
    eager = saved_bytes(plain, x)
    with launches_replaced():
        for recompute, most in ((False, 0.70), (True, 0.37)):
            net.recompute = recompute
            assert saved_bytes(net, x) <= most * eager


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that torch had allocated at once during call(), above what there was before."""
    with profile(profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_peak_of_an_inference(example_1: tuple[nn.Module, nn.Module]) -> None:
    """The norm overwrites the convolution's output: two tensors are alive at once, not the four or five of eager."""
    net, plain = example_1
    x = torch.randn(8, 3, *SIZE)
    before = x.clone()
    with torch.no_grad(), launches_replaced():
        eager, fused = peak_bytes(lambda: plain(x)), peak_bytes(lambda: net(x))
    one_tensor = 4 * 8 * 64 * 31 * 32 * 30
    assert eager > 3 * one_tensor, "the tracker sees what eager allocates"
    assert fused <= 0.70 * eager
    assert fused < 2.2 * one_tensor
    assert torch.equal(x, before)


# In place: never where anything else can see the tensor


@pytest.mark.parametrize("place", ["netbody.0", "netbody.1", "netbody.1.conv_list.0", "netbody.1.conv_list.0.mconv.2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_what_a_hook_saw_stays_as_it_was(place: str, kind: str) -> None:
    net, _ = small_twins(torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, *args: object) -> None:
        for tensor in args[-1] if isinstance(args[-1], tuple) else (args[-1],):
            assert isinstance(tensor, Tensor)
            seen.append((tensor, tensor.clone()))

    getattr(net.get_submodule(place), kind)(hook)
    with taken("fused"), torch.no_grad():
        net(small_input(dtype=torch.float32))
    assert seen
    for tensor, copied in seen:
        assert torch.equal(tensor, copied)


def test_a_layer_called_alone_leaves_its_input() -> None:
    layer = fastenc.ConvModern3d(2, 3)
    x = torch.randn(2, 2, 4, 5, 3)
    before = x.clone()
    with taken("fused"), torch.no_grad():
        layer(x)
    assert torch.equal(x, before)


def test_a_stem_that_passes_its_input_on() -> None:
    """If the stem is not one of torch's convolutions, its output may be a tensor that other code holds."""
    net, plain = small_twins(torch.float32, in_planes=2)
    for network in (net, plain):
        network.netbody[0] = nn.Identity()
    x = torch.randn(2, 2, 6, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    before = x.clone()
    with taken("fused"), torch.no_grad():
        y = net(x)
    assert torch.equal(x, before)
    assert_all_near([y], [plain(x)])


def test_inference_in_place_gives_the_numbers_of_training() -> None:
    net, _ = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    with taken("fused"):
        expected = net(x).detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(net(x), expected)


# recompute


def results(net: EncoderNet3d, x: Tensor, recompute: bool) -> list[Tensor]:
    net.recompute = recompute
    return gradients(net, x)


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("size", [(6, 5, 7), (4, 4, 4), (40, 30, 30)])
@pytest.mark.parametrize("autocast", [False, True])
def test_recompute_is_bitwise_equal(size: tuple[int, ...], autocast: bool) -> None:
    """Rows that fit on chip, live taps, and rows that are split."""
    net, _ = small_twins(torch.float32, channel=1)
    x = small_input(size, batch=1 if size[0] == 40 else 2, dtype=torch.float32)
    with taken("fused"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept, again = results(net, x, False), results(net, x, True)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


def test_recompute_against_the_plain_network() -> None:
    with taken("fused") as dtype:
        net, plain = small_twins(dtype)
        net.recompute = True
        assert_all_near(gradients(net, small_input(dtype=dtype)), gradients(plain, small_input(dtype=dtype)))


def test_recompute_with_some_of_the_gradients() -> None:
    with taken("fused") as dtype:
        for kept in ("netbody.0.weight", "conv_scale.mconv.0.bias", "mconv.1.weight", "mconv.2.weight", "fc.bias", "x"):
            found = []
            for network in small_twins(dtype):
                network.recompute = True
                for name, parameter in network.named_parameters():
                    parameter.requires_grad_(kept in name)
                x = small_input(dtype=dtype).requires_grad_(kept == "x")
                network(x).square().sum().backward()
                found.append([p.grad for p in (x, *network.parameters()) if p.grad is not None])
            assert len(found[0]) == len(found[1]) > 0
            assert_all_near(*found)


def test_recompute_differentiated_twice_and_vectorised() -> None:
    with taken("fused") as dtype:
        net, plain = small_twins(dtype)
        net.recompute = True
        found = []
        for network in (net, plain.double()):
            x = small_input(dtype=next(network.parameters()).dtype).requires_grad_()
            (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            found.append(list(torch.autograd.grad(slope.square().sum(), [x, *network.parameters()])))
        assert_all_near(*found)
        x = small_input(dtype=dtype)
        expected = torch.autograd.functional.jacobian(plain.to(dtype), x)
        assert_all_near([torch.autograd.functional.jacobian(net, x, vectorize=True)], [expected])


@pytest.mark.parametrize("twice", [False, True])
def test_recompute_of_a_tied_parameter(twice: bool) -> None:
    """One Parameter as the norm's weight and as the slope: two gradients, added by autograd once each."""
    with taken("fused") as dtype:
        found = []
        for network in small_twins(dtype):
            network.recompute = True
            for layer in network.netbody[1].conv_list:
                layer.mconv[1].weight = layer.mconv[0].weight
            x = small_input(dtype=dtype).requires_grad_()
            leaves = [x, *network.parameters()]
            first = torch.autograd.grad(network(x).square().sum(), leaves, create_graph=twice)
            second = torch.autograd.grad(first[0].square().sum(), leaves) if twice else ()
            found.append([gradient.detach() for gradient in (*first, *second)])
        assert_all_near(*found)


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_float32_input_under_autocast(recompute: bool) -> None:
    """The activation is where autocast lowers the precision; 2 ULP of bfloat16 in the largest of each sum."""
    layer = fastenc.ConvModern3d(2, 3)
    layer.recompute = recompute
    x = torch.randn(2, 2, 4, 5, 3)
    results = []
    for route in ("fused", "auto"):
        leaf = x.clone().requires_grad_()
        with taken(route):
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(leaf)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), [leaf, *layer.parameters()])])
    for found, truth in zip(*results, strict=True):
        assert found.dtype == truth.dtype
        torch.testing.assert_close(found, truth, rtol=0, atol=2 * 2**-7 * truth.abs().max().item())


def test_recompute_on_a_built_network_and_in_a_pickle() -> None:
    net = EncoderNet3d(2, [2, 1], recompute=True)
    assert net.recompute
    assert all(layer.recompute for layer in net.modules() if isinstance(layer, fastenc.layers._ConvModernNd))
    net.recompute = False
    assert not net.recompute
    assert not EncoderNet3d(2, [2, 1]).recompute


def test_explain_says_where_recompute_has_no_effect() -> None:
    net, _ = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    assert "recompute" not in str(explain(net, x))
    net.recompute = True
    assert "recompute has no effect on the eager route (3 units)" in str(explain(net, x))
    with taken("fused"):
        assert "recompute" not in str(explain(net, x))
