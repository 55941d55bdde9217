"""`explain`: the route that each unit of a network, or each accelerated norm, takes for an input, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from . import route
from .fusion.modules import FusedNorm
from .layers import _ConvModernNd
from .norm_act import _InstanceNormActNd


@dataclass(frozen=True, slots=True)
class UnitRoute:
    """One call of one unit: its name in the model, its input's shape, "triton" or "eager", and the reason for "eager".

    recompute: whether the unit is set to recompute its activated tensor in the backward.
    """

    name: str
    shape: tuple[int, ...]
    route: str
    reason: str | None
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """The result of `explain`: one `UnitRoute` per call, in order of execution. Iterate over it, or print it."""

    units: tuple[UnitRoute, ...]

    def __iter__(self) -> Iterator[UnitRoute]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        if not self.units:
            return "no fusible layer was called"
        cells = [(unit.name, "x".join(map(str, unit.shape)), unit.route, unit.reason or "") for unit in self.units]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        fused = sum(unit.route == "triton" for unit in self.units)
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        rows.append(f"{fused} of {len(cells)} units take the Triton route")
        idle = sum(unit.recompute and unit.route == "eager" for unit in self.units)
        return "\n".join([*rows, *([f"recompute has no effect on the eager route ({idle} units)"] if idle else [])])


def explain(model: nn.Module, *arguments: Any, **keywords: Any) -> Explanation:
    """The route of each unit, and of each accelerated norm, that `model(*arguments, **keywords)` calls, and why.

        print(fastenc.explain(net, x))

    The model runs once, without gradients, on the eager route and on copies of its buffers. Each unit is asked when it
    is called.

    Args:
        model: any nn.Module.
        arguments, keywords: what the model is called with.

    Returns:
        An `Explanation` with one `UnitRoute` for each call of a unit.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: list[UnitRoute] = []
    chosen = route.chosen()

    def ask(name: str, unit: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen = (*given, *named.values())[0]
        mine = unit._forward_pre_hooks.pop(hooks[name].id)  # this hook itself would be a reason
        try:
            with route.Block(chosen):
                forward = vars(unit).get("forward")
                reason = (forward if isinstance(forward, FusedNorm) else unit).why_eager(seen)
        finally:
            unit._forward_pre_hooks[hooks[name].id] = mine
        shape = tuple(getattr(seen, "shape", ()))
        found.append(
            UnitRoute(name, shape, "triton" if reason is None else "eager", reason, getattr(unit, "recompute", False))
        )

    units: list[tuple[str, Any]] = [
        (name, unit)
        for name, unit in model.named_modules()
        if isinstance(unit, (_ConvModernNd, _InstanceNormActNd)) or isinstance(vars(unit).get("forward"), FusedNorm)
    ]
    hooks = {name: unit.register_forward_pre_hook(partial(ask, name), with_kwargs=True) for name, unit in units}
    try:
        with torch.no_grad(), route.Block("eager"):
            functional_call(
                model, {name: buffer.clone() for name, buffer in model.named_buffers()}, arguments, keywords
            )
    finally:
        for hook in hooks.values():
            hook.remove()
    return Explanation(tuple(found))
