"""Norm and activation as one operator while torch.compile or torch.export writes an accelerated network down.

What a norm hands out to wait for its activation (`deferred.py`) is nothing that they could trace. In an nn.Sequential
there is no need: what passes between two of its modules is seen by no one else. Norms that meet their activation
anywhere else are written down as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import route
from .deferred import fits
from .functional import fused
from .swapped import DROPOUTS, Activation, Dropout, PairedNorm, Root, Scope, slope_of, takes


class Chain(Scope):
    """An nn.Sequential in which a norm meets its activation."""

    def forward(self: Any, input: Tensor) -> Any:  # named as nn.Sequential names it
        if not torch.compiler.is_compiling():
            return super().forward(input)  # type: ignore[misc]
        x, at, layers = input, 0, tuple(self)
        while at < len(layers):
            activation_at = _activation_of(layers, at, x)
            if activation_at is None:
                x = layers[at](x)
                at += 1
                continue
            norm = layers[at]
            x = fused(x, norm.weight, norm.bias, slope_of(layers[activation_at]), norm.eps)
            for dropout in layers[at + 1 : activation_at]:
                x = dropout(x)  # factors ≥ 0, and a slope on either side of 0: the activation may come first
            at = activation_at + 1
        return x


class RootChain(Root, Chain):
    """The model itself, if it is such an nn.Sequential."""


def scope_of(module: nn.Module, root: bool) -> type[Scope]:
    """What to make of the module, or of the model itself, in which norms meet their activations."""
    if type(module).forward is nn.Sequential.forward:
        return RootChain if root else Chain
    return Root if root else Scope


def _activation_of(layers: tuple[Any, ...], at: int, x: Any) -> int | None:
    """Where the activation of the norm layers[at] is, if the two can run on x as one operator."""
    norm: Any = layers[at]
    if (
        not issubclass(type(norm), PairedNorm)
        or route.eager(norm.why_eager(x))
        or not takes(norm, x, norm.weight, norm.bias)
    ):
        return None
    end = at + 1
    while end < len(layers) and _lets_pass(layers[end]):
        end += 1
    if end == len(layers) or not isinstance(layers[end], Activation) or route.observed(*layers[at : end + 1]):
        return None
    slope = slope_of(layers[end])
    return end if not isinstance(slope, Tensor) or fits(slope, x, 1) or fits(slope, x, norm.num_features) else None


def _lets_pass(layer: nn.Module) -> bool:
    """Whether layer is a dropout or nothing; a subclass of those may do anything."""
    return isinstance(layer, Dropout) or type(layer) in (nn.Identity, *DROPOUTS)
