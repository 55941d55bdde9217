"""A norm's output under torch.compile and torch.export, which cannot trace a `Deferred` (`deferred.py`).

A `Pending` is a plain Python object that stands for z = norm(x) while a graph is traced. Its activation turns it into
one operator. Any other use computes z by torch's own operations. A norm returns it only if the search has proven that
its output goes to an activation (`search.py`), and only while the module in which the two meet is running.

Which modules run is known while the graph is traced and is no part of it: no guard and no graph depends on it.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import route
from .._torch import TracingContext, constant_in_graphs, tree_map_only
from ..functional import fits, fused
from ..pair import FUNCTIONS, slope_of_call


class _Traced(threading.local):
    """For the graph that this thread traces: the norms that may wait in each running scope, and those that may not."""

    def __init__(self) -> None:
        self.graph: Any = None
        self.scopes: list[tuple[frozenset[str], frozenset[str]]] = []


_traced = _Traced()


def _scopes() -> list[tuple[frozenset[str], frozenset[str]]]:
    """The scopes of the graph that is traced now. Dynamo can drop a graph silently and start again with another one."""
    context = TracingContext.try_get()
    known = None if _traced.graph is None else _traced.graph()
    if known is not context:
        _traced.graph, _traced.scopes = None if context is None else weakref.ref(context), []
    return _traced.scopes


def enter(waiting: Iterable[str], observed: Iterable[str]) -> None:
    """A scope begins, in which the norms named `waiting` may wait, and those named `observed` may not."""
    _scopes().append((frozenset(waiting), frozenset(observed)))


@constant_in_graphs
def leave() -> None:
    """The innermost scope ends."""
    del _scopes()[-1:]


@constant_in_graphs
def may_wait(name: str) -> bool:
    """Whether the norm of this name may wait for its activation."""
    scopes = _scopes()
    return any(name in waiting for waiting, _ in scopes) and not any(name in observed for _, observed in scopes)


class Pending:
    """z = norm(x), or z + residual, or dropout(z), to be computed. `plainly` is the norm's own forward."""

    def __init__(self, name: str, plainly: Callable[[Tensor], Tensor], x: Tensor, terms: tuple[Any, ...]) -> None:
        self.name, self.plainly, self.x, self.terms = name, plainly, x, terms
        self.residual: Tensor | None = None
        self.dropouts: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.grad_mode = torch.is_grad_enabled()
        self.value: Any = None

    def plain(self) -> Any:
        """z as a tensor."""
        if self.value is None:
            with torch.set_grad_enabled(self.grad_mode):
                z = self.plainly(self.x)
                z = z if self.residual is None else z + self.residual
                for dropout in self.dropouts:
                    z = dropout(z)
                self.value = z
        return self.value

    def activated(self, slope: Tensor | float, inplace: bool) -> Tensor | None:
        """PReLU(z) as one operator. None if z was read already, or if the slope does not fit it."""
        x = self.x
        if not self._waits() or (isinstance(slope, Tensor) and not (fits(slope, x, 1) or fits(slope, x, x.shape[1]))):
            return None
        weight, bias, eps = self.terms
        y = fused(x, weight, bias, slope, eps, residual=self.residual)
        for dropout in self.dropouts:
            y = dropout(y)  # its factors are positive, so dropout and activation can change places
        if inplace:
            self.value = y
        return y

    def dropped(self, dropout: Callable[[Tensor], Tensor], inplace: bool) -> Pending | None:
        """dropout(z), to be computed. None if z was read or a residual was added."""
        if not self._waits() or self.residual is not None:
            return None
        z = self if inplace else self._copy()
        z.dropouts = (*self.dropouts, dropout)
        return z

    def __add__(self, other: Any) -> Any:
        return self._plus(other, self._copy()) if self._takes(other) else self.plain() + _plain(other)

    def __radd__(self, other: Any) -> Any:
        return self._plus(other, self._copy()) if self._takes(other) else other + self.plain()

    def __iadd__(self, other: Any) -> Any:
        return self._plus(other, self) if self._takes(other) else operator.iadd(self.plain(), _plain(other))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.plain()[index] = _plain(value)

    def _takes(self, other: Any) -> bool:
        """Whether the operator can add other: z waits and has no residual yet, and other is like x, in any layout."""
        x, r = self.x, other.x if isinstance(other, Pending) else other
        return (
            self._waits() and self.residual is None and not self.dropouts
            and isinstance(r, Tensor) and route.tracing_reason(r) is None
            and r.shape == x.shape and r.dtype == x.dtype and r.device == x.device
        )  # fmt: skip

    def _plus(self, other: Any, total: Pending) -> Pending:
        total.residual = _plain(other)
        return total

    def _copy(self) -> Pending:
        return Pending(self.name, self.plainly, self.x, self.terms)

    def _waits(self) -> bool:
        """Whether z was not read yet, and the grad mode is the one in which the norm was called."""
        return self.value is None and self.grad_mode == torch.is_grad_enabled() and route.tracing_reason(self.x) is None

    def relu(self) -> Any:
        return self.__torch_function__(Tensor.relu, (), (self,))

    def relu_(self) -> Any:
        return self.__torch_function__(Tensor.relu_, (), (self,))

    def prelu(self, weight: Tensor) -> Any:
        return self.__torch_function__(Tensor.prelu, (), (self, weight))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func with the values. An activation completes z, and an addition may wait."""
        if func in FUNCTIONS:
            z = args[0] if args else kwargs["input"]
            y = z.activated(*slope_of_call(func, args, kwargs or {})) if type(z) is Pending else None
            if y is not None:
                return y
        if len(args) == 2 and not kwargs:
            z, other = args
            if type(z) is Pending and func in _ADDITIONS_IN_PLACE:
                return z.__iadd__(other)
            if func in _ADDITIONS:
                return z + other if type(z) is Pending else other.__radd__(z)
        return func(*tree_map_only(Pending, Pending.plain, args), **tree_map_only(Pending, Pending.plain, kwargs or {}))


# Dynamo and the interpreter name an addition by one of these.
_ADDITIONS = (operator.add, Tensor.add, Tensor.__add__)
_ADDITIONS_IN_PLACE = (operator.iadd, Tensor.add_, Tensor.__iadd__)


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Pending) else value


def _delegating(name: str, right: bool = False) -> Any:
    """The method of an operator. Python does not look for these by __getattr__."""
    function = getattr(operator, name)
    if right:
        return lambda self, other: function(other, self.plain())
    return lambda self, *others: function(self.plain(), *(_plain(other) for other in others))


for _name in ("sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(Pending, f"__{_name}__", _delegating(_name))
    setattr(Pending, f"__r{_name}__", _delegating(_name, right=True))
    setattr(Pending, f"__i{_name}__", _delegating(f"i{_name}"))
for _name in ("neg", "abs", "invert", "getitem", "lt", "le", "gt", "ge", "eq", "ne", "index"):
    setattr(Pending, f"__{_name}__", _delegating(_name))
for _kind in (len, iter, bool, int, float):
    setattr(Pending, f"__{_kind.__name__}__", lambda self, kind=_kind: kind(self.plain()))
