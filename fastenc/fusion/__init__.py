"""Third-party models: norm–activation pairs fused in place, by `accelerate`. Search → swap → defer → fall back.

Search (`search.py`). torch.fx traces the forward of the model, in training and in evaluation. From the trace it reads
which norms lead to an activation, through which modules, and which module calls both: their scope. A module that cannot
be traced is a black box, and its children are searched one by one. The search decides where a norm may wait. It cannot
make a result wrong.

Swap (`modules.py`, `convolutions.py`). Norms, activations, dropouts, scopes and some convolutions get a `forward`
attribute on the instance, and nothing else about them changes. `restore` removes it.

Defer (`deferred.py`, `pending.py`, `unbiased.py`). While a scope runs, its norms return a `Deferred`: a tensor without
memory that knows how to compute z = norm(x). The activation computes PReLU(z), or PReLU(z + residual), in one kernel.
Any other consumer gets z. While a graph is traced, a `Pending` replaces the `Deferred`. A convolution returns
an `Unbiased` if the norm that reads it cancels its bias.

Fall back. On the eager route, with hooks, replaced forwards, tracers and whatever the kernels do not support, each
module does what torch.nn does. The decision is made in each call, by `route.reason`, `route.hook_reason` and
`functional.is_supported`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers import _ConvModernNd
from ..norm_act import _InstanceNormActNd
from ..pair import DROPOUTS, INSTANCE_NORMS, why_not_plain
from .convolutions import Convolution, has_free_strides
from .modules import Activation, DeferredNorm, Dropout, Forward, FusedNorm, FusionScope, ModelRoot, TracedScope, restore

if TYPE_CHECKING:
    from .search import Found, Way  # torch.fx, which is slow to import

SUMMARY = "_fastenc_summary"  # holds the summary of a model that has an attribute `accelerated` of its own


@dataclass(frozen=True, slots=True)
class NormOutcome:
    """The outcome for one norm: "fused" with an activation, the kernel "alone", or "left" as it was, with the reason.

    biases: the convolutions before it that run without their bias, which it cancels.
    """

    name: str
    outcome: str
    detail: str
    biases: tuple[str, ...] = ()


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

    @property
    def biases(self) -> tuple[str, ...]:
        """The convolutions that run without their bias."""
        return tuple(dict.fromkeys(name for norm in self.norms for name in norm.biases))

    def __str__(self) -> str:
        if not self.norms:
            return "no InstanceNorm1d, 2d or 3d in this model: nothing to accelerate"
        widths = [max(len(getattr(norm, column)) for norm in self.norms) for column in ("name", "outcome")]
        rows = []
        for n in self.norms:
            detail = "; ".join((*filter(None, [n.detail]), *(f"{name} runs without its bias" for name in n.biases)))
            rows.append(f"{n.name:<{widths[0]}}  {n.outcome:<{widths[1]}}  {detail}".rstrip())
        counts = ", ".join(f"{self.count(outcome)} {outcome}" for outcome in ("fused", "alone", "left"))
        return "\n".join([*rows, f"{len(self.norms)} instance norms: {counts}; {len(self.biases)} biases left out"])


def accelerate(model: nn.Module, *, undo: bool = False) -> Any:  # the model itself, with `accelerated` on it
    """Fuse every InstanceNorm1d, 2d, 3d of model with the PReLU, LeakyReLU or ReLU that follows it, in place.

        model = fastenc.accelerate(model)
        print(model.accelerated)             # a line for each norm: fused with what, or why not
        fastenc.accelerate(model, undo=True)

    Each of these modules gets a `forward` of its own, as an attribute. Its class, parameters, hooks and state-dict keys
    stay as they were, and so do the numbers. Copies, pickles and nn.DataParallel's replicas are accelerated too.

    Pairs are found by tracing the forward. Dropout, Identity and a residual addition (`+` or `+=`) between the norm and
    its activation are supported. A norm without an activation runs as the kernel alone. A convolution whose output only
    a norm reads runs without its bias, which the norm cancels; the gradient of the bias is exact zeros. On CUDA,
    tensors with two or more spatial axes are converted to channels-last when they enter the model. Whatever the kernels
    do not support runs as before; `fastenc.explain(model, x)` gives the reason. So does everything under tracers. Under
    torch.compile and torch.export, a pair is one operator if the search has proven that nothing else sees the norm's
    output; other pairs run as before. Calling accelerate again re-analyses the model. After an error the model is as it
    was.

    What differs from the original model:

    - A forward that calls view on a channels-last tensor fails. A warning says so, and this call and all later ones run
      on contiguous tensors. RuntimeError is raised where running statistics would count the repeated call twice, and
      under torch.compile before any other call.
    - To see the gradient of a norm's output, call register_hook or retain_grad on it immediately after the norm.
      Otherwise the tensor is fused away and torch.autograd.grad cannot reach it.
    - RuntimeError is raised if a norm's input, weight, bias or residual is changed in place before its output is used.
      Under torch.inference_mode the model therefore runs in torch.no_grad, so its outputs are ordinary tensors, and a
      tensor that was made in inference mode before the call cannot be changed in place during the first call.
    - A model that writes over its input writes over the channels-last copy, not over the caller's tensor.
    - Under torch.compile, changes in place between norm and activation are known from the search alone. If you change a
      forward so that it changes a norm's input there, accelerate again before compiling.
    - A custom autograd.Function and torch.func.vmap read a convolution's output without the bias that is left out. The
      search keeps the bias where it sees one. If you add one to a forward later, accelerate again.
    - A ReLU after the addition of a residual of −inf is NaN (0 · ∞), where torch.relu is 0.
    - A hook on a module that a norm's output leaves before its activation keeps the two from being fused.
    - Each of these modules is part of a reference cycle, so a deleted model is freed by Python's garbage collector.
    - A module whose class defines `__reduce_ex__` itself is pickled by that; copy.copy of it shares the forward.
    - torch.jit.script raises RuntimeError. torch.compile of an nn.Sequential does not survive undo with fullgraph=True.

    Args:
        model: any nn.Module.
        undo: give the modules their own forwards back instead.

    Returns:
        model itself. Its attribute `accelerated` is a `Summary`; where model has an attribute of this name, it is
        `_fastenc_summary` instead.

    Raises:
        TypeError: model is no nn.Module, or a ScriptModule.
        ValueError: model, or a module in it, was compiled already or has parameters on the meta device.
    """
    _check(model)
    summary, forwards = _planned(model) if not undo else (None, [])
    before = [(module, vars(module).copy()) for module in model.modules()]
    try:
        for module, own in before:
            restore(module)
            for name in (SUMMARY, *(["accelerated"] if isinstance(own.get("accelerated"), Summary) else [])):
                vars(module).pop(name, None)
        for forward in forwards:
            forward.install()
        if summary is not None:
            vars(model).update({SUMMARY: summary} if hasattr(model, "accelerated") else {"accelerated": summary})
    except BaseException:  # also a KeyboardInterrupt
        for module, own in before:
            vars(module).clear()
            vars(module).update(own)
        raise
    return model


def _check(model: Any) -> None:
    """Raise if model cannot be accelerated."""
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


def _planned(model: nn.Module) -> tuple[Summary, list[Forward]]:
    """The outcome of each norm, and the forwards to install. Changes nothing."""
    from .search import find, own_forward

    names = {module: name for name, module in model.named_modules()}
    own = {
        inner for layer in names if isinstance(layer, (_ConvModernNd, _InstanceNormActNd)) for inner in layer.modules()
    }
    norms = {norm: _why_left(norm, own, own_forward(norm)) for norm in names if isinstance(norm, INSTANCE_NORMS)}
    found = find(model, {norm for norm, why_left in norms.items() if why_left is None})
    changeable = {module for module in names if module not in own and not own_forward(module)}
    cancelled = [way for way in found.cancelled if way.start in changeable - found.kept]
    summary = Summary(tuple(_outcome(norm, why_left, found, cancelled, names) for norm, why_left in norms.items()))

    fused = {way.start for way in found.ways}
    forwards: list[Forward] = [
        DeferredNorm(norm, name=names[norm]) if norm in fused else FusedNorm(norm)
        for norm, why_left in norms.items()
        if why_left is None
    ]
    if not forwards:
        return summary, []
    ends = dict.fromkeys(way.end for way in found.ways)
    forwards += [Activation(end) for end in ends if isinstance(end, nn.Module)]
    between = dict.fromkeys(module for way in (*found.ways, *found.cancelled) for module in way.between)
    forwards += [Dropout(module) for module in between if type(module) in DROPOUTS and not own_forward(module)]
    without_bias = {way.start: names[way.start] for way in cancelled}
    forwards += [
        Convolution(module, cancelled=without_bias.get(module, ""), mends=has_free_strides(module))
        for module in names
        if module in changeable and (module in without_bias or has_free_strides(module))
    ]
    return summary, [*forwards, *_scopes(model, found, cancelled, names)]


def _outcome(
    norm: nn.Module, why_left: str | None, found: Found, cancelled: list[Way], names: dict[nn.Module, str]
) -> NormOutcome:
    """The outcome for norm. why_left: the reason why it is left as it is, or None."""
    if why_left is not None:
        return NormOutcome(names[norm], "left", why_left)
    why = "; ".join(dict.fromkeys(found.why.get(norm, ())))
    if norm in found.boxes:
        why = f"if they meet: the forward of {type(found.boxes[norm]).__name__} cannot be traced"
    biases = tuple(dict.fromkeys(names[way.start] for way in cancelled if way.end is norm))
    ends = dict.fromkeys(way.end for way in found.ways if way.start is norm)
    if not ends:
        return NormOutcome(names[norm], "alone", why or "no call of it was seen", biases)
    partners = " or ".join(
        f"{end} (a function)" if isinstance(end, str) else f"{names[end]} ({type(end).__name__})" for end in ends
    )
    return NormOutcome(names[norm], "fused", f"with {partners}" + (f"; {why}" if why else ""), biases)


def _scopes(model: nn.Module, found: Found, cancelled: list[Way], names: dict[nn.Module, str]) -> list[Forward]:
    """The forwards of the modules whose own forward calls both ends of a way, and of the model itself."""
    scopes = {way.scope()[0] for way in found.ways} | ({model} if not isinstance(model, INSTANCE_NORMS) else set())
    # By scope and module, the names of norms and convolutions, for `FusionScope`.
    between: dict[nn.Module, dict[nn.Module, dict[str, None]]] = {scope: defaultdict(dict) for scope in scopes}
    proven: dict[nn.Module, dict[nn.Module, dict[str, None]]] = {}
    for way in (*found.ways, *cancelled):
        scope, callers = way.scope(scopes)
        # An activation or dropout on the way of a norm checks its own hooks.
        for module in (*way.modules[1:], *callers) if isinstance(way.end, INSTANCE_NORMS) else callers:
            between.setdefault(scope, defaultdict(dict))[module][names[way.start]] = None
        if way.start not in found.unproven:
            scope, callers = way.scope()
            for module in (*way.modules, *callers):
                proven.setdefault(scope, defaultdict(dict))[module][names[way.start]] = None
    forwards: list[Forward] = []
    for scope in dict.fromkeys((*between, *proven)):
        kind = ModelRoot if scope is model else FusionScope if scope in between else TracedScope
        tables = (table.get(scope, {}).items() for table in (between, proven))
        first, second = (tuple((module, tuple(inside)) for module, inside in table) for table in tables)
        forwards.append(kind(scope, between=first, proven=second))
    return forwards


def _why_left(norm: nn.Module, own: set[nn.Module], replaced: bool) -> str | None:
    """Why norm, an InstanceNorm, is left as it is, or None."""
    if norm in own:
        return "it is in one of fastenc's own units, which fuse already"
    if type(norm) not in INSTANCE_NORMS:
        return f"it is a {type(norm).__name__} of {type(norm).__module__}, not one of torch's own InstanceNorms"
    if replaced:
        return "its forward was replaced"
    return why_not_plain(norm)
