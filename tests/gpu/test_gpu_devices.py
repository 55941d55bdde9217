"""Several GPUs and streams: launches go where the tensors are, on the stream that the caller is on there."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastenc

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
recomputing = pytest.mark.parametrize("recompute", [False, True])
SIZE = (2, 1, 20, 18, 16)


def network(recompute: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return fastenc.EncoderNet3d(8, [2, 1], in_planes=1, recompute=recompute).cuda()


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of the sum of its squares."""
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])]


@two_gpus
@recomputing
def test_network_on_another_gpu_than_the_current_one(recompute: bool, deterministic: None) -> None:
    """The backward runs in a thread that autograd keeps for that GPU. Both GPUs are taken to be of one kind."""
    net, x = network(recompute), torch.randn(SIZE, device="cuda:0")
    there = copy.deepcopy(net).to("cuda:1")
    expected, found = results(net, x), results(there, x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device == torch.device("cuda:1")
        assert torch.equal(mine.to("cuda:0"), theirs)


@two_gpus
def test_a_stream_of_another_gpu() -> None:
    """One that is still busy making x, while another GPU is the current one of this thread."""
    x = torch.randn(2, 8, 20, 18, 16)
    expected = fastenc.instance_norm_prelu(x.to("cuda:1"))
    made = torch.zeros_like(x, device="cuda:1")
    torch.cuda.synchronize("cuda:1")
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream), torch.cuda.device(1):
        torch.cuda._sleep(200_000_000)
        made.copy_(x)
        with torch.cuda.device(0):
            y = fastenc.instance_norm_prelu(made)
            assert torch.cuda.current_device() == 0
    stream.synchronize()
    assert torch.equal(y, expected)


@recomputing
def test_training_on_a_side_stream(
    recompute: bool, deterministic: None, on_a_side_stream: Callable[..., list[Tensor]]
) -> None:
    """Forward and backward on a stream that is still busy making x."""
    net, x = network(recompute), torch.randn(SIZE, device="cuda")
    expected = results(net, x)
    found = on_a_side_stream(lambda made: results(net, made), x)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["mconv.0.weight", "mconv.0.bias", "mconv.1.weight", "mconv.2.weight"])
@recomputing
def test_a_parameter_elsewhere_gives_the_error_that_torch_gives(name: str, recompute: bool) -> None:
    x = torch.randn(2, 8, 6, 6, 6, device="cuda")
    layer = fastenc.ConvModern3d(8, 8).cuda()
    layer.recompute = recompute
    owner, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(owner), attribute, nn.Parameter(layer.get_parameter(name).cpu()))
    with pytest.raises(RuntimeError) as expected:
        nn.Sequential(*layer.mconv)(x)
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(expected.value)


def test_an_error_of_earlier_work_is_raised_as_it_is() -> None:
    """An illegal access breaks the context permanently, so it happens in a separate process."""
    code = """
import warnings, torch, fastenc
from fastenc import route
warnings.simplefilter("error")
x = torch.randn(2, 8, 6, 6, 6, device="cuda")
fastenc.instance_norm_prelu(x)
torch.cuda.synchronize()
index = torch.full((1,), 1 << 40, device="cuda")
torch.empty(1, device="cuda").index_put_((index,), x[0, 0, 0, 0, :1])  # a device-side assertion
torch.cuda._sleep(1000)
try:
    for _ in range(1000):
        y = fastenc.instance_norm_prelu(x)
except RuntimeError as error:
    assert not route._faults, route._faults
    print("raised:", type(error).__name__)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("raised:"), done.stderr
