"""A peer of `ops`: cuDNN's own instance normalisation, by nvidia-cudnn-frontend's graph API, ahead of torch's PReLU.

Not run on a GPU yet; a test runs it against a stand-in for the package. A graph that cuDNN refuses is a row that says
so, and one whose numbers disagree is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.record import Workload

Define = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]
_graphs: dict[tuple[Any, ...], tuple[Any, Any, Any, Tensor]] = {}


def absent(workload: Workload, device: torch.device) -> str | None:
    """Why there is no such peer here."""
    if device.type != "cuda":
        return "cuDNN needs a CUDA GPU"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return None


def instance_norm_prelu(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """PReLU, by torch, of cuDNN's normalisation and a residual. x and residual (N, C, *spatial), dense in either
    layout; the others (C,)."""
    z = _InstanceNorm.apply(x, weight, bias, eps)
    return F.prelu(z if residual is None else z + residual, slope)


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        scale, shift = (_per_channel(parameter, x) for parameter in (weight, bias))
        epsilon = torch.full((1,) * x.dim(), eps)  # cuDNN takes it from the host

        def define(cudnn: Any, graph: Any, inputs: Sequence[Any]) -> Sequence[Any]:
            phase = cudnn.norm_forward_phase.TRAINING
            x, scale, shift, epsilon = inputs
            return graph.instancenorm(
                name="norm", norm_forward_phase=phase, input=x, scale=scale, bias=shift, epsilon=epsilon
            )

        statistics = x.new_empty((*x.shape[:2], *(1,) * (x.dim() - 2)), dtype=torch.float32)
        outputs = torch.empty_like(x), statistics, torch.empty_like(statistics)
        y, mean, rstd = _run(define, (x, scale, shift, epsilon), outputs)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        scale = _per_channel(weight, x)

        def define(cudnn: Any, graph: Any, inputs: Sequence[Any]) -> Sequence[Any]:
            dy, x, scale, mean, rstd = inputs
            return graph.instancenorm_backward(
                name="gradients", grad=dy, input=x, scale=scale, mean=mean, inv_variance=rstd
            )

        dy = torch.empty_like(x).copy_(grad_outputs[0])
        outputs = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        dx, dscale, dshift = _run(define, (dy, x, scale, mean, rstd), outputs)
        return dx, dscale.flatten().to(weight.dtype), dshift.flatten().to(bias.dtype), None


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter (C,) in float32 as (1, C, 1, …), which cuDNN wants."""
    return parameter.detach().float().view(1, -1, *(1,) * (x.dim() - 2))


def _run(define: Define, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The graph that `define` makes of inputs, run into outputs; built once for tensors of one kind."""
    tensors = (*inputs, *outputs)
    key = (define.__qualname__, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors))
    if key not in _graphs:
        _graphs[key] = _build(define, inputs, outputs)
    graph, given, made, workspace = _graphs[key]
    graph.execute(dict(zip((*given, *made), tensors, strict=True)), workspace)
    return outputs


def _build(define: Define, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Any, Any, Any, Tensor]:
    cudnn = importlib.import_module("cudnn")
    types = cudnn.data_type
    kinds = {torch.float32: types.FLOAT, torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}
    graph = cudnn.pygraph(intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT)
    given = [graph.tensor_like(tensor) for tensor in inputs]
    made = define(cudnn, graph, given)
    for node, tensor in zip(made, outputs, strict=True):
        node.set_output(True).set_data_type(kinds[tensor.dtype])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, given, made, torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=outputs[0].device)
