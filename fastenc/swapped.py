"""The classes that accelerated modules get in place of their own: each a subclass of the original, of the same name.

A norm hands out a `Deferred` while one of the modules that were seen to lead it to an activation is running, and the
activation takes it up; on the eager route, and to whatever else they are given, both do what torch.nn does. Nothing
deferred leaves the outermost of those modules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.overrides import handle_torch_function
from torch.utils._pytree import tree_map_only

from . import route
from .deferred import Deferred, deferred, dense, fits
from .functional import fused
from .stem import channels_last

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
ACTIVATIONS = (nn.PReLU, nn.LeakyReLU, nn.ReLU)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
KEEPS_CONTIGUOUS = "_keeps_contiguous"  # an attribute of a Root whose forward failed on channels-last volumes


class _Running(threading.local):
    """How many scopes are running in this thread."""

    scopes = 0


_running = _Running()


class Swapped:
    """What all of them share: they pickle and copy as (how they were made, state)."""

    _mixin: type
    _original: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(2, protocol))
        function, arguments, *state = made
        if arguments[:1] == (type(self),) and function.__name__ == "__newobj__":
            return _new, (self._mixin, self._original, *arguments[1:]), *state
        return made

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script cannot compile an accelerated module: fastenc.accelerate(model, undo=True) first"
        )


def swap(mixin: Any, module: Any) -> None:
    """Make module behave as mixin says, and otherwise as it did."""
    original: Any = type(module)
    module.__class__ = _swapped(mixin, original)


def restore(module: Any) -> None:
    """Take `swap` back."""
    if isinstance(module, Swapped) and "_original" in vars(type(module)):
        module.__class__ = module._original


@cache
def _swapped(mixin: Any, original: Any) -> Any:
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (mixin, original), {**same, "_mixin": mixin, "_original": original})


def _new(mixin: Any, original: Any, *arguments: Any) -> Any:
    cls = _swapped(mixin, original)
    return cls.__new__(cls, *arguments)


class LoneNorm(Swapped):
    """An InstanceNorm without an activation behind it: the fused kernel with slope 1."""

    def why_eager(self: Any, x: object) -> str | None:
        """Why the norm runs as torch's own on x; None if the kernel runs."""
        return route.reason(x) or route.observed(self) or why_not_plain(self)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.plain() if type(x) is Deferred else x
        if not (torch.compiler.is_compiling() or route.eager(self.why_eager(x))):
            weight, bias = self.weight, self.bias  # once: nn.Module is slow to find them
            if takes(self, x, weight, bias):
                return self._normalized(x, weight, bias)
        return super().forward(x)  # type: ignore[misc]

    def _normalized(self: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return fused(x, weight, bias, 1.0, self.eps)


class PairedNorm(LoneNorm):
    """An InstanceNorm ahead of an activation.

    What torch.utils.checkpoint repeats in the backward, maybe outside all scopes, has to save the same tensors again:
    wherever somebody takes those, norms defer with a scope and without.
    """

    def _normalized(self: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if (_running.scopes or _top_saved_tensors_default_hooks(True)) and dense(x):
            return deferred(x, weight, bias, self.eps)
        return fused(x, weight, bias, 1.0, self.eps)


class Activation(Swapped):
    """A PReLU, LeakyReLU or ReLU that fuses with a norm which waits for it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if type(x) is Deferred:
            inplace = vars(self).get("inplace", False)
            y = None if route.observed(self) else x.activated(slope_of(self), inplace)
            return _unfused(super().forward, x, inplace) if y is None else y  # type: ignore[misc]
        return super().forward(x)  # type: ignore[misc]


class Dropout(Swapped):
    """A dropout between a norm and its activation: it scales by factors ≥ 0, so the activation may come first."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if type(x) is Deferred:
            if not self.training or self.p == 0:
                return x
            z = None if self.inplace or route.observed(self) else x.dropped(self)
            return _unfused(super().forward, x, self.inplace) if z is None else z  # type: ignore[misc]
        return super().forward(x)  # type: ignore[misc]

    def drop(self: Any, y: Tensor) -> Tensor:
        """What the original does."""
        return super().forward(y)  # type: ignore[misc]


class Scope(Swapped):
    """The innermost module in whose forward a norm meets its activation."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if not isinstance(self, Scope):  # what torch.compile made of it holds on to this method after `restore`
                return self(*args, **kwargs)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        _running.scopes += 1
        try:
            y = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            _running.scopes -= 1
        if type(y) is Tensor or _running.scopes:
            return y
        return tree_map_only(Deferred, Deferred.plain, y)


class Root(Scope):
    """The model itself: volumes are laid out channels-last as they come in, and their maps as they were as they go."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if torch.compiler.is_compiling():
            # As in Scope; part of a model that was accelerated anew, it may be a Scope and no Root any more.
            return self._traced(given, args, kwargs) if isinstance(self, Root) else self(*args, **kwargs)
        annotated = [value for value in given if _only_annotated(value)]
        if annotated:
            return handle_torch_function(self._unannotated, annotated, *args, **kwargs)
        volumes = [value for value in given if value.dim() > 3 and dense(value) and not route.reason(value)]
        if not volumes:
            return super().__call__(*args, **kwargs)
        if not vars(self).get(KEEPS_CONTIGUOUS):
            try:
                y = self._called(_laid_out, args, kwargs)
                return tree_map_only(Tensor, _contiguous, y) if any(value.is_contiguous() for value in volumes) else y
            except RuntimeError as error:
                if not str(error).startswith("view size is not compatible"):
                    raise
                if any(map(_counting, self.modules())):
                    raise RuntimeError(
                        f"{type(self).__name__} calls view on a volume, which the channels-last layout of an "
                        "accelerated model does not allow, and running statistics would count a second try twice. Call "
                        "reshape there, or call the model once in eval mode: it then keeps to contiguous volumes."
                    ) from error
            # Once more out of the except clause, where the error would hold on to all volumes of the first time.
            y = self._called(_row_major, args, kwargs)
            vars(self)[KEEPS_CONTIGUOUS] = True
            warnings.warn(
                f"{type(self).__name__} runs on contiguous volumes from now on, without the gain of the channels-last "
                "layout: it calls view on a volume, which that layout does not allow. Remedy: call reshape there.",
                RuntimeWarning,
                stacklevel=2,
            )
            return y
        return self._called(_row_major, args, kwargs)

    def _traced(self, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """What torch.compile and torch.export write down: the same layouts."""
        volumes = [value for value in given if value.dim() > 3 and value.is_contiguous() and not route.reason(value)]
        if not volumes or getattr(self, KEEPS_CONTIGUOUS, False):
            return super().__call__(*args, **kwargs)
        return tree_map_only(Tensor, _contiguous, self._called(_laid_out, args, kwargs))

    def _called(self, layout: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
        """The forward of what came, volumes laid out anew; a list or a dict stays the caller's own."""
        args = [layout(value) if isinstance(value, Tensor) else value for value in args]
        kwargs = {name: layout(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def _unannotated(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(_only_annotated, lambda value: value.as_subclass(Tensor), (args, kwargs))
        return self(*args, **kwargs)


def _unfused(forward: Callable[[Tensor], Tensor], x: Deferred, inplace: bool) -> Tensor:
    """forward of what x stands for; in place, x itself changes."""
    if not inplace:
        return forward(x.plain())
    y = forward(x)
    return y.plain() if type(y) is Deferred else y


def _only_annotated(value: Any) -> bool:
    """Whether value is an ordinary tensor of another class, say MONAI's MetaTensor: what it adds can be put back."""
    return (
        isinstance(value, Tensor)
        and type(value) is not Tensor
        and type(value) is not nn.Parameter
        and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
        and route.reason(value.as_subclass(Tensor)) is None
    )


def _counting(module: nn.Module) -> bool:
    """Whether a forward of module changes running statistics."""
    return module.training and module._buffers.get("running_mean") is not None


def _laid_out(x: Tensor) -> Tensor:
    return x if route.reason(x) else channels_last(x)


def _row_major(x: Tensor) -> Tensor:
    """x contiguous, and so by the strides of axes of length 1: a convolution goes by them where a layout is both."""
    return x if route.reason(x) else x.contiguous().flatten().view(x.shape)


def _contiguous(y: Tensor) -> Tensor:
    return y.contiguous() if type(y) is Tensor and y.dim() > 3 else y


def slope_of(activation: nn.Module) -> Tensor | float:
    """The slope below zero of a PReLU, LeakyReLU or ReLU."""
    if isinstance(activation, nn.PReLU):
        return activation.weight
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0


def why_not_plain(norm: Any) -> str | None:
    """Why norm, an InstanceNorm, does more than normalise by the statistics of its input."""
    if norm.track_running_stats or norm._buffers.get("running_mean") is not None:
        return "it keeps running statistics"
    return None


def takes(norm: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether x is what norm, of this weight and bias, normalises; torch has its own word for what is not."""
    C, shape = norm.num_features, x.shape
    return (
        len(shape) == norm._get_no_batch_dim() + 1
        and shape[1] == C
        and 0 < 2 * C * shape[0] <= x.numel()
        and (weight is None or fits(weight, x, C))
        and (bias is None or fits(bias, x, C))
    )
