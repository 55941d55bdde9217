"""accelerate on the networks that MONAI and dynamic-network-architectures offer, one of every kind, tiny.

The formula in place of each launch: what is compared is how norms, activations and autograd are wired. In float64 to
the last digits; in float32, where a CPU's convolutions keep tensors channels-last, for what that layout does. A network
whose norms are fixed to be batch or group norms has them replaced by instance norms first.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed_deeper
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from monai.networks import nets
from monai.networks.nets.dints import TopologyInstance
from support.backends import launches_replaced
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastenc
from fastenc.commands import third_party
from fastenc.convolution import channels_last

AFFINE = ("instance", {"affine": True})
LEAKY = ("leakyrelu", {"inplace": True})
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def normalised(net: nn.Module, order: int = 3) -> nn.Module:
    """net with instance norms in place of its batch and group norms."""
    for parent in list(net.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
                channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
                setattr(parent, name, INSTANCE[order](channels, norm.eps, affine=True))
    return net


class With(nn.Module):
    """A network called with more than its input."""

    def __init__(self, net: nn.Module, more: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.net, self.more = net, more

    def forward(self, x: Tensor) -> Any:
        return self.net(x, **self.more(x))


def timesteps(x: Tensor) -> dict[str, Tensor]:
    return {"timesteps": torch.full((len(x),), 3)}


def dints() -> nn.Module:
    code = [np.ones((1, 4)), np.ones((1, 4))]
    return nets.DiNTS(
        TopologyInstance(code, 0.25, num_blocks=1, num_depths=2, act_name="prelu"), 1, 2, act_name="prelu"
    )


DIFFUSION: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": (4, 8),
    "attention_levels": (False, True), "norm_num_groups": 2, "num_head_channels": 4,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2, "spatial_dims": 2,
}  # fmt: skip
HIGHRES = (
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 2},
    {"name": "conv_1", "n_features": 4, "kernel_size": 1}, {"name": "conv_2", "kernel_size": 1},
)  # fmt: skip
UNET = partial(nets.UNet, 3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1)
RESNET = partial(nets.ResNet, "basic", [1, 1, 1, 1], [4, 4, 8, 8], n_input_channels=1, num_classes=2, conv1_t_size=3)
REGISTRATION = partial(nets.VoxelMorphUNet, 3, 2, 3, (4, 4, 8, 8), (4, 4), norm="instance")
DEEP = {**third_party.STAGES, "deep_supervision": True}
BOTTLENECKS = {"block": BottleneckD, "bottleneck_channels": [2, 4, 8]}
GELU = {"nonlin": nn.GELU, "nonlin_kwargs": {}}
DROPOUT = {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.3, "inplace": True}}
PLANE, VOLUME = (1, 16, 16), (1, 16, 16, 16)

# A new network, and the shape of one sample of its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "UNet, GELU": (partial(UNET, act="gelu", norm=AFFINE), VOLUME),
    "UNet, DNA": (partial(UNET, act=LEAKY, adn_ordering="DNA"), VOLUME),
    "UNet, 1-D": (partial(nets.UNet, 1, 1, 2, (4, 8, 8), (2, 2), num_res_units=2), (1, 16)),
    "BasicUNetPlusPlus": (partial(nets.BasicUNetPlusPlus, 2, 1, 2, (4, 4, 8, 8, 8, 4), True), (1, 32, 32)),
    "DynUNet, supervised": (
        partial(nets.DynUNet, **third_party.DYNUNET, res_block=True, deep_supervision=True),
        VOLUME,
    ),
    "AttentionUnet": (lambda: normalised(nets.AttentionUnet(2, 1, 2, (4, 8), (2, 2)), 2), PLANE),
    "SwinUNETR, checkpoints": (partial(nets.SwinUNETR, 1, 2, **SWIN, use_checkpoint=True), (1, 64, 64)),
    "HighResNet": (partial(nets.HighResNet, 3, 1, 2, AFFINE, layer_params=HIGHRES), VOLUME),
    "SegResNetVAE": (partial(nets.SegResNetVAE, (32, 32), vae_nz=4, spatial_dims=2, norm="instance"), (1, 32, 32)),
    "SegResNetDS": (partial(nets.SegResNetDS, 3, 4, 1, 2, LEAKY, AFFINE, (1, 1, 1), dsdepth=2), VOLUME),
    "SegResNetDS2": (partial(nets.SegResNetDS2, 3, 4, 1, 2, "prelu", AFFINE, (1, 1, 1), dsdepth=2), VOLUME),
    "RegUNet": (lambda: normalised(nets.RegUNet(3, 1, 4, 2)), VOLUME),
    "LocalNet": (lambda: normalised(nets.LocalNet(3, 1, 4, (0, 1))), VOLUME),
    "VoxelMorphUNet": (REGISTRATION, (2, 16, 16, 16)),
    "AutoEncoder": (partial(nets.AutoEncoder, 3, 1, 1, (4, 8), (2, 2), inter_channels=[8], num_res_units=1), VOLUME),
    "VarAutoEncoder": (partial(nets.VarAutoEncoder, 3, VOLUME, 1, 3, (4, 8), (2, 2)), VOLUME),
    "Generator": (partial(nets.Generator, (5,), (4, 4, 4, 4), (8, 4, 1), (2, 2, 1)), (5,)),
    "Critic": (partial(nets.Critic, VOLUME, (4, 8), (2, 2), act="relu"), VOLUME),
    "Regressor": (partial(nets.Regressor, VOLUME, (2,), (4, 8), (2, 2), act=LEAKY), VOLUME),
    "DiNTS": (dints, VOLUME),
    "Quicknat": (partial(nets.Quicknat, 3, 1, 4, kernel_size=3, se_block="CSE"), (1, 32, 32)),
    "DiffusionModelUNet": (lambda: With(normalised(nets.DiffusionModelUNet(**DIFFUSION)), timesteps), (1, 8, 8, 8)),
    "PatchDiscriminator": (partial(nets.PatchDiscriminator, 3, 4, 1, num_layers_d=2, norm="instance"), VOLUME),
    "DenseNet": (partial(nets.DenseNet, 2, 1, 2, 4, 4, (2, 2), norm=AFFINE), (1, 32, 32)),
    "ResNet": (lambda: normalised(RESNET(shortcut_type="A", no_max_pool=True)), VOLUME),
    "EfficientNet": (partial(nets.EfficientNet, ["r1_k3_s11_e2_i32_o8_se0.25"], 3, 1, 2, norm=AFFINE), VOLUME),
    "PlainConvUNet, GELU": (
        partial(PlainConvUNet, **DEEP | GELU, n_conv_per_stage=1, n_conv_per_stage_decoder=1), VOLUME,
    ),
    "PlainConvUNet, dropout": (
        partial(PlainConvUNet, **DEEP, **DROPOUT, n_conv_per_stage=2, n_conv_per_stage_decoder=1), VOLUME,
    ),
    "PlainConvUNet, nonlin_first": (
        partial(PlainConvUNet, **DEEP, nonlin_first=True, n_conv_per_stage=2, n_conv_per_stage_decoder=1), VOLUME,
    ),
    "ResidualEncoderUNet, bottlenecks": (
        partial(ResidualEncoderUNet, **DEEP, **BOTTLENECKS, n_blocks_per_stage=2, n_conv_per_stage_decoder=1), VOLUME,
    ),
    "ResidualUNet": (partial(ResidualUNet, **DEEP, n_blocks_per_stage=2, n_conv_per_stage_decoder=[1, 1]), VOLUME),
    "PatchEmbed_deeper": (partial(PatchEmbed_deeper, 1, 8, 4), VOLUME),
}  # fmt: skip
VIEWS = {"SegResNetVAE", "VarAutoEncoder"}  # networks that call view on a tensor


@contextmanager
def fused() -> Iterator[None]:
    """The Triton route, for float64 too."""
    with launches_replaced(), mock.patch("fastenc.route.DTYPES", frozenset((torch.float32, torch.float64))):
        yield


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(net(x)) if isinstance(leaf, Tensor)]


def everything(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The outputs, and the gradients of the sum of their squares in x and in every parameter."""
    x = x.detach().requires_grad_()
    given = outputs(net, x)
    sum(y.square().sum() for y in given).backward()
    gradients = [x.grad, *(parameter.grad for parameter in net.parameters())]
    net.zero_grad()
    return [*(y.detach() for y in given), *gradients]


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], digits: int) -> None:
    """Of a tensor's norm, or of a thousandth of the largest, for what cancels."""
    largest = max(value.norm() for value in expected if value is not None)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None and b is not None:
            assert type(a) is Tensor
            assert a.dtype == b.dtype
            assert (a - b).norm() <= 10.0**-digits * (b.norm() + 1e-3 * largest), i


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_of_the_untouched_network(name: str) -> None:
    untouched, shape = NETWORKS[name][0](), NETWORKS[name][1]
    for module in untouched.modules():
        if isinstance(module, nn.Dropout):  # what it drops depends on the layout
            module.p = 0.0
    with torch.no_grad():
        for parameter in untouched.parameters():  # some networks begin with convolutions of zeros
            parameter.add_(0.02 * torch.randn_like(parameter))
    net = fastenc.accelerate(copy.deepcopy(untouched))
    assert len(net.accelerated) > 0
    assert list(net.state_dict()) == list(untouched.state_dict())
    x = torch.randn(2, *shape)
    with fused(), warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", RuntimeWarning)
        for training, given in ((True, x), (False, channels_last(x) if x.dim() > 2 else x)):
            found, expected = (outputs(model.train(training), given) for model in (copy.deepcopy(net), untouched))
            assert_same(found, expected, 3)
        found, expected = outputs(net.eval(), x), outputs(untouched, x)
        assert [y.is_contiguous() for y in found] == [y.is_contiguous() for y in expected]
    assert any("calls view" in str(warning.message) for warning in caught) == (name in VIEWS)

    net, untouched, x = net.train().double(), untouched.train().double(), x.double()
    expected = everything(untouched, x)
    for a, b in zip(everything(copy.deepcopy(net), x), expected, strict=True):
        assert a is b is None or torch.equal(a, b), "the eager route"
    with fused():
        for _ in range(2):
            assert_same(everything(net, x), expected, 9)
    fastenc.accelerate(net, undo=True)
    assert [type(module) for module in net.modules()] == [type(module) for module in untouched.modules()]
