"""The output of a convolution whose bias an InstanceNorm cancels: computed without the bias, which has no effect there.

The norm reads `raw`, the convolution's own output. Any other reader gets raw + bias, computed at the first read.
`Unbiased` is a tensor, for eager mode; `PendingBias` stands for it while torch.compile or torch.export traces.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_map_only
from .pending import Pending


class _Running(threading.local):
    """Of this thread: how many scopes run, the norms that must not defer in them, and every Deferred made in them.

    grad_mode: whether gradients are on in the outermost scope.
    """

    def __init__(self) -> None:
        self.scopes = 0
        self.grad_mode = True
        self.observed: frozenset[str] = frozenset()
        self.waiting: list[Callable[[], Any]] = []


running = _Running()


class Unbiased(Tensor):
    """raw + bias. torch's Python functions work on the sum."""

    raw: Tensor
    bias: Tensor
    axes: int
    grad_mode: bool
    value: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return func(args[0].raw, *args[1:], **(kwargs or {}))
        args, kwargs = (tree_map_only(Unbiased, Unbiased.plain, each) for each in (args, kwargs or {}))
        return func(*args, **kwargs)

    def unread(self) -> Tensor:
        """raw, for a norm. The sum if it was read before, because the reader may have changed it."""
        return self.raw if vars(self)["value"] is None else self.plain()

    def plain(self) -> Tensor:
        """The sum, with its history."""
        own = vars(self)
        if own["value"] is None:
            with torch.set_grad_enabled(own["grad_mode"]):
                own["value"] = biased(own["raw"], own["bias"], own["axes"])
        return own["value"]

    settle = plain  # at the end of the forward, after which the bias may change


def unbiased(raw: Tensor, bias: Tensor, axes: int) -> Unbiased:
    """raw + bias, to be computed. axes: the number of spatial axes."""
    y = raw.as_subclass(Unbiased)
    vars(y).update(raw=raw, bias=bias, axes=axes, grad_mode=torch.is_grad_enabled(), value=None)
    if running.scopes:
        running.waiting.append(weakref.ref(y))
    return y


def biased(raw: Tensor, bias: Tensor, axes: int) -> Tensor:
    """The output of the convolution with its bias, which autocast casts to the dtype of raw."""
    return raw + bias.to(raw.dtype).view(-1, *(axes * (1,)))


class PendingBias(Pending):
    """raw + bias under torch.compile and torch.export. x is raw."""

    def unread(self) -> Any:
        """As of `Unbiased`."""
        return self.x if self.value is None else self.value

    def __add__(self, other: Any) -> Any:
        return self.plain() + other  # other may be a norm's output that takes a residual

    def _waits(self) -> bool:
        return False  # for an activation


_QUESTIONS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride,
    )
)  # fmt: skip
