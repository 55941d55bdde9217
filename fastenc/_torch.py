"""Every private name of torch that fastenc uses, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._guards import TracingContext  # one for each graph that torch.compile begins to trace
from torch.autograd import forward_ad  # its _current_level, at least 0 in forward mode, has no public form
from torch.nn.modules import module as _module
from torch.utils._contextlib import context_decorator  # decorates for torch.no_grad, generators step by step
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
)  # a model's arguments and outputs may be nested

# torch.func has no public question whether a transform is active, and the kernels cannot be transformed.
transforms_active = torch._C._are_functorch_transforms_active
# A TorchDispatchMode sees aten operations only, and there is no public question whether one is active.
dispatch_modes = torch._C._len_torch_dispatch_stack
# is_grads_batched still uses the batched tensors that came before torch.func.
is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
# Hooks on saved tensors are how torch.utils.checkpoint is noticed.
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# A global module hook sees the call of every submodule, and there is no public question whether one is registered.
has_global_hook = _module._has_any_global_hook
# Tensor._make_wrapper_subclass makes a Deferred without memory. In this block __torch_function__ of subclasses is off.
disabled_torch_function = torch._C.DisableTorchFunctionSubclass
# Reading the address of memory that a Deferred does not have must raise.
forbid_data_ptr = torch._C._set_throw_on_mutable_data_ptr

# The method of a convolution that code replaces to pad in another way. Its forward alone is public.
CONV_FORWARD = "_conv_forward"

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Make torch.compile call `function` while it traces and take the result for a constant.

    torch.compiler.assume_constant_result does the same, but takes a second to import torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


__all__ = [
    "CONV_FORWARD", "TracingContext", "constant_in_graphs", "context_decorator", "disabled_torch_function",
    "dispatch_modes", "forbid_data_ptr", "forward_ad", "has_global_hook", "is_legacy_batchedtensor",
    "saved_tensors_hooks", "transforms_active", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only",
]  # fmt: skip
