"""Everything PyTorch lets one do with the reference network, done with EncoderNet3d and compared with its plain twin.

"auto" is what every user without a GPU meets: the eager route, in float64 here. "fused" is the same as on a GPU, its
kernels interpreted, in float32: fused where that is possible, eager where PyTorch is tracing or transforming.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from support.backends import either_route, taken
from support.plain import (
    SMALL,
    PlainEncoder,
    assert_all_near,
    assert_near,
    assert_same,
    gradients,
    small_input,
    small_twins,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel.replicate import replicate
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastenc import EncoderNet3d

pytestmark = pytest.mark.usefixtures("every_weight_is_big_enough")


# Copies and files


@either_route
def test_pickle(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        net(small_input(dtype=dtype))
        assert_same(pickle.loads(pickle.dumps(net)), plain, small_input(dtype=dtype))


@either_route
def test_deepcopy_shares_nothing(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        net(small_input(dtype=dtype))  # a call first, so that anything kept from it would be copied too
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert_same(twin, plain, small_input(dtype=dtype))


def test_save_and_load(tmp_path: Path) -> None:
    net, plain = small_twins()
    net(small_input())
    torch.save(net, tmp_path / "net.pt")
    assert_same(torch.load(tmp_path / "net.pt", weights_only=False), plain, small_input())
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other = EncoderNet3d(**SMALL).double()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(other, plain, small_input())


@pytest.mark.parametrize("out_length", [2, None])
def test_checkpoints_go_both_ways(out_length: int | None) -> None:
    """Strict loading, also by assignment and from a meta network: all keys are there and no others."""
    net, plain = small_twins(out_length=out_length)
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            other = PlainEncoder(**{**SMALL, "out_length": out_length}).double()
            another = EncoderNet3d(**{**SMALL, "out_length": out_length}).double()
        other.load_state_dict(net.state_dict(), assign=assign)
        another.load_state_dict(plain.state_dict(), assign=assign)
        assert_same(other, net, small_input())
        assert_same(another, plain, small_input())


@either_route
def test_safetensors(route: str, tmp_path: Path) -> None:
    """After a step of training: it refuses parameters that are not contiguous."""
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        net(small_input(dtype=dtype)).sum().backward()
        safetensors.torch.save_model(net, tmp_path / "net.safetensors")
        assert safetensors.torch.load_file(tmp_path / "net.safetensors").keys() == plain.state_dict().keys()
        other = EncoderNet3d(**SMALL).to(dtype)
        assert safetensors.torch.load_model(other, tmp_path / "net.safetensors") == (set(), [])
        assert_same(other, plain, small_input(dtype=dtype))


@either_route
def test_deepcopied_between_forward_and_backward(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input(dtype=dtype)
        y = net(x)
        twin = copy.deepcopy(net)
        y.square().sum().backward()
        expected = gradients(plain, x)
        assert_all_near([p.grad for p in net.parameters()], expected[2:])
        assert_all_near(gradients(twin, x), expected)
        assert all(p.grad is None for p in twin.parameters())


def test_moved_to_another_dtype_and_device() -> None:
    """There and back, through half and an empty meta network filled by a contiguous checkpoint."""
    net, plain = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    state = copy.deepcopy(net.state_dict())
    half = net.to(memory_format=torch.channels_last_3d).half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), plain(x), rtol=0, atol=2**-7 * plain(x).abs().max().item())
    net.to("meta")
    assert net(x.half().to("meta")).shape == half.shape
    net.to_empty(device="cpu").float().load_state_dict(state)
    assert_same(net, plain, x)


# Autograd


@either_route
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool, route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input(dtype=dtype).requires_grad_()
        y = checkpoint(net, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad for p in net.parameters())]
        expected = gradients(plain, x.detach())
        assert_all_near(found, expected)


@either_route
def test_gradient_penalty(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        found = []
        for network in (net, plain.double()):
            x = small_input(dtype=next(network.parameters()).dtype).requires_grad_()
            (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            penalty = (slope.square().sum() - 1).square()
            found.append([penalty.detach(), *torch.autograd.grad(penalty, [x, *network.parameters()])])
        assert_all_near(*found)


@either_route
def test_saved_tensors_may_travel(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        with torch.autograd.graph.save_on_cpu():
            found = gradients(net, small_input(dtype=dtype))
        assert_all_near(found, gradients(plain, small_input(dtype=dtype)))


@either_route
def test_backward_twice(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        loss = net(small_input(dtype=dtype)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found = [parameter.grad / 2 for parameter in net.parameters()]
        assert_all_near(found, gradients(plain, small_input(dtype=dtype))[2:])


@either_route
def test_flops_are_counted(route: str) -> None:
    with taken(route) as dtype:
        counts = []
        for network in small_twins(dtype):
            with FlopCounterMode(display=False) as counter:
                network(small_input(dtype=dtype)).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@either_route
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: type, route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        x = small_input(dtype=dtype)
        with mode():
            found = [net(x), net.eval()(x)]
        expected = plain(x)
        for y in found:
            assert not y.requires_grad
            assert_near(y, expected)


@either_route
def test_frozen_parameters(route: str) -> None:
    """Only what requires a gradient gets one, whichever that is."""
    with taken(route) as dtype:
        for kept in ("netbody.0.weight", "conv_scale.mconv.0.bias", "mconv.1.weight", "mconv.2.weight", "fc.bias", "x"):
            net, plain = small_twins(dtype)
            found = []
            for network in (net, plain):
                for name, parameter in network.named_parameters():
                    parameter.requires_grad_(kept in name)
                x = small_input(dtype=dtype).requires_grad_(kept == "x")
                network(x).square().sum().backward()
                found.append([x.grad, *(p.grad for p in network.parameters())])
            for a, b in zip(*found, strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    assert_near(a, b)


# Training


@either_route
def test_parameters_to_vector(route: str) -> None:
    with taken(route) as dtype:
        net, plain = small_twins(dtype)
        net(small_input(dtype=dtype)).sum().backward()
        vector = nn.utils.parameters_to_vector(net.parameters())
        assert torch.equal(vector, nn.utils.parameters_to_vector(plain.parameters()))
        nn.utils.parameters_to_vector(p.grad for p in net.parameters())  # a view of each: gradients are contiguous too
        nn.utils.vector_to_parameters(2 * vector, net.parameters())
        nn.utils.vector_to_parameters(2 * vector, plain.parameters())
        assert_same(net, plain, small_input(dtype=dtype))


@either_route
@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SGD, torch.optim.AdamW])
def test_optimizers(optimizer: type[torch.optim.Optimizer], route: str) -> None:
    with taken(route) as dtype:
        losses = [loss_of_three_steps(network, optimizer, small_input(dtype=dtype)) for network in small_twins(dtype)]
    assert losses[0][2] < losses[0][0]
    if dtype == torch.float64:
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)
    else:  # its line searches make float32's rounding grow: LBFGS is held to its first step's loss there
        count = 1 if optimizer is torch.optim.LBFGS else 3
        torch.testing.assert_close(losses[0][:count], losses[1][:count], rtol=1e-4, atol=0)


def loss_of_three_steps(network: nn.Module, optimizer: type[torch.optim.Optimizer], x: Tensor) -> list[float]:
    steps = optimizer(network.parameters(), lr=0.01)

    def closure() -> Tensor:
        steps.zero_grad()
        loss = (network(x) - 1).square().mean()
        loss.backward()
        return loss

    return [steps.step(closure).item() for _ in range(3)]


@either_route
def test_gradient_scaler(route: str) -> None:
    """float16 with a scaled loss: the steps of the plain network, and none where a gradient is infinite."""
    with taken(route):
        found = []
        for network in small_twins(torch.float32):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            for scale in (1.0, float("inf"), 1.0):
                with torch.autocast("cpu", torch.float16):
                    loss = (network(small_input(dtype=torch.float32)).float() - 1).square().mean()
                scaler.scale(loss * scale).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert scaler.get_scale() == 128.0
            found.append([p.detach() for p in network.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2**-10 * max(1.0, b.abs().max().item()))


def sgd_step(network: nn.Module, x: Tensor) -> None:
    network(x).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    network.zero_grad()


@either_route
def test_average_of_the_weights(route: str) -> None:
    """An exponential moving average is updated during training and evaluated between its steps."""
    with taken(route) as dtype:
        averages = []
        for network in small_twins(dtype):
            average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.8))
            for _ in range(3):
                sgd_step(network, small_input(dtype=dtype))
                average.update_parameters(network)
                average(small_input(dtype=dtype))
            averages.append(average)
        assert_same(*averages, small_input(dtype=dtype))


@either_route
def test_compiled_as_a_module(route: str) -> None:
    torch.compiler.reset()
    with taken(route) as dtype:
        net, plain = small_twins(dtype, layers=[1, 1])
        keys = net.state_dict().keys()
        net.compile(backend="aot_eager", fullgraph=True)
        assert_same(net, plain, small_input(dtype=dtype))
        assert net.state_dict().keys() == keys
        assert_same(copy.deepcopy(net), plain, small_input(dtype=dtype))


# What torch.nn.utils puts on a layer, put on every convolution and on fc


def with_old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def with_old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.3)


def pruned_for_good(layer: nn.Module) -> None:
    pruned(layer)
    prune.remove(layer, "weight")


@either_route
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm, parametrizations.spectral_norm, with_old_weight_norm, with_old_spectral_norm,
        pruned, pruned_for_good,
    ],
)  # fmt: skip
def test_convolutions_changed(change: Callable[[nn.Module], object], route: str) -> None:
    """Trained two steps, for what they do in a forward of training; then in eval mode."""
    with taken(route) as dtype:
        networks = []
        for network in small_twins(dtype):
            torch.manual_seed(0)  # of the vectors that a spectral norm starts from
            for layer in [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.Linear))]:
                change(layer)
            for _ in range(2):
                sgd_step(network, small_input(dtype=dtype))
            networks.append(network)
        assert_same(*networks, small_input(dtype=dtype))
        assert_same(*(network.eval() for network in networks), small_input(dtype=dtype))


# Several devices


def test_data_parallel() -> None:
    """Over all GPUs; without one it passes the call on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, plain = small_twins()
    assert_same(nn.DataParallel(net.to(device)), plain.to(device), small_input().to(device))


@either_route
def test_replicas(route: str) -> None:
    """What nn.DataParallel does for two devices, both of them the CPU: parameters become tensors with a history."""

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        return [[1 * tensor for tensor in tensors] for _ in devices]

    with taken(route) as dtype, mock.patch("torch.nn.parallel.replicate._broadcast_coalesced_reshape", broadcast):
        net, plain = small_twins(dtype)
        x = small_input(batch=4, dtype=dtype)
        y = torch.cat([replica(part) for replica, part in zip(replicate(net, [0, 1]), x.chunk(2), strict=True)])
        found = [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]
        expected = gradients(plain, x)
        assert_all_near(found, [expected[0], *expected[2:]])


def one_of_the_processes(rank: int, world: int, folder: str) -> None:
    """Its share of the batch through DDP, then through FSDP2, on both routes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for route in ("auto", "fused"):
        with taken(route) as dtype:
            whole = small_input(batch=2 * world, dtype=dtype)
            share = whole.chunk(world)[rank]
            _, plain = small_twins(dtype)
            expected = [gradient / world for gradient in gradients(plain, whole)[2:]]  # the loss sums, DDP averages

            net, _ = small_twins(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a bucket whose strides a gradient does not have is a warning
                parallel = nn.parallel.DistributedDataParallel(net)
                parallel(share).square().sum().backward()
            assert_all_near([p.grad for p in net.parameters()], expected)

            net, _ = small_twins(dtype)
            for block in net.netbody[1:3]:
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            net(share).square().sum().backward()
            assert_all_near([p.grad.full_tensor() for p in net.parameters()], expected)
            optimizer.step()
            stepped = [p - 0.1 * gradient for p, gradient in zip(plain.parameters(), expected, strict=True)]
            assert_all_near([p.full_tensor() for p in net.parameters()], stepped)
    dist.destroy_process_group()
    Path(folder, f"done {rank}").touch()


def test_distributed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_the_processes, args=(2, str(tmp_path)), nprocs=2)
    assert (tmp_path / "done 0").exists()
    assert (tmp_path / "done 1").exists()
