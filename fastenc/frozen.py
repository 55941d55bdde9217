"""`freeze`: a copy of a model for inference, whose weights are cast, laid out and cut once.

The tensors that a copy keeps are made outside inference mode, so that `refresh` can write to them later.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fastenc.kernels.layout import MEMORY_FORMAT

from .convolution import PLAIN, Cuts

DTYPES = (torch.bfloat16, torch.float16)
_OPTIONS = (int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.memory_format)


# What to do instead of using these attributes of nn.Module on a frozen model. {} is the name of the attribute.
_MOVE = "move or cast the model, then call refresh()"
_ASK = "ask the model: .model.{}"
_INSTEAD = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "bfloat16", "float", "double"), _MOVE),
    **dict.fromkeys(("eval", "train", "requires_grad_"), "it is in eval mode and gives no gradients; train the model"),
    "load_state_dict": "load into the model, then call refresh()",
}


class ForInference:
    """The base of `Frozen` and `Graphed`. Using an attribute of nn.Module raises an error that says what to do."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name.startswith("_") or not (hasattr(nn.Module, name) or name == "training"):
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        raise AttributeError(f"a {kind} is no nn.Module and has no {name!r}: {_INSTEAD.get(name, _ASK).format(name)}")


class Frozen(ForInference):
    """A model for inference, called like the model itself. Made by `freeze`.

    Outputs have no gradient. Changes to the model have no effect until `refresh()` copies its weights and options
    again. A copy or a pickle holds a copy of the model and freezes that.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype
        self._copy, self._structure = _copied(model, dtype), _structure(model)

    @property
    def model(self) -> nn.Module:
        """The model from which the weights were copied."""
        return self._model

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The output of the model in eval mode, under autocast to the dtype if there is one."""
        with torch.no_grad(), self._precision():
            return self._copy(*arguments, **keywords)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> bool:
        """Copy the model's weights and buffers again, into the same memory.

        Returns:
            True if that was enough. False if the model was copied again because more than its numbers changed: a
            device, dtype, shape or module, which modules share a parameter, or an option of a module, for example a
            stride, an eps, a slope or a function. New numbers in a tensor that is neither a parameter nor a buffer, or
            in an object that a module holds, are not noticed.
        """
        structure = _structure(self._model)
        if structure != self._structure:
            self._copy, self._structure = _copied(self._model, self._dtype), structure
            return False
        for kind in (nn.Module.parameters, nn.Module.buffers):
            for target, source in zip(kind(self._copy), kind(self._model), strict=True):
                target.copy_(source)
        for module in self._copy.modules():
            if isinstance(module.__dict__.get("cuts"), Cuts):
                module.__dict__["cuts"].refresh(module.weight)
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze, (self._model, self._dtype)

    def __repr__(self) -> str:
        return f"Frozen({type(self._model).__name__}, dtype={self._dtype})"

    def _precision(self) -> AbstractContextManager[object]:
        if self._dtype is None:
            return nullcontext()
        device = next((tensor.device.type for tensor in self._copy.parameters()), "cpu")
        return torch.autocast(device, self._dtype)


def freeze(model: nn.Module, dtype: torch.dtype | None = None) -> Frozen:
    """A copy of `model` for inference. Its weights are cast, laid out and cut once, not in every call.

    It needs memory for one copy of the weights in `dtype`. A convolution that is run on small maps also keeps its live
    taps, which are 1 of 27 on a 1³ map. The model itself does not change and may be trained further. `refresh()` copies
    its weights and options again.

    Args:
        model: any nn.Module; the copy is in eval mode.
        dtype: torch.bfloat16 or torch.float16 casts the weights of convolutions and linear layers, and runs the copy
            under autocast to it. None casts nothing. Normalisations and slopes stay in their own dtype. A layer
            that the model runs with autocast off gets a cast weight too; such a model needs None.

    Returns:
        A `Frozen`, which is called like the model.

    Raises:
        TypeError: model is not an nn.Module, or is a ScriptModule.
        ValueError: dtype is another dtype.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a torch.nn.Module that is not scripted, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None, {' or '.join(map(str, DTYPES))}, got {dtype!r}")
    return Frozen(model, dtype)


def _structure(model: nn.Module) -> list[Any]:
    """The modules of a model with their options, and for each parameter and buffer the first name of the same tensor.

    The attribute `training` is left out: the copy is for inference.
    """
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return [
        *(first.setdefault(id(tensor), name) for name, tensor in named),
        *(
            (name, type(module), {key: _option(value) for key, value in vars(module).items() if key != "training"})
            for name, module in model.named_modules()
        ),
    ]


def _option(value: Any) -> Any:
    """The part of an attribute that is compared: a number, string or function itself, and the type of other objects.

    Of a tensor, its shape, dtype and device are compared too.
    """
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_option(entry) for entry in value]
    if isinstance(value, dict):
        return type(value), [(key, _option(entry)) for key, entry in value.items()]
    if isinstance(value, _OPTIONS) or (callable(value) and not isinstance(value, nn.Module)):
        return value
    return type(value)


@torch.inference_mode(False)
@torch.no_grad()
def _copied(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of model in eval mode. Each parameter is copied once, directly to its final dtype and layout."""
    owners: dict[Tensor, set[type]] = {}
    for module in model.modules():
        # A hook may compute the weight from other parameters, as torch.nn.utils.spectral_norm does.
        kind = nn.Module if module._forward_pre_hooks else type(module)
        for own in module._parameters.values():
            if own is not None:
                owners.setdefault(own, set()).add(kind)
    made: dict[int, Any] = {}
    for parameter, kinds in owners.items():
        cast = kinds <= {nn.Linear, *PLAIN}
        value = parameter.detach()
        target = dtype if cast and dtype is not None and value.dtype == torch.float32 else value.dtype
        layout = MEMORY_FORMAT.get(value.dim()) if value.is_cuda and kinds <= PLAIN else None
        value = value.to(target, memory_format=layout or torch.preserve_format, copy=True)
        made[id(parameter)] = nn.Parameter(value, requires_grad=False)
    frozen = copy.deepcopy(model, made)
    frozen.eval()  # a model may override train and return nothing
    for module in frozen.modules():
        if type(module) in PLAIN:
            module.__dict__["cuts"] = Cuts()
    return frozen
