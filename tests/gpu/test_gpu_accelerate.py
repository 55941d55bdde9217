"""accelerate on a GPU: U-Nets of nnU-Net's build, plain and residual, in plain torch, against float64."""

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastenc
from fastenc.fusion import deferred


class Block(nn.Module):
    """Convolution, norm, activation twice; the modules registered by themselves and in a Sequential."""

    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = (
            nn.Conv3d(in_planes, out_planes, 3, stride, 1),
            nn.InstanceNorm3d(out_planes, affine=True),
        )
        self.nonlin = nn.LeakyReLU(0.01, inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)
        self.conv2, self.norm2 = nn.Conv3d(out_planes, out_planes, 3, 1, 1), nn.InstanceNorm3d(out_planes, affine=True)
        self.dropout, self.nonlin2 = nn.Dropout3d(0.0), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.dropout(self.norm2(self.conv2(self.all_modules(x)))))


class ResidualBlock(Block):
    """The second norm's output and a normalised skip are added before the last activation."""

    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__(in_planes, out_planes, stride)
        self.skip, self.norm_skip = (
            nn.Conv3d(in_planes, out_planes, 1, stride),
            nn.InstanceNorm3d(out_planes, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        r = self.norm_skip(self.skip(x))
        z = self.norm2(self.conv2(self.all_modules(x)))
        z += r
        return self.nonlin2(z)


class UNet(nn.Module):
    """Two levels."""

    def __init__(self, block: type[Block], width: int = 16) -> None:
        super().__init__()
        self.first, self.deep = block(1, width, 1), block(width, 2 * width, 2)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.last, self.head = block(2 * width, width, 1), nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        return self.head(self.last(torch.cat([self.up(self.deep(skip)), skip], 1)))


@pytest.fixture(params=[Block, ResidualBlock])
def twins(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The network accelerated, and an untouched copy."""
    torch.manual_seed(0)
    untouched = UNet(request.param).cuda()
    return fastenc.accelerate(copy.deepcopy(untouched)), untouched


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradient of every parameter."""
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.double().square().mean(), list(net.parameters()))]


def test_as_near_as_torch(twins: tuple[nn.Module, nn.Module]) -> None:
    net, untouched = twins
    x = torch.randn(2, 1, 32, 24, 16, device="cuda")
    assert net.accelerated.count("fused") == 6
    with mock.patch.object(deferred, "fused", wraps=deferred.fused) as fused:
        ours = gradients(net, x)
    assert sum(call.kwargs["residual"] is not None for call in fused.call_args_list) == (
        3 if isinstance(net.first, ResidualBlock) else 0
    )
    assert ours[0].is_contiguous()
    with fastenc.backend("eager"):
        torchs = gradients(untouched, x)
        truth = gradients(untouched.double(), x.double())
    floor = 16 * torch.finfo(torch.float32).eps
    largest = max(value.abs().max().item() for value in truth)
    for value, mine, theirs in zip(truth, ours, torchs, strict=True):
        limit = 2 * (theirs - value).norm() + floor * (value.norm() + largest * value.numel() ** 0.5)
        assert (mine - value).norm() <= limit


def test_tensors_stay_channels_last(twins: tuple[nn.Module, nn.Module]) -> None:
    net, _ = twins
    seen: list[Tensor] = []
    convolutions = [module for module in net.modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))]
    for module in convolutions:
        module.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.autocast("cuda", torch.bfloat16):
        net(torch.randn(2, 1, 32, 24, 16, device="cuda")).float().square().mean().backward()
    assert len(seen) == 2 * len(convolutions)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in seen)
    assert all(parameter.is_contiguous() for parameter in net.parameters())


@pytest.mark.usefixtures("deterministic")
def test_graph_capture(twins: tuple[nn.Module, nn.Module]) -> None:
    net, _ = twins
    x = torch.randn(1, 1, 32, 24, 16, device="cuda")
    with torch.no_grad():
        for _ in range(2):
            expected = net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.usefixtures("deterministic")
def test_data_parallel(twins: tuple[nn.Module, nn.Module]) -> None:
    """Replicas are shallow copies whose parameters are plain tensors."""
    net, untouched = twins
    x = torch.randn(2, 1, 16, 16, 16, device="cuda")
    (replica,) = nn.parallel.replicate(net, [0])
    assert torch.equal(replica(x), net(x))
    with fastenc.backend("eager"):
        torch.testing.assert_close(replica(x), untouched(x), rtol=1e-3, atol=1e-4)
