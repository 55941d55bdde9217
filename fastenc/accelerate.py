"""`accelerate`: the fused kernels in anybody's network, in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .chain import scope_of
from .layers import _ConvModernNd
from .modules import _InstanceNormActNd
from .swapped import (
    INSTANCE_NORMS,
    KEEPS_CONTIGUOUS,
    Activation,
    Dropout,
    LoneNorm,
    PairedNorm,
    restore,
    swap,
    why_not_plain,
)


@dataclass(frozen=True, slots=True)
class NormOutcome:
    """What became of one norm: "fused" with an activation, the kernel "alone", or "left" as it was; and why."""

    name: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What `accelerate` did to each instance normalisation of a model. Iterate over it, or print it."""

    norms: tuple[NormOutcome, ...]

    def __iter__(self) -> Iterator[NormOutcome]:
        return iter(self.norms)

    def __len__(self) -> int:
        return len(self.norms)

    def count(self, outcome: str) -> int:
        """How many norms are "fused", "alone" or "left"."""
        return sum(norm.outcome == outcome for norm in self.norms)

    def __str__(self) -> str:
        if not self.norms:
            return "no InstanceNorm1d, 2d or 3d in this model: nothing to accelerate"
        widths = [max(len(getattr(norm, column)) for norm in self.norms) for column in ("name", "outcome")]
        rows = [f"{n.name:<{widths[0]}}  {n.outcome:<{widths[1]}}  {n.detail}".rstrip() for n in self.norms]
        counts = ", ".join(f"{self.count(outcome)} {outcome}" for outcome in ("fused", "alone", "left"))
        return "\n".join([*rows, f"{len(self.norms)} instance norms: {counts}"])


def accelerate(model: nn.Module, *, undo: bool = False) -> Any:  # the model itself, with `accelerated` on it
    """Fuse every InstanceNorm1d, 2d, 3d of model with the PReLU, LeakyReLU or ReLU that follows it, in place.

        model = fastenc.accelerate(model)
        print(model.accelerated)             # a line for each norm: fused with what, or why not
        fastenc.accelerate(model, undo=True)

    The modules get other classes, of the same names, and nothing else: parameters, keys of the state dict, hooks,
    copies and pickles stay as they were, and so do the numbers. What leads from norm to activation is read off a trace
    of the forward; dropout and Identity in between are no obstacle, nor is the addition, by + or +=, of a residual. A
    norm with no activation behind it runs as the kernel alone. On CUDA, volumes are laid out channels-last as they
    enter the model. Whatever the kernels do not cover (`fastenc.explain(model, x)` says what, and why) runs as it did
    before, and so does everything under tracers. Under torch.compile and torch.export a pair is one operator where the
    two are in an nn.Sequential, as in nnU-Net's ConvDropoutNormReLU and MONAI's ADN, and runs as before elsewhere.
    Repeating the call looks anew.

    Where the forward calls view on a volume, which a channels-last one refuses, a warning says so, and that call starts
    over on contiguous volumes, as do all that follow (RuntimeError where running statistics would count it twice, and
    under torch.compile before any other call). What lies between norm and activation has a gradient of its own
    only for who asks right behind the norm (register_hook, retain_grad); torch.autograd.grad finds none there. A model
    that writes over its input writes over the channels-last copy, not over what the caller gave.

    Args:
        model: any nn.Module.
        undo: give the modules their own classes back instead.

    Returns:
        model itself. Its attribute `accelerated` is a `Summary`.

    Raises:
        TypeError: model is no nn.Module, or a ScriptModule.
        ValueError: model, or a module in it, was compiled already or has parameters on the meta device.
    """
    _check(model)
    for module in model.modules():
        restore(module)
        for attribute in ("accelerated", KEEPS_CONTIGUOUS):
            vars(module).pop(attribute, None)
    if not undo:
        vars(model)["accelerated"] = Summary(tuple(_accelerate(model)))
    return model


def _check(model: Any) -> None:
    """Raise where model is nothing that can be accelerated, saying why."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose code is fixed: accelerate the module that it was made from")
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if (compiler is not None and isinstance(module, compiler.OptimizedModule)) or (
            getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise ValueError(f"{where} is compiled already: accelerate the model that was compiled, before compiling")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"model.{name} is on the meta device: load the parameters first, then accelerate")


def _accelerate(model: nn.Module) -> Iterator[NormOutcome]:
    """Swap the classes; what became of each norm."""
    from .pairs import find

    names = {module: name for name, module in model.named_modules()}
    units = [module for module in names if isinstance(module, (_ConvModernNd, _InstanceNormActNd))]
    own = {inner for unit in units for inner in unit.modules()}
    norms = [module for module in names if isinstance(module, INSTANCE_NORMS)]
    left = {norm: reason for norm in norms if (reason := _why_left(norm, own))}
    found = find(model, {norm for norm in norms if norm not in left})
    for norm in norms:
        if norm in left:
            yield NormOutcome(names[norm], "left", left[norm])
            continue
        why = "; ".join(dict.fromkeys(found.why.get(norm, ())))
        partners = " or ".join(f"{names[m]} ({type(m).__name__})" for m in found.partners.get(norm, ()))
        if norm in found.boxes:
            why = f"if they meet: the forward of {type(found.boxes[norm]).__name__} cannot be traced"
        if partners:
            yield NormOutcome(names[norm], "fused", f"with {partners}" + (f"; {why}" if why else ""))
        else:
            yield NormOutcome(names[norm], "alone", why or "no call of it was seen")
        swap(PairedNorm if partners else LoneNorm, norm)
    if len(left) == len(norms):
        return
    for activation in {partner for partners in found.partners.values() for partner in partners}:
        swap(Activation, activation)
    for dropout in found.dropouts:
        swap(Dropout, dropout)
    for scope in found.scopes - {model}:
        swap(scope_of(scope, root=False), scope)
    if model not in norms:
        swap(scope_of(model, root=True), model)


def _why_left(norm: nn.Module, own: set[nn.Module]) -> str | None:
    """Why norm, an InstanceNorm, is not touched."""
    if norm in own:
        return "it is in one of fastenc's own units, which fuse already"
    if type(norm) not in INSTANCE_NORMS:
        return f"it is a {type(norm).__name__} of {type(norm).__module__}, not one of torch's own InstanceNorms"
    if "forward" in vars(norm):
        return "its forward was replaced"
    return why_not_plain(norm)
