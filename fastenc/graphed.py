"""`graphed`: inference replayed from a CUDA graph, for networks whose kernels are shorter than their launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import tree_map_only
from .frozen import freeze

WARM_UP_CALLS = 3  # what torch's own documentation asks for before a capture


class Graphed:
    """A frozen model replayed from a CUDA graph, called like the model. Made by `graphed`.

    An input of the sample's shape, dtype and device is copied in, the graph is replayed, and the output is copied out,
    or, with borrow=True, is the graph's own memory, which the next call overwrites. Any other input runs ungraphed.
    Calls share that memory: one at a time, on one stream. `refresh()` takes the model's weights again.
    """

    @torch.inference_mode(False)  # the input is written to at every call, in inference mode or not
    @torch.no_grad()
    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype | None, borrow: bool) -> None:
        self._frozen, self._dtype, self._borrow = freeze(model, dtype), dtype, borrow
        self._input = sample.detach().clone()
        self._record()

    def __call__(self, x: Tensor) -> Any:
        """What the frozen model gives for x."""
        own = self._input
        if x.shape != own.shape or x.dtype != own.dtype or x.device != own.device:
            return self._frozen(x)
        with torch.no_grad():
            own.copy_(x)
            self._replay()
            return self._output if self._borrow else tree_map_only(Tensor, Tensor.clone, self._output)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights again. The graph is recorded again only if more than its numbers has changed."""
        if not self._frozen.refresh():
            self._record()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self._frozen.model, self._input, self._dtype, self._borrow)

    def _record(self) -> None:
        try:
            self._replay, self._output = record(lambda: self._frozen(self._input), self._input.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the model could not be captured in a CUDA graph ({error}); it is as it was: "
                "fastenc.freeze(model) runs it without one"
            ) from error


def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture run() in a CUDA graph; returns what replays it and the output that each replay writes."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                run()
            with synchronizing_raises():
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
    return graph.replay, output


@contextmanager
def synchronizing_raises() -> Iterator[None]:
    """Any synchronizing call in this block raises RuntimeError, as it would inside a capture.

    Checking before the capture matters: a failed capture can leave torch's allocator and random generators in the
    capturing state (pytorch/pytorch issues 171263, 188439).
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype, which may miss some operations
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(model: nn.Module, sample: Tensor, dtype: torch.dtype | None = None, *, borrow: bool = False) -> Graphed:
    """`freeze(model, dtype)`, replayed from a CUDA graph for inputs like `sample`.

    Pays where the launches take longer than the kernels: small batches. The graph holds one input, one output and the
    volumes between them, beside the frozen weights.

    Args:
        model: in eval mode, on the GPU.
        sample: an input of the shape, dtype and device that the graph is for; its numbers do not matter.
        dtype: as for `freeze`.
        borrow: return the graph's own output, valid until the next call, instead of a copy.

    Raises:
        TypeError: model is no nn.Module, sample no tensor.
        ValueError: model is in training mode; sample requires a gradient or is not on a CUDA device.
        RuntimeError: the model cannot be captured; it stays usable.
    """
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a torch.Tensor, got {type(sample).__name__}")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model is in training mode and a graph is for inference; call model.eval() first")
    if sample.requires_grad:
        raise ValueError("sample requires a gradient, which a replayed graph cannot give; pass sample.detach()")
    if not sample.is_cuda:
        raise ValueError(
            f"sample must be on a CUDA device, got {sample.device}; elsewhere use fastenc.freeze, which needs no graph"
        )
    return Graphed(model, sample, dtype, borrow)


def _remade(model: nn.Module, sample: Tensor, dtype: torch.dtype | None, borrow: bool) -> Graphed:
    return graphed(model, sample, dtype, borrow=borrow)
