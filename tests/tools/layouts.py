"""The layouts of EncoderNet3d on a GPU, from fake CUDA tensors: torch's CUDA build, without a GPU.

torch chooses the layout of a fake convolution's output as it does on a GPU with cuDNN. The launches are replaced by
outputs of the layout that they promise. Only the forward can run: torch's backward asks the GPU itself. Autocast is to
float16, because for bfloat16 torch asks the GPU whether its cuDNN takes it. Exit status 1 if a convolution sees a
tensor that is not channels-last, or if a tensor is copied, apart from the network's input.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastenc
from fastenc import route

N, LAST, CUDA = 2, torch.channels_last_3d, torch.device("cuda", 0)
NETWORKS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"channel": 64, "layers": [3, 3, 3, 3, 3], "in_planes": 3, "out_length": 32}, (31, 32, 30)),
    ({"channel": 32, "layers": [2, 2, 2, 2, 2], "in_planes": 1, "out_length": 2}, (128, 128, 128)),
)
COPIES = ("aten.clone.default", "aten._to_copy.default", "aten.copy_.default", "aten.contiguous.default")


class Seen(TorchDispatchMode):
    """The convolutions, and the shapes of the tensors that they were given in another layout or that were copied."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0
        self.wrong: list[tuple[str, tuple[int, ...]]] = []
        self.copied: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        maps = [each for each in (*args, *outputs) if isinstance(each, Tensor) and each.dim() == 5 and len(each) == N]
        if name == "aten.convolution.default":
            self.convolutions += 1
            self.wrong += [(name, tuple(each.shape)) for each in maps if not each.is_contiguous(memory_format=LAST)]
        elif name in COPIES:
            self.copied += [tuple(each.shape) for each in maps[-1:]]
        return result


def _forward(
    x: Tensor, weight: Any, bias: Any, slope: Any, eps: float, dtype: Any = None, in_place: bool = False,
    statistics: Any = None, residual: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x if in_place and dtype in (None, x.dtype) else torch.empty_like(x, dtype=dtype)
    return y, x.new_empty((2, x.shape[0] * x.shape[1]), dtype=torch.float32)


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Fake tensors take the Triton route, without launches."""
    with ExitStack() as stack:
        for target, name, value in (
            (route, "tracing_reason", lambda x: None),
            (route, "device_reason", lambda x: None),
            (fastenc.functional, "launchers", lambda: (_forward, None)),
            (fastenc.recompute, "launchers", lambda: (_forward, None)),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def examine(arguments: dict[str, Any], size: tuple[int, ...], autocast: bool, mode: str) -> str | None:
    """Run one network; say what is wrong, or None."""
    seen, shape = Seen(), (N, arguments["in_planes"], *size)
    with on_a_gpu(), FakeTensorMode():
        with CUDA:
            net, x = fastenc.EncoderNet3d(**arguments), torch.empty(shape)
        net.recompute = mode == "recompute"
        with seen, torch.set_grad_enabled(mode != "inference"), torch.autocast("cuda", torch.float16, enabled=autocast):
            net(x)
    copied = [each for each in seen.copied if each != shape]
    if seen.convolutions < 2 + sum(arguments["layers"]):
        return f"{seen.convolutions} convolutions were seen"
    if seen.wrong or copied:
        return f"not channels-last {sorted(set(seen.wrong))}; copied {sorted(set(copied))}"
    return None


def main() -> int:
    """Examine every network in both precisions and every mode."""
    failed = checked = 0
    for arguments, size in NETWORKS:
        for autocast in (False, True):
            for mode in ("inference", "training", "recompute"):
                problem = examine(arguments, size, autocast, mode)
                checked += 1
                if problem is not None:
                    failed += 1
                    print(f"{size}, {'float16 autocast' if autocast else 'float32'}, {mode}: {problem}")
    print(f"{checked - failed} of {checked} networks are channels-last from stem to head, without a copy")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
