"""Other people's networks, small: what `accelerate` is for. Every entry makes a new network; ask for a seed first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import dynamic_network_architectures.architectures.unet as nnunet
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR
from torch import nn

STAGES: dict[str, Any] = {
    "input_channels": 1, "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": nn.Conv3d, "kernel_sizes": 3,
    "strides": [1, 2, 2], "num_classes": 2, "conv_bias": True, "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
MONAI_UNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8, 8), "strides": (2, 2),
}  # fmt: skip
DYNUNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2], "filters": [4, 8, 8],
}  # fmt: skip
SEGRESNET: dict[str, Any] = {
    "spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 2, "blocks_down": (1, 1), "blocks_up": (1,),
}  # fmt: skip

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": partial(UNet, **MONAI_UNET, num_res_units=2),
    "UNet, dropout": partial(UNet, **MONAI_UNET, num_res_units=0, dropout=0.2),
    "UNet, NAD": partial(UNet, **MONAI_UNET, num_res_units=1, dropout=0.2, adn_ordering="NAD", act="relu"),
    "BasicUNet": partial(BasicUNet, 3, 1, 2, features=(4, 4, 8, 8, 8, 4)),
    "DynUNet": partial(DynUNet, **DYNUNET),
    "DynUNet, residual": partial(DynUNet, **DYNUNET, res_block=True),
    "SegResNet, INSTANCE": partial(SegResNet, **SEGRESNET, norm="INSTANCE", act="PRELU"),
    "SegResNet": partial(SegResNet, **SEGRESNET),
    "UNETR": partial(UNETR, 1, 2, 16, feature_size=4, hidden_size=12, mlp_dim=12, num_heads=2),
    "PlainConvUNet": partial(nnunet.PlainConvUNet, **STAGES, n_conv_per_stage=2, n_conv_per_stage_decoder=2),
    "ResidualEncoderUNet": partial(
        nnunet.ResidualEncoderUNet, **STAGES, n_blocks_per_stage=[1, 2, 2], n_conv_per_stage_decoder=1
    ),
}
