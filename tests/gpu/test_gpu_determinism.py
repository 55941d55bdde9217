"""Repeats on a GPU are bitwise equal: the kernels always, a training step under deterministic algorithms."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastenc

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
REPEATS = 5


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spatial", [(4, 5, 6), (33, 33, 33), (65, 64, 63)], ids=str)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_operation(layout: str, spatial: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    """Without deterministic mode: no sum of the kernels is atomic."""
    shape = (3, 24, *spatial)
    x, dy, r = (
        torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout]) for _ in range(3)
    )
    leaves = [x, torch.randn(24, device="cuda"), torch.randn(24, device="cuda"), torch.rand(1, device="cuda")]
    leaves += [r] if residual else []
    for leaf in leaves:
        leaf.requires_grad_()

    def numbers() -> list[Tensor]:
        y = fastenc.instance_norm_prelu(*leaves[:4], residual=r if residual else None)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    first = numbers()
    for _ in range(REPEATS):
        assert all(map(torch.equal, first, numbers()))


def trained(net: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Losses and parameters of three steps of a copy of net."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in net.parameters())]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("out_length", [5, None], ids=["vector", "map"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_training(autocast: bool, out_length: int | None, recompute: bool) -> None:
    """Down to maps of 1³, where convolutions are products of live taps. In this mode torch raises at what may vary."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = fastenc.EncoderNet3d(8, [2, 1, 2, 1], in_planes=3, out_length=out_length, recompute=recompute)
        x = torch.randn(2, 3, 15, 16, 14)
    first = trained(net, x, autocast)
    for _ in range(REPEATS):
        assert all(map(torch.equal, first, trained(net, x, autocast)))
