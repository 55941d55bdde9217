"""The reference network in plain torch.nn, written from its documented structure alone: what the tests compare with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastenc

ENCODER = {1: fastenc.EncoderNet1d, 2: fastenc.EncoderNet2d, 3: fastenc.EncoderNet3d}
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class PlainUnit(nn.Module):
    """InstanceNorm, PReLU, convolution."""

    def __init__(self, order: int, in_planes: int, out_planes: int, kernel: list[int], stride: list[int]) -> None:
        super().__init__()
        padding = [k // 2 if k > 1 else 0 for k in kernel]
        self.mconv = nn.Sequential(
            NORM[order](in_planes, affine=True),
            nn.PReLU(in_planes),
            CONVOLUTION[order](in_planes, out_planes, kernel, stride, padding, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mconv(x)


class PlainBlock(nn.Module):
    """A stack of layers; the first one widens and the last one strides."""

    def __init__(self, order: int, in_planes: int, out_planes: int, depth: int, kernel: list[int]) -> None:
        super().__init__()
        widths = [in_planes] + [out_planes] * depth
        ones = [1] * order
        self.conv_list = nn.ModuleList(
            PlainUnit(order, widths[i], widths[i + 1], kernel, ones) for i in range(depth - 1)
        )
        self.conv_scale = PlainUnit(order, widths[-2], widths[-1], kernel, [2 if k > 1 else 1 for k in kernel])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_list:
            x = layer(x)
        return self.conv_scale(x)


class PlainEncoder(nn.Module):
    """EncoderNet1d, 2d or 3d for order 1, 2 or 3."""

    def __init__(
        self, channel: int, layers: Sequence[int], kernel_size: Any = 3, in_planes: int = 1, out_length: Any = 2, *,
        order: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        asked = [kernel_size] * order if isinstance(kernel_size, int) else list(kernel_size)
        kernel = [k if k > 1 else 1 for k in asked]
        stem = [k + 2 if k > 1 else 1 for k in kernel]
        widths = [channel] + [channel * 2**i for i in range(len(layers))]
        self.is_out_vector = out_length is not None and out_length > 0
        self.nlayers = sum(layers) + 2
        self.netbody = nn.ModuleList()
        self.netbody.append(
            CONVOLUTION[order](in_planes, channel, stem, padding=[k // 2 if k > 1 else 0 for k in stem], bias=False)
        )
        for i, depth in enumerate(layers):
            self.netbody.append(PlainBlock(order, widths[i], widths[i + 1], depth, kernel))
        self.netbody.append(
            CONVOLUTION[order](widths[-1], widths[-1], kernel, padding=[k // 2 if k > 1 else 0 for k in kernel])
        )
        if out_length is not None and out_length > 0:
            self.netbody.append(POOL[order](1))
            self.fc = nn.Linear(widths[-1], out_length)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.netbody:
            x = stage(x)
        return self.fc(torch.flatten(x, 1)) if self.is_out_vector else x


def twins(*args: Any, order: int = 3, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """fastenc's network and its plain twin with the same parameters, all of them away from their initial constants."""
    torch.manual_seed(0)
    plain = PlainEncoder(*args, order=order, **kwargs).to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net = ENCODER[order](*args, **kwargs).to(dtype)
    net.load_state_dict(plain.state_dict())
    return net, plain


def assert_near(found: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    """float64 within 1e-10 of the tensor's largest, float32 within 1e-4, or within `floor` where that is more.

    How near float32 comes is measured in test_golden.py, and is never farther than 1.4e-5 there. Where this function is
    used, what matters is which value comes. NaN equals NaN, and infinity itself.
    """
    finite = expected.detach()[expected.isfinite()].abs()
    fraction = 1e-10 if found.dtype == torch.float64 else 1e-4
    atol = max(floor, fraction * finite.max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=atol, equal_nan=True)


def assert_all_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each near its own; or within the rounding of a sum of 1,000 terms as large as the largest of all, √1000 ULP.

    A gradient may be zero but for rounding: that of a bias before a norm.
    """
    floor = 32 * torch.finfo(found[0].dtype).eps * max(tensor.abs().max().item() for tensor in expected)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, floor)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, then the gradients of the sum of its squares in the input and in every parameter."""
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), [x, *net.parameters()])]


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    assert_all_near(gradients(found, x), gradients(expected, x))


SMALL: dict[str, Any] = {"channel": 2, "layers": [2, 1], "kernel_size": 3, "in_planes": 1, "out_length": 2}


def small_twins(dtype: torch.dtype = torch.float64, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    return twins(dtype=dtype, **{**SMALL, **arguments})


def small_input(size: tuple[int, ...] = (6, 5, 7), batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input of the small twins, the same at each call."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, *size, generator=generator, dtype=torch.float64).to(dtype)
