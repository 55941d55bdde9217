"""Gradients of convolution weights in an accelerated model have the strides that they have in the untouched one."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.backends import taken
from support.plain import assert_all_near
from support.small_models import assert_like_untouched, twins
from torch import Tensor, nn

NETS = {
    "one input channel": lambda: (nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 2, 1)),
    "one input channel, 2-D": lambda: (nn.Conv2d(1, 4, (3, 1), bias=False), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3)),
    "depthwise": lambda: (nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4), nn.Conv3d(4, 8, 3, groups=4, stride=2)),
    "one tap": lambda: (nn.Conv3d(1, 4, (1, 3, 3)), nn.InstanceNorm3d(4), nn.Conv3d(4, 5, 1, dilation=2)),
    "transposed to one channel": lambda: (
        nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.ConvTranspose3d(4, 1, 2, 2, output_padding=1),
    ),
    "transposed with groups": lambda: (
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=4, dilation=2),
    ),
}  # fmt: skip


def net_and_x(name: str) -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(*NETS[name]())
    return net, torch.randn(2, 1, *(9, 8, 7)[: net[0].weight.dim() - 2])


@pytest.mark.parametrize("name", NETS)
def test_strides_of_gradients(name: str) -> None:
    net, x = net_and_x(name)
    fast, untouched = twins(net)
    with taken("fused"):
        fast(x).square().sum().backward()
        assert_like_untouched(fast, untouched, x)
    untouched(x).square().sum().backward()
    for found, expected in zip(fast.parameters(), untouched.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert found.grad.stride() == expected.grad.stride()


def one_of_the_processes(rank: int, world: int, folder: str) -> None:
    """Its share of the batch through DDP, which warns if a gradient's strides differ from those of its bucket."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name in NETS:
        net, x = net_and_x(name)
        fast, untouched = twins(net)
        with warnings.catch_warnings(), taken("fused"):
            warnings.simplefilter("error")
            parallel = nn.parallel.DistributedDataParallel(fast)
            parallel(x.chunk(world)[rank]).square().sum().backward()
        untouched(x).square().sum().div(world).backward()  # the loss sums, DDP averages
        found, expected = ([m.weight.grad for m in model if m.weight is not None] for model in (fast, untouched))
        assert_all_near(found, expected)
    dist.destroy_process_group()
    Path(folder, f"done {rank}").touch()


def test_ddp_does_not_warn(tmp_path: Path) -> None:
    """In processes of their own: a process group's destructor may wait for the interpreter's lock."""
    torch.multiprocessing.spawn(one_of_the_processes, args=(2, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.glob("done *")} == {"done 0", "done 1"}


def test_double_backward() -> None:
    net, x = net_and_x("one input channel")
    fast, untouched = twins(net)
    results = []
    with taken("fused"):
        for model in fast, untouched:
            (dweight,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
            results.append(torch.autograd.grad(dweight.square().sum(), model[0].weight)[0])
    assert_all_near(results[:1], results[1:])


def test_a_convolution_whose_method_was_replaced() -> None:
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.ReLU())
    fast, untouched = twins(net)
    for layer in (fast[0], untouched[0]):
        own = layer._conv_forward
        layer._conv_forward = lambda x, weight, bias, own=own: own(x, weight, bias).square()
    with taken("fused"):
        assert_like_untouched(fast, untouched, torch.randn(2, 1, 5, 6, 7))
