"""fastenc: a drop-in EncoderNet3d whose InstanceNorm3d and PReLU run as fused Triton kernels on NVIDIA GPUs."""

from . import folders as _folders, reference  # isort: skip  # folders first: it finds fastenc.kernels  # noqa: F401
from .encoder import EncoderNet1d, EncoderNet2d, EncoderNet3d, encnet12, encnet15, encnet17, encnet22
from .explain import Explanation, UnitRoute, explain
from .frozen import Frozen, freeze
from .functional import instance_norm_prelu
from .fusion import NormOutcome, Summary, accelerate
from .graphed import Graphed, graphed
from .layers import ConvModern1d, ConvModern2d, ConvModern3d
from .norm_act import InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from .route import backend

__version__ = "0.1.0"

__all__ = [
    "ConvModern1d",
    "ConvModern2d",
    "ConvModern3d",
    "EncoderNet1d",
    "EncoderNet2d",
    "EncoderNet3d",
    "Explanation",
    "Frozen",
    "Graphed",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "NormOutcome",
    "Summary",
    "UnitRoute",
    "accelerate",
    "backend",
    "encnet12",
    "encnet15",
    "encnet17",
    "encnet22",
    "explain",
    "freeze",
    "graphed",
    "instance_norm_prelu",
    "reference",
]
