"""EncoderNet3d, its 1-D and 2-D versions, and the presets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any, Literal, Protocol, overload

from torch import Tensor, nn
from torch.compiler import is_compiling

from . import route
from .convolution import CONVOLUTIONS, channels_last, convolved, is_channels_last
from .layers import _BlockConvStkNd, _ConvModernNd, integer, per_axis

POOLS: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class _EncoderNetNd(nn.Module):
    """The network over `_order` spatial axes. See `EncoderNet3d`."""

    _order: int

    def __init__(
        self,
        channel: int,
        layers: Sequence[int],
        kernel_size: int | Sequence[int] = 3,
        in_planes: int = 1,
        out_length: int | None = 2,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        order = self._order
        channel = integer("channel", channel, 1)
        in_planes = integer("in_planes", in_planes, 1)
        depths = _depths(layers)
        length = 0 if out_length is None else integer("out_length", out_length)
        kernel = tuple(max(1, k) for k in per_axis("kernel_size", kernel_size, order))
        stride = tuple(2 if k > 1 else 1 for k in kernel)
        padding = tuple(k // 2 if k > 1 else 0 for k in kernel)
        stem = tuple(k + 2 if k > 1 else 1 for k in kernel)
        stem_padding = tuple(k // 2 if k > 1 else 0 for k in stem)

        convolution = CONVOLUTIONS[order]
        widths = [channel] + [channel << i for i in range(len(depths))]
        body: list[nn.Module] = [convolution(in_planes, channel, stem, 1, stem_padding, bias=False)]
        body += [
            _BlockConvStkNd(order, widths[i], widths[i + 1], depth, kernel, stride, padding)
            for i, depth in enumerate(depths)
        ]
        body.append(convolution(widths[-1], widths[-1], kernel, 1, padding))
        self.is_out_vector = length > 0
        if self.is_out_vector:
            body.append(POOLS[order]((1,) * order))
        self.netbody = nn.ModuleList(body)
        if self.is_out_vector:
            self.fc = nn.Linear(widths[-1], length)
        self._nlayers = sum(depths) + 2
        self.recompute = recompute

    @property
    def nlayers(self) -> int:
        """The number of convolutional layers along the depth of the network, without the fully connected layer."""
        return self._nlayers

    @property
    def recompute(self) -> bool:
        """Whether each unit saves one tensor for the backward instead of two. It applies to the Triton route."""
        return all(unit.recompute for unit in self.modules() if isinstance(unit, _ConvModernNd))

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for unit in self.modules():
            if isinstance(unit, _ConvModernNd):
                unit.recompute = bool(value)

    def extra_repr(self) -> str:
        return "recompute=True" if self.recompute else ""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_planes, *spatial) → (N, out_length), or the map (N, channels, *smaller) in map mode.

        Only the current x is kept here, so that a unit may overwrite its input.
        """
        why = route.reason(x)
        fused = why is None and x.dim() == self._order + 2
        contiguous = fused and not is_channels_last(x)
        # Whether to call every submodule, one by one.
        called = is_compiling() or (why is not None and route.tracing_reason(x) is not None)
        layers = list(self.netbody)
        pool = layers.pop() if self.is_out_vector else None
        if fused:
            x = channels_last(x)
        fresh = False
        for layer in layers:
            whole = called or type(layer) is not _BlockConvStkNd or route.hook_reason(layer) is not None
            step: Any
            for step in (layer,) if whole else (*layer.conv_list, layer.conv_scale):  # type: ignore[misc]
                unit = type(step).forward is _ConvModernNd.forward
                if called or route.hook_reason(step) or (unit and (not fused or step.why_not_fused())):
                    x, fresh = step(x), False
                elif unit:
                    x, fresh = step.run_fused(x, fresh)
                else:
                    x, fresh = convolved(step, x, fused)
                if fused and not (fresh or called):  # other code ran: x may have another dtype, device or class
                    fused = route.reason(x) is None and x.dim() == self._order + 2
        if pool is None:
            return x.contiguous() if contiguous else x
        if fused and x.is_cuda and type(pool) is POOLS[self._order] and route.hook_reason(pool) is None:
            # The CUDA backward of adaptive pooling adds atomically and refuses deterministic mode.
            return self.fc(x.flatten(2).mean(2))
        return self.fc(pool(x).flatten(1))


def _depths(layers: Any) -> list[int]:
    """layers as a list of at least two positive ints."""
    if isinstance(layers, (str, bytes)) or not (isinstance(layers, Sized) and isinstance(layers, Iterable)):
        raise TypeError(f"layers must be a sequence of ints, got {layers!r} of type {type(layers).__name__}")
    if len(layers) < 2:
        raise ValueError(f"layers must have at least 2 entries, one for each block, got {layers!r}")
    return [integer(f"layers[{i}]", depth, 1) for i, depth in enumerate(layers)]


class EncoderNet1d(_EncoderNetNd):
    """`EncoderNet3d` over one spatial axis."""

    _order = 1


class EncoderNet2d(_EncoderNetNd):
    """`EncoderNet3d` over two spatial axes."""

    _order = 2


class EncoderNet3d(_EncoderNetNd):
    """A 3-D convolutional encoder.

    A stem convolution, then blocks of units norm → PReLU → convolution, each of which halves the map, then a last
    convolution, a mean over the map and a fully connected layer.

    Args:
        channel: channels of the first block. Each further block doubles them.
        layers: number of convolutions of each block, at least two blocks.
        kernel_size: an int or one per axis, for every convolution except the stem, whose kernel is larger by 2. An axis
            with kernel size 1 or less is neither convolved nor strided along.
        in_planes: channels of the input.
        out_length: length of the output vector. None, 0 or a negative number returns the last map instead.
        recompute: save one tensor of each unit for the backward instead of two, and recompute the other there. That
            takes less memory and one more pass. It applies to the Triton route, and can be set on a built network.

    x (N, in_planes, D, H, W) → (N, out_length), or (N, channel·2^(len(layers)−1), d, h, w).

    Attributes: netbody, fc (vector output only), is_out_vector, nlayers.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    _order = 3


ENCODERS = {1: EncoderNet1d, 2: EncoderNet2d, 3: EncoderNet3d}


class Preset(Protocol):
    """The type of the presets."""

    @overload
    def __call__(self, order: Literal[2] = 2, **kwargs: Any) -> EncoderNet2d: ...
    @overload
    def __call__(self, order: Literal[1], **kwargs: Any) -> EncoderNet1d: ...
    @overload
    def __call__(self, order: Literal[3], **kwargs: Any) -> EncoderNet3d: ...


def _preset(name: str, layers: list[int]) -> Preset:
    def preset(order: int = 2, **kwargs: Any) -> Any:
        if order not in ENCODERS:
            raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
        return ENCODERS[order](64, layers, **kwargs)

    preset.__name__ = preset.__qualname__ = name
    preset.__doc__ = (
        f"EncoderNet1d, 2d or 3d, for `order` 1, 2 or 3, with {sum(layers) + 2} convolutional layers.\n\n"
        f"    {name}(order, **kwargs)  is  EncoderNet{{order}}d(64, {layers}, **kwargs)\n\n"
        "Raises:\n    ValueError: another order.\n"
    )
    return preset


encnet12 = _preset("encnet12", [2, 2, 2, 2, 2])
encnet15 = _preset("encnet15", [2, 2, 3, 3, 3])
encnet17 = _preset("encnet17", [3, 3, 3, 3, 3])
encnet22 = _preset("encnet22", [4, 4, 4, 4, 4])
