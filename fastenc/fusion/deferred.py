"""A tensor subclass for a norm's output whose computation is deferred until its consumer is known.

An accelerated norm returns a `Deferred` in place of z = norm(x). Its activation turns it into PReLU(z) by one kernel,
or into PReLU(z + r) if a residual r was added in between. For any other consumer it is z, computed at the first look:
to PyTorch it is an ordinary tensor of the autograd graph, with shape, strides, dtype and gradient.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastenc.kernels.layout import layout

from .. import reference, route
from .._torch import disabled_torch_function, forbid_data_ptr, saved_tensors_hooks, tree_map_only
from ..functional import fits, fused
from ..pair import FUNCTIONS, slope_of_call
from .unbiased import Unbiased, running


class Deferred(Tensor):
    """z = norm(x), or dropout(z), or z + residual, to be computed."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    versions: list[int]
    grad_mode: bool
    hooks: Any
    dropout: Any = None
    noise: list[Tensor]
    residual: Tensor | None = None
    value: Tensor | None = None
    replaced: Tensor | None = None  # what an activation or addition in place has made of z
    passed_by: bool = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A functional activation completes z. Any other function goes through the dispatcher, below autograd, so the
        value that is computed there needs no history.
        """
        if func in FUNCTIONS:
            z = args[0] if args else kwargs["input"]
            y = z.activated(*slope_of_call(func, args, kwargs or {})) if type(z) is Deferred else None
            if y is not None:
                return y
        if Unbiased in types:
            return NotImplemented  # its own function comes next, and replaces it by the sum
        with disabled_torch_function():
            return func(*args, **(kwargs or {}))

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
        z = Tensor._make_wrapper_subclass(cls, x.size(), strides=x.stride(), dtype=x.dtype, device=x.device)
        z.x, z.weight, z.bias, z.eps = x, weight, bias, eps
        z.versions = _versions(x, weight, bias, None)
        z.grad_mode = torch.is_grad_enabled()
        z.hooks = saved_tensors_hooks(True)
        # z has no memory. Code that asks for its address by other methods than these gets an error and no null pointer.
        forbid_data_ptr(z)
        if running.scopes:
            running.waiting.append(weakref.ref(z))
        return z

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call func with the values."""
        return func(*tree_map_only(Deferred, _value, args), **tree_map_only(Deferred, _value, kwargs or {}))

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return self.plain().__repr__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:  # and so storage, share_memory_ and is_shared
        return _value(self).untyped_storage()

    def data_ptr(self) -> int:
        return _value(self).data_ptr()

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._in_memory().__cuda_array_interface__

    def _in_memory(self) -> Tensor:
        """z as a plain tensor: its own memory, or one that refuses to be exported because it requires a gradient."""
        return self.plain() if self.requires_grad else _value(self)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        self._keep_gradient()
        return super().register_hook(hook)

    def retain_grad(self) -> None:
        self._keep_gradient()
        super().retain_grad()

    def activated(self, slope: Tensor | float, inplace: bool) -> Tensor | None:
        """PReLU(z) in one kernel. None if z was read before, or if the slope does not fit it."""
        if self._looked_at() or self.grad_mode != torch.is_grad_enabled():
            return None
        if isinstance(slope, Tensor) and not (fits(slope, self.x, 1) or fits(slope, self.x, self.x.size(1))):
            return None
        self._check_unchanged()
        y = self._computed(slope)
        if self.dropout is not None:
            y = self.dropout(y)  # its factors are positive, so dropout and activation can change places
        self.passed_by = True
        if inplace:
            self.replaced = y
        return y

    def dropped(self, dropout: Callable[[Tensor], Tensor], inplace: bool) -> Deferred | None:
        """dropout(z), to be computed. None if z is `_settled`, or if the dropout is in place."""
        if inplace or self._settled():
            return None
        self.passed_by = True
        if self.requires_grad:
            return _Drop.apply(self, dropout)
        return self._again(dropout=dropout, noise=[])

    def plain(self) -> Tensor:
        """z as a plain tensor, with its history."""
        if self.replaced is not None:
            return self.replaced.plain() if type(self.replaced) is Deferred else self.replaced
        if self._looked_at() or self.dropout is not None:
            return self.clone()
        self._check_unchanged()
        with torch.set_grad_enabled(self.grad_mode):
            return self._computed(1.0)

    def settle(self) -> None:
        """Compute z, which outlives the forward that made it, before the tensors that it is computed from change."""
        if self.replaced is not None:
            y = self.plain()
            if self.requires_grad:
                with torch.enable_grad():
                    _Replace.apply(self, y)
            self.value, self.replaced = y.detach(), None
        elif self.value is None and self._unchanged():  # if it has changed, reading z raises
            _value(self)
        if self.value is not None:
            self.x = self.value  # x is not needed any more

    def __add__(self, other: Any) -> Tensor:
        r = self._residual(other)
        return super().__add__(other) if r is None else self._plus(r)

    def __radd__(self, other: Any) -> Tensor:
        r = self._residual(other)
        if r is None and isinstance(other, Tensor):
            return NotImplemented  # then other.__add__ runs, which gives the sum other's strides
        return super().__radd__(other) if r is None else self._plus(r)

    def __iadd__(self, other: Any) -> Tensor:
        r = self._residual(other)
        if r is None:
            return super().__iadd__(other)
        if self.grad_mode and (self.requires_grad or r.requires_grad):
            self.replaced = self._plus(r)
            return self.replaced
        self.residual, self.versions = r, [*self.versions, r._version]
        return self

    def _residual(self, other: Any) -> Tensor | None:
        """other, for the kernel to add. None if z is `_settled`, or if other has another layout than x."""
        x = self.x
        if (
            self._settled() or type(other) not in (Tensor, Deferred)
            or other.shape != x.shape or other.stride() != x.stride()
            or other.dtype != x.dtype or other.device != x.device or other.is_inference()
        ):  # fmt: skip
            return None
        return other.plain() if type(other) is Deferred else other

    def _plus(self, r: Tensor) -> Deferred:
        """z + r, to be computed."""
        self.passed_by = True
        if self.grad_mode and (self.requires_grad or r.requires_grad):
            return _Add.apply(self, r)
        return self._added(r)

    def _added(self, r: Tensor, **own: Any) -> Deferred:
        return self._again(residual=r, versions=[*self.versions, r._version], **own)

    def _again(self, **own: Any) -> Deferred:
        """Another Deferred of the same norm."""
        z = Deferred(self.x, self.weight, self.bias, self.eps)
        vars(z).update({"versions": self.versions, **own})
        return z

    def _computed(self, slope: Tensor | float) -> Tensor:
        return fused(self.x, self.weight, self.bias, slope, self.eps, residual=self.residual)

    def _looked_at(self) -> bool:
        """Whether z has a value, or a history other than its norm's.

        A leaf has one, and so has the output of an autograd.Function that returns z, such as a reentrant checkpoint.
        """
        if self.value is not None or self.replaced is not None:
            return True
        hooks = saved_tensors_hooks(True)
        if hooks is not None and hooks != self.hooks:
            # torch.utils.checkpoint may use z again, after the forward that made it, and must save the same tensors.
            _value(self)
            return True
        with disabled_torch_function():  # one block is faster than two
            return self.requires_grad and type(self.grad_fn) not in _HISTORY

    def _keep_gradient(self) -> None:
        """Compute z, so that no kernel fuses it away and z has a gradient."""
        if self.passed_by and self.requires_grad:
            raise RuntimeError(
                "a hook or retain_grad() came after the output of an accelerated norm had been fused with what follows "
                "it; register it right behind the norm, or use fastenc.accelerate(model, undo=True)"
            )
        _value(self)

    def _settled(self) -> bool:
        """Whether nothing more can be deferred: z was read, has a residual or a dropout, or a tracer is active."""
        return (
            self._looked_at() or self.dropout is not None or self.residual is not None
            or self.grad_mode != torch.is_grad_enabled() or route.tracing_reason(self.x) is not None
        )  # fmt: skip

    def _unchanged(self) -> bool:
        return _versions(self.x, self.weight, self.bias, self.residual) == self.versions

    def _check_unchanged(self) -> None:
        if self.versions != _versions(self.x, self.weight, self.bias, self.residual):
            raise RuntimeError(
                "the input, weight, bias or residual of an accelerated norm was changed in place before its output was "
                "used; fastenc.accelerate(model, undo=True) gives the original model back"
            )
        for parameter in (self.weight, self.bias):
            if parameter is not None and not parameter.untyped_storage().nbytes():
                raise RuntimeError(
                    "the weight of an accelerated norm was freed before its output was used, as sharding does behind "
                    "a forward; fastenc.accelerate(model, undo=True) gives the original model back"
                )


def _exporting(name: str) -> Any:
    """The method of this name, which hands out memory and passes the methods above by."""
    return lambda self, *args, **kwargs: getattr(self._in_memory(), name)(*args, **kwargs)


for _name in ("tolist", "numpy", "__array__", "__dlpack__"):
    setattr(Deferred, _name, _exporting(_name))


def deferred(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
    """norm(x), to be computed. x must be `dense`."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _Defer.apply(x, weight, bias, eps)
    return Deferred(x, weight, bias, eps)


@lru_cache(maxsize=4096)
def dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the output of a norm has these strides if its input has them."""
    return layout(shape, stride) is not None


def _versions(*tensors: Tensor | None) -> list[int]:
    """How often each tensor was changed in place."""
    return [tensor._version for tensor in tensors if tensor is not None]


def _value(z: Deferred) -> Tensor:
    """z without history, computed at the first call."""
    if z.replaced is not None:
        if z.requires_grad or type(z.replaced) is Deferred:
            raise RuntimeError(
                "the output of an accelerated norm was used after its in-place activation or addition had replaced it; "
                "use what that returned, or fastenc.accelerate(model, undo=True)"
            )
        return z.replaced
    if z.value is None:
        z._check_unchanged()
        with torch.no_grad():
            z.value = z._computed(1.0)
            if z.dropout is not None:
                z.noise.append(z.dropout(torch.ones_like(z.value)))
                z.value = z.value * z.noise[0]
    return z.value


class _Defer(torch.autograd.Function):
    """The node of a Deferred in the autograd graph. It is used if z itself was read, and not after a fused kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Deferred:
        ctx.terms = x, weight, bias, 1.0, eps  # not by save_for_backward, whose hooks may move tensors
        z = Deferred(x, weight, bias, eps)
        z.grad_mode = True
        ctx.versions = z.versions
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != _versions(*ctx.terms[:3], None):
            raise RuntimeError(
                "the input, weight or bias of an accelerated norm was changed in place between forward and backward; "
                "fastenc.accelerate(model, undo=True) gives the original model back"
            )
        dx, dweight, dbias, _ = reference.backward(gradients[0], *ctx.terms)
        return dx, dweight, dbias, None


class _Drop(torch.autograd.Function):
    """The node of a Deferred with dropout in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, z: Deferred, dropout: Callable[[Tensor], Tensor]) -> Deferred:
        ctx.noise = []
        return z._again(dropout=dropout, noise=ctx.noise, grad_mode=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.noise[0], None


class _Add(torch.autograd.Function):
    """The node of a Deferred with a residual in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, z: Deferred, residual: Tensor) -> Deferred:
        return z._added(residual, grad_mode=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class _Replace(torch.autograd.Function):
    """Makes the history of y that of z, as an operation in place does."""

    @staticmethod
    def forward(ctx: Any, z: Deferred, y: Tensor) -> Deferred:
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


# The nodes that give a Deferred a history of its own.
_HISTORY = tuple(function._backward_cls for function in (_Defer, _Drop, _Add))
