"""What an autograd.Function saves for its backward, where some of its tensors may be None.

save_for_backward would keep a None among the tensors, and tools that read saved tensors, such as torchviz, fail on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save the tensors that are not None, and remember the places of the others."""
    present = [tensor for tensor in tensors if tensor is not None]
    ctx.save_for_backward(*present)
    ctx.absent = [i for i, tensor in enumerate(tensors) if tensor is None] if len(present) < len(tensors) else ()


def saved(ctx: Any) -> Sequence[Any]:
    """The tensors that `save` was given, None included."""
    if not ctx.absent:
        return ctx.saved_tensors
    tensors = [*ctx.saved_tensors]
    for i in ctx.absent:
        tensors.insert(i, None)
    return tensors
