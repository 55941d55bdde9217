"""PyTorch's own sample inputs of its norms and activations, composed into calls of the fused operation and into layers.

They come from torch.testing._internal, which needs the package expecttest: nothing of it is imported before it is asked
for, so that this module can be imported without.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastenc

NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "nn.functional.instance_norm")
ACTIVATIONS = ("PReLU", "LeakyReLU", "nn.functional.prelu", "nn.functional.leaky_relu")
SOURCES = (*NORMS, *ACTIVATIONS[:3])  # of inputs that have positions
LAYERS = {3: fastenc.ConvModern1d, 4: fastenc.ConvModern2d, 5: fastenc.ConvModern3d}  # by the axes of x


@cache
def information() -> dict[str, Any]:
    """The entries of module_db and of op_db by their names."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    modules = {entry.module_cls.__name__: entry for entry in module_db}
    return {**modules, **{entry.name: entry for entry in op_db if entry.name in NORMS + ACTIVATIONS}}


def modules(name: str, device: str, dtype: torch.dtype, training: bool = True) -> Iterator[tuple[nn.Module, Tensor]]:
    """The module of each sample, and its input."""
    entry = information()[name]
    options = {"device": device, "dtype": dtype, "requires_grad": False, "training": training}
    for sample in entry.module_inputs_func(entry, **options):
        arguments = sample.constructor_input
        module = entry.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
        yield module, sample.forward_input.args[0]


@dataclass(frozen=True)
class Norm:
    """A sample of instance normalisation; `torchs` is PyTorch's own, on these very weight and bias."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    torchs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """A sample of PReLU or LeakyReLU; `torchs` is PyTorch's own, with this very slope."""

    x: Tensor
    slope: Tensor | float
    torchs: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of instance_norm_prelu, and PyTorch's own composition on them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | float
    eps: float
    torchs: Callable[[Tensor], Tensor]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.bias, self.slope, self.eps

    @property
    def leaves(self) -> list[Tensor]:
        return [value for value in self.arguments if isinstance(value, Tensor)]


def norms(name: str, device: str, dtype: torch.dtype) -> Iterator[Norm]:
    """The samples of a norm; or the inputs of an activation, where they have positions, normed without parameters."""
    if name in ACTIVATIONS:
        inputs = [sample.x for sample in activations(name, device, dtype)]
        yield from (Norm(x, None, None, 1e-5, F.instance_norm) for x in inputs if x.dim() > 2 and x.numel())
    elif name.startswith("nn.functional"):
        entry = information()[name]
        for sample in entry.sample_inputs(device, dtype, requires_grad=True):
            options = sample.kwargs
            weight, bias, eps = options.get("weight"), options.get("bias"), options.get("eps", 1e-5)
            yield Norm(sample.input, weight, bias, eps, lambda x, options=options: entry.op(x, **options))
    else:
        axes = 2 + int(name[-2])
        for module, x in modules(name, device, dtype):
            batched = x if x.dim() == axes else x[None]
            yield Norm(batched.requires_grad_(), module.weight, module.bias, module.eps, module)


def activations(name: str, device: str, dtype: torch.dtype) -> Iterator[Activation]:
    """The samples of an activation."""
    if not name.startswith("nn.functional"):
        for module, x in modules(name, device, dtype):
            slope = module.weight if isinstance(module, nn.PReLU) else module.negative_slope
            yield Activation(x.requires_grad_(), slope, module)
        return
    entry = information()[name]
    for sample in entry.sample_inputs(device, dtype, requires_grad=True):
        args, options = sample.args, sample.kwargs
        slope = options["weight"] if "weight" in options else args[0] if args else 0.01
        yield Activation(sample.input, slope, lambda z, args=args, options=options: entry.op(z, *args, **options))


def calls(name: str, device: str, dtype: torch.dtype) -> Iterator[Call]:
    """Every sample of the source `name` under every slope that fits: one of each length, and each number."""
    slopes = {
        tuple(sample.slope.shape) if isinstance(sample.slope, Tensor) else sample.slope: sample
        for activation in ACTIVATIONS
        for sample in activations(activation, device, dtype)
    }
    for norm in norms(name, device, dtype):
        fitting = (1,), (norm.x.shape[1],)
        for kind, activation in slopes.items():
            if isinstance(kind, float) or kind in fitting:

                def composed(x: Tensor, norm: Norm = norm, activation: Activation = activation) -> Tensor:
                    return activation.torchs(norm.torchs(x))

                yield Call(norm.x, norm.weight, norm.bias, activation.slope, norm.eps, composed)


def distinct_calls(name: str, device: str, dtype: torch.dtype) -> list[Call]:
    """Of `calls` one for each combination of shapes and numbers: modules with and without statistics call alike."""
    alike = {str([getattr(v, "shape", v) for v in call.arguments]): call for call in calls(name, device, dtype)}
    return list(alike.values())


def layers(name: str, device: str, dtype: torch.dtype, training: bool) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
    """A ConvModern whose norm and activation are modules of the samples, its twin in plain torch.nn, and an input."""
    kinds = {repr(module): module for kind in ACTIVATIONS[:2] for module, _ in modules(kind, device, dtype)}
    for norm, x in modules(name, device, dtype, training):
        for activation in kinds.values():
            layer = LAYERS[2 + int(name[-2])](norm.num_features, 2).to(device, dtype).train(training)
            layer.mconv[0], layer.mconv[1] = copy.deepcopy(norm), copy.deepcopy(activation)
            yield layer, copy.deepcopy(layer.mconv), x


def outcome(module: nn.Module, x: Tensor) -> list[Tensor] | type[Exception]:
    """Output, gradients of x and of the parameters, and the buffers afterwards; or what was raised."""
    leaf = x.detach().clone().requires_grad_()
    try:
        y = module(leaf)
    except Exception as error:
        return type(error)
    gradients = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
    return [y.detach(), *gradients, *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
