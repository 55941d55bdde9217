"""Every private name of torch that fastenc uses, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

# Tensor._make_wrapper_subclass makes a Deferred without memory. This turns off __torch_function__ for it.
# Reading the address of memory that a Deferred does not have must raise.
# torch.func has no public question whether a transform is active, and the kernels cannot be transformed.
# A TorchDispatchMode sees aten operations only, and there is no public question whether one is active.
from torch._C import (
    _are_functorch_transforms_active as transforms_active,
)
from torch._C import (
    _disabled_torch_function_impl as disabled_torch_function,
)
from torch._C import (
    _len_torch_dispatch_stack as dispatch_modes,
)
from torch._C import (
    _set_throw_on_mutable_data_ptr as forbid_data_ptr,
)

# Hooks on saved tensors are how torch.utils.checkpoint is noticed.
from torch._C._autograd import _top_saved_tensors_default_hooks as saved_tensors_hooks

# is_grads_batched still uses the batched tensors that came before torch.func.
from torch._C._functorch import is_legacy_batchedtensor

# forward_ad._current_level, at least 0 in forward mode, has no public form.
from torch.autograd import forward_ad

# A global module hook sees the call of every submodule, and there is no public question whether one is registered.
from torch.nn.modules.module import _has_any_global_hook as has_global_hook

# It decorates for torch.no_grad, generators step by step.
from torch.utils._contextlib import context_decorator

# Arguments and outputs of a model may be nested in any container that torch knows.
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Make torch.compile call `function` while it traces and take the result for a constant.

    torch.compiler.assume_constant_result does the same, but takes a second to import torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


__all__ = [
    "constant_in_graphs", "context_decorator", "disabled_torch_function", "dispatch_modes", "forbid_data_ptr",
    "forward_ad", "has_global_hook", "is_legacy_batchedtensor", "saved_tensors_hooks", "transforms_active",
    "tree_leaves", "tree_map", "tree_map_only",
]  # fmt: skip
