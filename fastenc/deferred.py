"""A normalised volume that is not computed before it is known what becomes of it.

An accelerated norm hands out a `Deferred` in place of z = norm(x). The activation it was meant for turns it into
PReLU(z) by one kernel; for anything else it is z, computed at the first look: to PyTorch it is an ordinary tensor of
the autograd graph, with shape, strides, dtype and gradient. So nothing depends on what the activation turns out to be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastenc.kernels.layout import layout

from . import reference
from .functional import fused


class Deferred(Tensor):
    """z = norm(x), or dropout(z), to be computed."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    versions: tuple[int, ...]
    grad_mode: bool
    dropout: Any
    noise: list[Tensor]
    value: Tensor | None
    overwritten: bool

    # Everything goes through the dispatcher, below autograd: what is computed there needs no history of its own.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
        z = Tensor._make_wrapper_subclass(cls, x.size(), strides=x.stride(), dtype=x.dtype, device=x.device)
        z.x, z.weight, z.bias, z.eps = x, weight, bias, eps
        z.versions = _versions(x, weight, bias)
        z.grad_mode = torch.is_grad_enabled()
        z.dropout = z.value = None
        z.overwritten = False
        return z

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """func of the values."""
        return func(*tree_map_only(Deferred, _value, args), **tree_map_only(Deferred, _value, kwargs or {}))

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return self.plain().__repr__(**options)

    def activated(self, slope: Tensor | float, inplace: bool) -> Tensor | None:
        """PReLU(z) in one kernel; None where z was looked at already, or where slope does not fit it."""
        if self.value is not None or self.grad_mode != torch.is_grad_enabled():
            return None
        if isinstance(slope, Tensor) and not (fits(slope, self.x, 1) or fits(slope, self.x, self.x.size(1))):
            return None
        self._check_unchanged()
        y = fused(self.x, self.weight, self.bias, slope, self.eps)
        if self.dropout is not None:
            y = self.dropout.drop(y)  # positive factors, and a slope on either side of them: the same
        if inplace:
            self.value, self.overwritten = y, True
        return y

    def dropped(self, dropout: nn.Module) -> Deferred | None:
        """dropout(z), to be computed; None where z was looked at already."""
        if self.value is not None or self.dropout is not None or self.grad_mode != torch.is_grad_enabled():
            return None
        return _Drop.apply(self, dropout) if self.requires_grad else _dropped(self, dropout, [])

    def plain(self) -> Tensor:
        """z as a plain tensor, with its history."""
        if self.value is not None or self.dropout is not None:
            return self.clone()
        self._check_unchanged()
        with torch.set_grad_enabled(self.grad_mode):
            return fused(self.x, self.weight, self.bias, 1.0, self.eps)

    def _check_unchanged(self) -> None:
        if self.versions != _versions(self.x, self.weight, self.bias):
            raise RuntimeError(
                "the input, weight or bias of an accelerated norm was changed in place before its output was used; "
                "fastenc.accelerate(model, undo=True) gives the original model back"
            )


def deferred(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
    """norm(x), to be computed; x lies densely in one of the two layouts, see `dense`."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _Defer.apply(x, weight, bias, eps)
    return Deferred(x, weight, bias, eps)


def dense(x: Tensor) -> bool:
    """Whether norm(x) will have x's strides."""
    return layout(x.shape, x.stride()) is not None


def fits(parameter: Tensor, x: Tensor, length: int) -> bool:
    """Whether the kernels take parameter, of this length, for x."""
    return (
        parameter.shape == (length,)
        and (parameter.dtype == torch.float32 or parameter.dtype == x.dtype)
        and parameter.device == x.device
    )


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """How often each was changed in place; inference mode does not count."""
    return tuple(0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def _value(z: Deferred) -> Tensor:
    """z without history, computed at the first call."""
    if z.value is None:
        z._check_unchanged()
        with torch.no_grad():
            z.value = fused(z.x, z.weight, z.bias, 1.0, z.eps)
            if z.dropout is not None:
                z.noise.append(z.dropout.drop(torch.ones_like(z.value)))
                z.value = z.value * z.noise[0]
    elif z.overwritten and z.requires_grad:
        raise RuntimeError(
            "the output of an accelerated norm was used after its in-place activation had replaced it; use the "
            "activation's output, or fastenc.accelerate(model, undo=True)"
        )
    return z.value


def _dropped(z: Deferred, dropout: nn.Module, noise: list[Tensor]) -> Deferred:
    copy = Deferred(z.x, z.weight, z.bias, z.eps)
    copy.versions, copy.dropout, copy.noise = z.versions, dropout, noise
    return copy


class _Defer(torch.autograd.Function):
    """Gives a Deferred its place in the graph. The gradient is for whoever looked at z; the activation needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
        ctx.terms = x, weight, bias, 1.0, eps  # not save_for_backward: hooks on saved tensors may move them about
        z = Deferred(x, weight, bias, eps)
        z.grad_mode = True
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias, _ = reference.backward(gradients[0], *ctx.terms)
        return dx, dweight, dbias, None


class _Drop(torch.autograd.Function):
    """Gives a Deferred with dropout its place in the graph."""

    @staticmethod
    def forward(ctx: Any, z: Deferred, dropout: nn.Module) -> Deferred:
        ctx.noise = []
        copy = _dropped(z, dropout, ctx.noise)
        copy.grad_mode = True
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.noise[0], None
