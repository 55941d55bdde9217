"""Instance normalisation and activation as one module, for new networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import route
from .functional import fused, is_supported
from .pair import ACTIVATIONS, INSTANCE_NORMS, TORCH_FORWARDS, slope_of, why_not_plain


class _InstanceNormActNd(nn.Module):
    """Instance normalisation and activation over `_order` spatial axes. See `InstanceNormAct3d`."""

    _order: int

    def __init__(
        self,
        num_features: int,
        activation: nn.Module,
        *,
        eps: float = 1e-5,
        affine: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if type(activation) not in ACTIVATIONS:
            needed = ", ".join(f"nn.{kind.__name__}" for kind in ACTIVATIONS)
            came = activation.__name__ if isinstance(activation, type) else type(activation).__name__
            raise TypeError(f"activation must be a module of one of {needed}, got {came}")
        if isinstance(activation, nn.PReLU) and activation.num_parameters not in (1, num_features):
            raise ValueError(
                f"activation must have 1 slope or num_features={num_features}, got {activation.num_parameters}"
            )
        self.norm = INSTANCE_NORMS[self._order - 1](num_features, eps=eps, affine=affine, device=device, dtype=dtype)
        self.activation = activation

    def why_eager(self, x: object) -> str | None:
        """Why norm and activation run one by one on x. None if they run as one kernel."""
        return _why_eager(x, self.norm, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """activation(norm(x))."""
        norm, activation = self.norm, self.activation  # looked up once, because attribute access of nn.Module is slow
        if not route.use_eager(_why_eager(x, norm, activation)):
            weight, bias, slope = norm.weight, norm.bias, slope_of(activation)
            if is_supported(norm, weight, bias, slope, x):
                return fused(x, weight, bias, slope, norm.eps)
        return activation(norm(x))


def _why_eager(x: object, norm: nn.Module, activation: nn.Module) -> str | None:
    reason = route.reason(x) or route.hook_reason(norm, activation)
    if reason is not None:
        return reason
    if type(norm) not in INSTANCE_NORMS:
        return f"its norm is {norm}, not one of torch's own"
    if type(activation) not in ACTIVATIONS:
        return f"its activation is {activation}, not a plain PReLU, LeakyReLU or ReLU"
    if type(activation).forward not in TORCH_FORWARDS:
        return "the forward of its activation's class was replaced"
    return why_not_plain(norm)


class InstanceNormAct1d(_InstanceNormActNd):
    """`InstanceNormAct3d` over one spatial axis."""

    _order = 1


class InstanceNormAct2d(_InstanceNormActNd):
    """`InstanceNormAct3d` over two spatial axes."""

    _order = 2


class InstanceNormAct3d(_InstanceNormActNd):
    """y = activation(norm(x)) in one kernel: nn.InstanceNorm3d and its activation as one module.

        norm_act = fastenc.InstanceNormAct3d(32, nn.LeakyReLU(0.01), affine=True)

    Args:
        num_features: channels C of x.
        activation: an nn.PReLU (with 1 or C slopes), nn.LeakyReLU or nn.ReLU. Its option inplace has no effect.
        eps, affine, device, dtype: of the norm, as in nn.InstanceNorm3d.

    Its children `norm` and `activation` are the two modules that it replaces, with their parameters. It runs them one
    by one if the kernel does not apply. x (N, C, D, H, W) → y of the same shape.

    Raises:
        TypeError: activation is anything else.
        ValueError: a PReLU with another number of slopes.
    """

    _order = 3
