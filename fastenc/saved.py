"""Saving tensors of an autograd.Function for its backward, some of which may be None.

save_for_backward accepts None, but tools that read saved tensors, for example torchviz, fail on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

from torch import Tensor


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save the tensors that are not None, and record the positions of the others."""
    if NoneType in map(type, tensors):
        ctx.absent = [i for i, tensor in enumerate(tensors) if tensor is None]
        ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))
    else:
        ctx.absent = ()
        ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Sequence[Any]:
    """The tensors that were passed to `save`, including None."""
    if not ctx.absent:
        return ctx.saved_tensors
    tensors = [*ctx.saved_tensors]
    for i in ctx.absent:
        tensors.insert(i, None)
    return tensors
