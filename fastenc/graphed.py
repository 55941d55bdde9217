"""`graphed`: inference replayed from a CUDA graph, for networks whose kernels are shorter than their launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import tree_flatten, tree_leaves, tree_map_only
from .frozen import ForInference, freeze

WARM_UP_CALLS = 3  # as in torch's documentation of CUDA graphs


class Graphed(ForInference):
    """A frozen model replayed from a CUDA graph, called like the model. Made by `graphed`.

    A call copies its arguments in, replays the graph and copies the output out. With borrow=True the output is the
    graph's own memory, which the next call overwrites. The graph serves arguments of the sample's structure, whose
    tensors have the sample's shape, dtype and device, and whose other values are equal. Any other call runs without the
    graph. All calls share its memory, so make one at a time, on one stream. `refresh()` copies the model's weights
    again.
    """

    @torch.inference_mode(False)  # the inputs are written to at every call, in inference mode or not
    @torch.no_grad()
    def __init__(
        self, model: nn.Module, arguments: Sequence[Any], keywords: dict[str, Any], dtype: torch.dtype | None,
        borrow: bool,
    ) -> None:  # fmt: skip
        self._frozen, self._dtype, self._borrow = freeze(model, dtype), dtype, borrow
        self._arguments, self._keywords = tree_map_only(
            Tensor, lambda x: x.detach().clone(), (tuple(arguments), keywords)
        )
        self._inputs, self._structure = tree_flatten((self._arguments, self._keywords))
        self._record()

    @property
    def model(self) -> nn.Module:
        """The model from which the weights were copied."""
        return self._frozen.model

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The output of the frozen model."""
        given, structure = tree_flatten((arguments, keywords))
        if structure != self._structure or not all(map(_alike, given, self._inputs)):
            return self._frozen(*arguments, **keywords)
        with torch.no_grad():
            for value, own in zip(given, self._inputs, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(value)
            self._replay()
            return self._output if self._borrow else tree_map_only(Tensor, Tensor.clone, self._output)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> bool:
        """Copy the model's weights and buffers again, into the memory that the graph reads.

        Returns:
            True if that was enough. False if the graph was recorded again, for the reasons of `Frozen.refresh`.
        """
        enough = self._frozen.refresh()
        if not enough:
            self._record()
        return enough

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphed, (self.model, self._arguments, self._keywords, self._dtype, self._borrow)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(value.shape)) for value in self._inputs if isinstance(value, Tensor))
        return f"Graphed({type(self.model).__name__}, dtype={self._dtype}, shapes=[{shapes}])"

    def _record(self) -> None:
        device = _tensors(self._inputs)[0].device
        try:
            self._replay, self._output = record(lambda: self._frozen(*self._arguments, **self._keywords), device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the model could not be captured in a CUDA graph ({error}); it is as it was: "
                "fastenc.freeze(model) runs it without one"
            ) from error


def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture run() in a CUDA graph. Returns a function that replays it, and the output that each replay writes."""
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


def graphed(
    model: nn.Module,
    sample: Any,
    dtype: torch.dtype | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    borrow: bool = False,
) -> Graphed:
    """`freeze(model, dtype)`, replayed from a CUDA graph for arguments like `sample`.

        fast = fastenc.graphed(net.eval(), x)
        y = fast(x)

    It pays if launches take longer than kernels, which is so for small batches. Besides the frozen weights, the graph
    holds its inputs, one output and the tensors in between.

    Args:
        model: in eval mode, on the GPU.
        sample: the model's argument, a tensor, or a tuple of its arguments, of the shape, dtype and device that the
            graph is for. The numbers in tensors do not matter.
        dtype: as for `freeze`.
        keywords: the model's keyword arguments, if it takes any.
        borrow: return the graph's own output, valid until the next call, instead of a copy.

    Raises:
        TypeError: model is not an nn.Module, or sample is neither a tensor nor a tuple.
        ValueError: model is in training mode; no argument is a tensor; a tensor requires a gradient or is not on CUDA.
        RuntimeError: the model cannot be captured. It stays usable.
    """
    if not isinstance(sample, (Tensor, tuple)):
        raise TypeError(f"sample must be a torch.Tensor, or a tuple of arguments, got {type(sample).__name__}")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model is in training mode and a graph is for inference; call model.eval() first")
    arguments = sample if isinstance(sample, tuple) else (sample,)
    tensors = _tensors((arguments, dict(keywords or {})))
    if not tensors:
        raise ValueError("sample holds no tensor, so there is nothing to replay a graph for")
    if any(tensor.requires_grad for tensor in tensors):
        raise ValueError("sample requires a gradient, which a replayed graph cannot give; pass sample.detach()")
    if elsewhere := [str(tensor.device) for tensor in tensors if not tensor.is_cuda]:
        raise ValueError(
            f"sample must be on a CUDA device, got {elsewhere[0]}; elsewhere use fastenc.freeze, which needs no graph"
        )
    return Graphed(model, arguments, dict(keywords or {}), dtype, borrow)


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _alike(given: Any, own: Any) -> bool:
    """Whether a graph that was recorded with own serves given."""
    if isinstance(own, Tensor):
        return (
            isinstance(given, Tensor)
            and given.shape == own.shape and given.dtype == own.dtype and given.device == own.device
        )  # fmt: skip
    return given is own or (type(given) is type(own) and (given == own) is True)  # an array equals element by element
