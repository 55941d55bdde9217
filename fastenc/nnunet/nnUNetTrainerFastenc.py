"""The trainer that nnU-Net finds in this folder when the environment variable nnUNet_extTrainer names it.

nnU-Net imports every module of the folder as a top-level one, so nothing else belongs here.
"""

import functools
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

import fastenc


class nnUNetTrainerFastenc(nnUNetTrainer):
    """nnU-Net's default trainer with an accelerated network, in training and in prediction."""

    @staticmethod
    @functools.wraps(nnUNetTrainer.build_network_architecture)  # nnU-Net tells old and new trainers by the signature
    def build_network_architecture(*args: Any, **kwargs: Any) -> nn.Module:
        return fastenc.accelerate(nnUNetTrainer.build_network_architecture(*args, **kwargs))
