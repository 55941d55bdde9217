"""The forwards that accelerated modules get instead of their own: `vars(module)["forward"]` is one of these objects.

A module's class, layout and hooks stay as they were. A norm returns a `Deferred` while one of the modules in which it
was seen to meet an activation is running, and the activation completes it. Under torch.compile and torch.export a
`Pending` takes its place. On the eager route, and for any other input, both do what torch.nn does. Neither leaves the
outermost of those modules.
"""

from __future__ import annotations

import copy
import copyreg
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function

from .. import route
from .._torch import constant_in_graphs, disabled_torch_function, saved_tensors_hooks, tree_leaves, tree_map_only
from ..convolution import channels_last, is_channels_last
from ..functional import fused, is_supported
from ..pair import TORCH_FORWARDS, slope_of, why_not_plain
from .deferred import Deferred, deferred, dense
from .pending import Pending, enter, leave, may_wait
from .unbiased import PendingBias, Unbiased, running

_WAITING = (Deferred, Pending, Unbiased, PendingBias)


class Forward(route.Accelerated):
    """The forward that runs instead of a module's own. before: the attributes of the module that it replaced."""

    # The attributes of a module that Python or torch look up on the instance; "forward" is set apart.
    ATTRIBUTES: ClassVar = {
        "__reduce_ex__": "_reduced", "_replicate_for_data_parallel": "_replica", "__prepare_scriptable__": "_scripted",
    }  # fmt: skip

    def __init__(self, module: Any, **options: Any) -> None:
        self.module = module
        self.before: dict[str, Any] = {}
        vars(self).update(options)

    def install(self) -> None:
        """Make the module run this forward."""
        own = vars(self.module)
        self.before = {name: own[name] for name in ("forward", *self.ATTRIBUTES) if name in own}
        own["forward"] = self
        self._attach(self.module)

    def plainly(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        if "forward" in self.before:
            return self.before["forward"](*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:  # for inspect.signature
        return self.before.get("forward") or type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> Any:  # torch.export names its symbols by it
        return self.__wrapped__.__code__

    def _attach(self, module: nn.Module) -> None:
        vars(module).update({name: getattr(self, method) for name, method in self.ATTRIBUTES.items()})

    def _bound_to(self, module: nn.Module) -> None:
        """Give module, a copy that may hold this forward, a forward of its own."""
        own, mine = vars(module), self
        if self.module is not module:
            mine = copy.copy(self)
            mine.module = module
        if own.get("forward") is self:
            own["forward"] = mine
        mine._attach(module)

    def _replica(self) -> Any:
        """The replica that nn.DataParallel makes of the module, attribute by attribute."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        self._bound_to(replica)
        return replica

    def _reduced(self, protocol: Any) -> Any:
        """Pickle and copy the module as its class does. The copy gets a forward of its own."""
        kind: Any = type(self.module)
        made: Any = kind.__reduce_ex__(self.module, max(2, protocol))
        if made[0] is not copyreg.__newobj__ or not isinstance(made[2], dict):  # type: ignore[attr-defined]
            return made
        state = {name: value for name, value in made[2].items() if name not in self.ATTRIBUTES}
        return _made, made[1], {**state, _STATE: self}, *made[3:]

    def _scripted(self) -> Any:
        raise RuntimeError(
            "torch.jit.script cannot compile an accelerated module: fastenc.accelerate(model, undo=True) first"
        )


_STATE = "_fastenc_forward"


def _made(cls: Any, *arguments: Any) -> Any:
    """A module whose state pickle or copy sets next. Both look `__setstate__` up on the instance."""
    module = cls.__new__(cls, *arguments)
    vars(module)["__setstate__"] = partial(_set_state, module)
    return module


def _set_state(module: Any, state: dict[str, Any]) -> None:
    del vars(module)["__setstate__"]
    module.__setstate__({name: value for name, value in state.items() if name != _STATE})
    state[_STATE]._bound_to(module)


def forward_of(module: nn.Module) -> Any:
    """The `Forward` that accelerate set on module, or None. Other code may have replaced or wrapped it since."""
    found = getattr(vars(module).get("__reduce_ex__"), "__self__", None)
    return found if isinstance(found, Forward) else None


def restore(module: nn.Module) -> None:
    """Undo `Forward.install`."""
    forward, own = forward_of(module), vars(module)
    if forward is not None:
        for name in (*forward.ATTRIBUTES, *(["forward"] if own.get("forward") is forward else [])):
            del own[name]
            if name in forward.before:
                own[name] = forward.before[name]


class FusedNorm(Forward):
    """An InstanceNorm without an activation: the fused kernel with slope 1."""

    def why_eager(self, x: object) -> str | None:
        """Why the norm runs as torch's own on x. None if the kernel runs."""
        return route.reason(x) or route.hook_reason(self.module) or why_not_plain(self.module)

    def __call__(self, input: Any) -> Any:  # named as torch.nn names it
        kind = type(input)
        if (kind is Unbiased or kind is PendingBias) and why_not_plain(self.module) is None:
            x = input.unread()
        else:
            x = input.plain() if kind in _WAITING else input
        if self._fuses() and not route.use_eager(self.why_eager(x)):
            norm = self.module
            weight, bias = norm.weight, norm.bias  # read once, because nn.Module is slow to find them
            if is_supported(norm, weight, bias, 1.0, x):
                return self._normalized(x, weight, bias, norm.eps)
        return self.plainly(input.plain() if kind is Unbiased else x)

    def _fuses(self) -> bool:
        """A norm alone is left to the compiler."""
        return not is_compiling()

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return fused(x, weight, bias, 1.0, eps)


class DeferredNorm(FusedNorm):
    """An InstanceNorm whose output an activation completes. name: its name in the model.

    torch.utils.checkpoint reruns a forward, possibly outside any scope, and must save the same tensors both times. So
    while saved-tensor hooks are active, norms always defer.
    """

    name: str

    def _fuses(self) -> bool:
        return not is_compiling() or may_wait(self.name)

    def _normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        if is_compiling():
            return Pending(self.name, self.plainly, x, (weight, bias, eps))
        if (
            (running.scopes or saved_tensors_hooks(True))
            and self.name not in running.observed
            and dense(x.shape, x.stride())
            # Tensors made in inference mode do not count changes in place.
            and not (x.is_inference() or (weight is not None and weight.is_inference()))
            and not (bias is not None and bias.is_inference())
        ):
            return deferred(x, weight, bias, eps)
        return fused(x, weight, bias, 1.0, eps)


class Activation(Forward):
    """A PReLU, LeakyReLU or ReLU that completes a deferred norm."""

    def __call__(self, input: Any) -> Tensor:
        if type(input) is not Deferred and type(input) is not Pending:
            return self.plainly(input)
        module: Any = self.module
        inplace = vars(module).get("inplace", False)
        y = None if observed(module) else input.activated(slope_of(module), inplace)
        return _unfused(self.plainly, input, inplace) if y is None else y


class Dropout(Forward):
    """A dropout between a norm and its activation. Its factors are at least 0, so the activation may come first."""

    def __call__(self, input: Any) -> Any:
        kind = type(input)
        if kind is Tensor:
            return self.plainly(input)
        module: Any = self.module
        if kind in _WAITING and not observed(module) and (not module.training or module.p == 0):
            return input
        if kind is not Deferred and kind is not Pending:
            return self.plainly(input)
        z = None if observed(module) else input.dropped(self.plainly, module.inplace)
        return _unfused(self.plainly, input, module.inplace) if z is None else z


class FusionScope(Forward):
    """The forward of the innermost module in which a norm meets its activation.

    between: the modules whose forward a norm's output leaves, or enters, on its way, and the names of those norms. A
    hook on such a module may use what it is given, or free the norm's weight as FSDP2 does: those norms do not defer.
    proven: the modules that the output of a norm proven to fuse goes through, its activation at the end, and the names
    of those norms, for torch.compile and torch.export.
    """

    between: tuple[tuple[nn.Module, tuple[str, ...]], ...] = ()
    proven: tuple[tuple[nn.Module, tuple[str, ...]], ...] = ()
    keeps_inference_mode = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # After undo, other code may still hold this forward and call it.
        if is_compiling() or (vars(self.module).get("forward") is not self and forward_of(self.module) is not self):
            return self._traced(*args, **kwargs)
        if not torch.is_inference_mode_enabled() or running.scopes or self.keeps_inference_mode:
            return self._called(args, kwargs)
        # Tensors made in inference mode do not count changes in place, without which a norm cannot wait.
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._called(*_converted(_counting_alias, args, kwargs))
        except RuntimeError as error:
            if "nplace update to inference tensor" not in str(error):
                raise
            self.keeps_inference_mode = True
            raise RuntimeError(
                f"{type(self.module).__name__} changed a tensor in place that was made in inference mode before this "
                "call, which torch forbids wherever changes are counted, as they are in an accelerated model. Its next "
                "calls stay in inference mode, where only a norm's own kernel runs; torch.no_grad() has no such limit "
                "for tensors made in it."
            ) from error

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that torch.compile and torch.export trace."""
        if not self.proven or not is_compiling():
            return self.plainly(*args, **kwargs)
        seen: list[str] = []
        for module, names in (*self.between, *self.proven):
            if route.hook_reason(module):
                seen.extend(names)
        self._enter(seen)
        try:
            y = self.plainly(*args, **kwargs)
        finally:
            leave()
        # In a scope around this one, a norm's output may leave as it is.
        return tree_map_only(Pending, lambda z: z if may_wait(z.name) else z.plain(), y)

    @constant_in_graphs
    def _enter(self, observed: list[str]) -> None:
        enter((name for _, names in self.proven for name in names), observed)

    def _called(self, args: Any, kwargs: Any) -> Any:
        """Run the forward with norms that defer."""
        made: list[Callable[[], Deferred | Unbiased | None]] = []
        around, outside, running.waiting = running.waiting, running.observed, made
        for module, names in self.between:
            if route.hook_reason(module):
                running.observed = running.observed.union(names)
        if not running.scopes:
            running.grad_mode = torch.is_grad_enabled()
        running.scopes += 1
        try:
            y = self.plainly(*args, **kwargs)
        finally:
            running.scopes -= 1
            if not running.scopes:
                running.grad_mode = True
            running.observed, running.waiting = outside, around
        leaving: list[Any] = []
        if type(y) is not Tensor:
            if running.scopes and not route.hook_reason(self.module):
                leaving = [leaf for leaf in tree_leaves(y) if isinstance(leaf, (Deferred, Unbiased))]
                around += map(weakref.ref, leaving)
            else:
                y = tree_map_only((Deferred, Unbiased), lambda z: z.plain(), y)
        for each in made:  # still referenced, and not left to a scope around this one
            z = each()
            if z is not None and not any(z is other for other in leaving):
                z.settle()
        return y


class TracedScope(FusionScope):
    """A scope for torch.compile and torch.export only. In eager mode, the scope around it serves."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._traced(*args, **kwargs)


class ModelRoot(FusionScope):
    """The forward of the model itself: converts its inputs to channels-last, and its outputs back."""

    keeps_contiguous = False  # set once the forward has failed on channels-last inputs

    def _called(self, args: Any, kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        annotated = [value for value in given if _only_annotated(value)]
        if annotated:
            return handle_torch_function(self._unannotated, annotated, *args, **kwargs)
        images = [value for value in given if value.dim() > 3 and not route.reason(value)]
        if not images:
            return super()._called(args, kwargs)
        if not self.keeps_contiguous:
            try:
                y = super()._called(*_converted(_laid_out, args, kwargs))
                return y if all(map(is_channels_last, images)) else tree_map_only(Tensor, _contiguous, y)
            except RuntimeError as error:
                if not str(error).startswith("view size is not compatible"):
                    raise
                if any(m.training and m._buffers.get("running_mean") is not None for m in self.module.modules()):
                    raise RuntimeError(
                        f"{type(self.module).__name__} calls view on a tensor, which the channels-last layout of an "
                        "accelerated model does not allow, and running statistics would count a second try twice. Call "
                        "reshape there, or call the model once in eval mode: it then keeps to contiguous tensors."
                    ) from error
        # Outside the except clause, in which the error would keep all tensors of the first call alive.
        y = super()._called(*_converted(_row_major, args, kwargs))
        if not self.keeps_contiguous:
            self.keeps_contiguous = True
            warnings.warn(
                f"{type(self.module).__name__} runs on contiguous tensors from now on, without the gain of the "
                "channels-last layout: it calls view on a tensor, which that layout does not allow. Remedy: call "
                "reshape there.",
                RuntimeWarning,
                stacklevel=2,
            )
        return y

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        """As `_called`, in the same layouts."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        images = [value for value in given if value.dim() > 3 and not route.reason(value)]
        if not torch.compiler.is_compiling() or self.keeps_contiguous or all(map(is_channels_last, images)):
            return super()._traced(*args, **kwargs)
        arguments, keywords = _converted(_laid_out, args, kwargs)
        return tree_map_only(Tensor, _contiguous, super()._traced(*arguments, **keywords))

    def _unannotated(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(_only_annotated, lambda value: value.as_subclass(Tensor), (args, kwargs))
        return self(*args, **kwargs)


def _converted(layout: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in another layout. A list or a dict among them stays the caller's own."""
    return (
        [layout(value) if isinstance(value, Tensor) else value for value in args],
        {name: layout(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()},
    )


def _counting_alias(x: Tensor) -> Tensor:
    """x itself, or its memory in a tensor that counts changes in place."""
    if type(x) is not Tensor or not x.is_inference() or not x.is_floating_point() or x.layout is not torch.strided:
        return x
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    )


def observed(module: nn.Module) -> bool:
    """Whether module has a hook, or is no longer a plain torch.nn module."""
    return route.hook_reason(module) is not None or type(module).forward not in TORCH_FORWARDS


def _unfused(forward: Callable[..., Any], x: Deferred | Pending, inplace: bool) -> Tensor:
    """forward of the value of x. In place, x itself changes."""
    if type(x) is Pending or not inplace:
        return forward(x.plain())
    with disabled_torch_function():  # F.relu would complete x
        y = forward(x)
    return y.plain() if type(y) is Deferred else y


def _only_annotated(value: Any) -> bool:
    """Whether value is a tensor of a class that adds annotations only, such as MONAI's MetaTensor."""
    return (
        isinstance(value, Tensor)
        and type(value) is not Tensor
        and type(value) is not nn.Parameter
        and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
        and route.reason(value.as_subclass(Tensor)) is None
    )


def _laid_out(x: Tensor) -> Tensor:
    return x if route.reason(x) else channels_last(x)


def _row_major(x: Tensor) -> Tensor:
    """x contiguous, also in the strides of axes of length 1, by which a convolution chooses if x has both layouts."""
    return x if route.reason(x) else x.contiguous().flatten().view(x.shape)


def _contiguous(y: Tensor) -> Tensor:
    return y.contiguous() if type(y) is Tensor and y.dim() > 3 else y
