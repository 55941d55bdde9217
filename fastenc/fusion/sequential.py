"""Norm and activation as one operator when torch.compile or torch.export traces an accelerated network.

They cannot trace a `Deferred` (`deferred.py`). Inside an nn.Sequential none is needed, because no other code can see
the tensor between two adjacent modules. Pairs outside an nn.Sequential are compiled unfused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import route
from ..functional import fused, is_supported
from ..pair import DROPOUTS, slope_of
from .modules import (
    Activation,
    DeferredNorm,
    Dropout,
    FusionScope,
    ModelRoot,
    observed,
)


class FusedSequential(FusionScope):
    """An nn.Sequential in which a norm meets its activation."""

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() or "forward" in self.before:
            return super()._traced(*args, **kwargs)
        return self._in_turn(*args, **kwargs)

    def _in_turn(self, input: Tensor) -> Any:  # named as nn.Sequential names it
        x, at, layers = input, 0, tuple(self.module)
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


class RootSequential(ModelRoot, FusedSequential):
    """The model itself, if it is such an nn.Sequential."""


def scope_of(module: nn.Module, root: bool) -> type[FusionScope]:
    """The forward for the module, or for the model itself, in which norms meet their activations."""
    if type(module).forward is nn.Sequential.forward:
        return RootSequential if root else FusedSequential
    return ModelRoot if root else FusionScope


def _activation_of(layers: tuple[Any, ...], at: int, x: Any) -> int | None:
    """Where the activation of the norm layers[at] is, if the two can run on x as one operator."""
    norm: Any = layers[at]
    if not isinstance(norm.forward, DeferredNorm) or route.eager(norm.forward.why_eager(x)):
        return None
    end = at + 1
    while end < len(layers) and _lets_pass(layers[end]):
        end += 1
    if (
        end == len(layers)
        or not isinstance(layers[end].forward, Activation)
        or any(map(observed, layers[at : end + 1]))
    ):
        return None
    return end if is_supported(norm, norm.weight, norm.bias, slope_of(layers[end]), x) else None


def _lets_pass(layer: nn.Module) -> bool:
    """Whether layer is a dropout or nothing; a subclass of those may do anything."""
    return isinstance(layer.forward, Dropout) or type(layer) in (nn.Identity, *DROPOUTS)
