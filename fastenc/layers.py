"""The unit of the network, norm → activation → convolution, and the block that stacks units."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import route
from .convolution import CONVOLUTIONS, autocast_dtype, convolve, convolved, is_channels_last, plan_for
from .functional import fused, is_supported
from .pair import INSTANCE_NORMS, TORCH_FORWARDS
from .recompute import RecomputedUnit

BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
UPSAMPLE_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
NORMALIZERS = ("batch", "inst", "pinst", "null")


def integer(name: str, value: Any, least: int | None = None) -> int:
    """value as an int. Raises TypeError if it is not an int and ValueError if it is below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def per_axis(name: str, value: Any, order: int) -> tuple[int, ...]:
    """value as one int per spatial axis. A single int applies to all `order` axes."""
    needed = f"{name} must be an int or a sequence of {order} ints"
    if hasattr(value, "__index__"):
        return (integer(name, value),) * order
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sized) and isinstance(value, Iterable)):
        raise TypeError(f"{needed}, got {value!r} of type {type(value).__name__}")
    if len(value) != order:
        raise ValueError(f"{needed}, got {value!r}")
    return tuple(integer(name, entry) for entry in value)


class _ConvModernNd(nn.Module):
    """A convolution with its normalisation and activation, over `order` spatial axes. See `ConvModern3d`."""

    _order: int
    recompute = False  # on the Triton route, recompute the activated tensor in the backward

    def __init__(
        self,
        order: int,
        in_planes: int,
        out_planes: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        output_size: int | tuple[int, ...] | None = None,
        normalizer: str = "pinst",
        activator: str = "prelu",
        layer_order: str = "new",
        scaler: str = "down",
    ) -> None:
        super().__init__()
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(map(repr, NORMALIZERS))}, got {normalizer!r}")
        steps = tuple(stride) if isinstance(stride, Iterable) else (stride,) * order
        strided = any(step > 1 for step in steps)
        if strided and scaler not in ("down", "up"):
            raise ValueError(f"a stride above 1 needs scaler 'down' or 'up', got {stride=} and {scaler=}")
        resampling: list[nn.Module] = []
        if scaler == "up" and (strided or output_size is not None):
            factor = steps if output_size is None else None
            resampling.append(nn.Upsample(output_size, factor, UPSAMPLE_MODES[order], align_corners=True))
            stride = 1

        plain = normalizer == "null"
        before = layer_order == "new" and not plain
        planes = in_planes if before else out_planes
        convolution = CONVOLUTIONS[order](in_planes, out_planes, kernel_size, stride, padding, bias=plain)
        pair: list[nn.Module] = []
        if plain or layer_order in ("new", "old"):
            if normalizer == "batch":
                pair.append(BATCH_NORMS[order](planes))
            elif not plain:
                pair.append(INSTANCE_NORMS[order - 1](planes, affine=normalizer == "pinst"))
            if activator == "prelu":
                pair.append(nn.PReLU(planes))
            elif activator == "relu":
                pair.append(nn.ReLU())
        convolving = [*resampling, convolution]
        self.mconv = nn.Sequential(*(pair + convolving if before else convolving + pair))

        fusible = normalizer in ("inst", "pinst") and len(pair) == 2
        self._order = order
        self._norm_type = INSTANCE_NORMS[order - 1]
        self._norm_at = (0 if before else len(convolving)) if fusible else None

    def why_eager(self, x: object) -> str | None:
        """Why the unit runs its submodules one by one on x. None if norm and activation run as one kernel."""
        return (None if self._norm_at is None else route.reason(x)) or self.why_not_fused()

    def why_not_fused(self) -> str | None:
        """Why the unit runs its submodules one by one on any input, or None."""
        at = self._norm_at
        if at is None:
            return "the unit has no instance normalisation followed by an activation"
        if type(self.mconv) is not nn.Sequential:
            return f"its submodules are in a {type(self.mconv).__name__}, not a plain nn.Sequential"
        layers = tuple(self.mconv._modules.values())
        if len(layers) < at + 2:
            return "a submodule was removed"
        norm, activation = layers[at : at + 2]
        kept = norm._buffers.get("running_mean")
        if type(norm) is not self._norm_type or norm.track_running_stats or kept is not None:
            return f"its normalisation is {norm}, not a plain {self._norm_type.__name__}"
        if type(activation) is not nn.PReLU and type(activation) is not nn.ReLU:
            return f"its activation is {activation}, not a plain PReLU or ReLU"
        if type(norm).forward not in TORCH_FORWARDS or type(activation).forward not in TORCH_FORWARDS:
            return "the forward of its normalisation's or activation's class was replaced"
        return route.hook_reason(self.mconv, *layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the submodules in order, fusing norm and activation if no hook, tracer or override can observe it.

        The result has x's memory layout.
        """
        unbatched = type(x) is Tensor and x.dim() == self._order + 1
        if unbatched and any(type(module) is nn.PReLU and module.weight.numel() > 1 for module in self.mconv):
            # PReLU would apply its slopes along the first spatial axis.
            raise RuntimeError(f"x must have {self._order + 2} axes, a batch of samples, got shape {tuple(x.shape)}")
        # A unit without a norm is eager under "triton" too.
        if self._norm_at is None or route.use_eager(self.why_eager(x)):
            return self._run_eager(x)
        y, _ = self.run_fused(x, False)
        return y.contiguous() if isinstance(y, Tensor) and not is_channels_last(x) else y

    def run_fused(self, x: Tensor, fresh: bool) -> tuple[Tensor, bool]:
        """Run norm and activation as one operation. `why_not_fused` must have returned None.

        Args:
            x: as for `forward`.
            fresh: x was just made by a convolution and no other code can see it, so it may be overwritten.

        Returns:
            The result of `forward`, channels-last in 2-D and 3-D, and whether it is fresh.
        """
        at: int = self._norm_at  # type: ignore[assignment]
        layers: tuple[Any, ...] = tuple(self.mconv._modules.values())
        for layer in layers[:at]:
            x, fresh = convolved(layer, x, True, layer is layers[at - 1])
        norm, activation = layers[at : at + 2]
        slope = activation.weight if type(activation) is nn.PReLU else 0.0
        weight, bias = norm.weight, norm.bias
        # Other code may have returned another dtype, device or class.
        changed = at > 0 and not fresh and route.use_eager(route.reason(x))
        if changed or not is_supported(norm, weight, bias, slope, x):
            x = activation(norm(x))  # if it is not supported, torch's own error
        elif (
            self.recompute and len(layers) == 3 and torch.is_grad_enabled() and not is_compiling()
            and (prepared := plan_for(layers[2], x, True)) is not None  # None for an activation
        ):  # fmt: skip
            dtype = autocast_dtype(x)
            dtypes = dtype if isinstance(slope, Tensor) else None, dtype
            return RecomputedUnit.apply(x, weight, bias, slope, norm.eps, *prepared, dtypes), True
        else:
            x = fused(x, weight, bias, slope, norm.eps, fresh)
        fresh = False
        for layer in layers[at + 2 :]:
            x, fresh = convolved(layer, x, True)
        return x, fresh

    def _run_eager(self, x: Tensor) -> Tensor:
        """Run the submodules in order. The convolution skips padding-only taps if nothing can observe it."""
        layers = tuple(self.mconv._modules.values())
        plain = not is_compiling() and type(self.mconv) is nn.Sequential
        if not plain or route.hook_reason(self.mconv, *layers) or route.tracing_reason(x):
            return self.mconv(x)
        for layer in layers:
            x = convolve(layer, x, False)
        return x


class _ConvModern(_ConvModernNd):
    """The signature of the three public units. Each sets `_order`, its number of spatial axes."""

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        output_size: int | tuple[int, ...] | None = None,
        normalizer: str = "pinst",
        activator: str = "prelu",
        layer_order: str = "new",
        scaler: str = "down",
    ) -> None:
        super().__init__(
            self._order, in_planes, out_planes, kernel_size, stride, padding,
            output_size, normalizer, activator, layer_order, scaler,
        )  # fmt: skip


class ConvModern1d(_ConvModern):
    """`ConvModern3d` over one spatial axis."""

    _order = 1


class ConvModern2d(_ConvModern):
    """`ConvModern3d` over two spatial axes."""

    _order = 2


class ConvModern3d(_ConvModern):
    """A 3-D convolution with its normalisation and activation: the unit of the network.

    Args:
        in_planes, out_planes: channels of the input and of the output.
        kernel_size, stride, padding: of the convolution, an int or one per axis.
        output_size: the spatial size to which scaler "up" resamples.
        normalizer: "pinst" InstanceNorm with parameters, "inst" without, "batch" BatchNorm, or "null" none. With "null"
            the convolution has a bias, and the activation follows it for any layer_order.
        activator: "prelu" with one slope per channel, "relu", or any other value for none.
        layer_order: "new" norm → activation → convolution, "old" convolution → norm → activation, or any other value
            for the convolution alone.
        scaler: "down" strides the convolution. "up" resamples (trilinear, corners aligned) by stride or to output_size,
            and convolves with stride 1.

    The only child is `mconv`, an nn.Sequential. x (N, in_planes, D, H, W) → (N, out_planes, …).

    Raises:
        ValueError: normalizer is unknown, or scaler is unknown and stride is above 1.
    """

    _order = 3


class _BlockConvStkNd(nn.Module):
    """`layers` units: conv_list at stride 1, whose first unit changes the channels, then conv_scale with the stride."""

    def __init__(
        self,
        order: int,
        in_planes: int,
        out_planes: int,
        layers: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> None:
        super().__init__()
        widths = [in_planes] + [out_planes] * (layers - 1)
        self.conv_list = nn.ModuleList(
            _ConvModernNd(order, widths[i], out_planes, kernel_size, 1, padding) for i in range(layers - 1)
        )
        self.conv_scale = _ConvModernNd(order, widths[layers - 1], out_planes, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """x through all units."""
        for unit in (*self.conv_list, self.conv_scale):
            x = unit(x)
        return x
