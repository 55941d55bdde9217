"""A GPU that is not here: CPU tensors taken for CUDA ones, and triton's driver in the test's hands.

Kernels are compiled by triton itself. A launch does what the test says, or nothing.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.driver import driver

import fastenc
from fastenc import route
from fastenc.bench.proofs.compile import recorded

GPU = torch.device("cuda", 0)


@contextlib.contextmanager
def taken_for_cuda() -> Iterator[None]:
    """Under "auto", CPU tensors take the Triton route as those on a healthy `GPU` do, and may fall back as they do.

    Nothing is known yet: no launch has failed, no warning was given.
    """
    fault, fall_back = route.fault, route.fall_back
    replaced = mock.patch.multiple(
        route, device_reason=lambda x: fault(GPU), fault=lambda device: fault(GPU),
        fall_back=lambda error, device: fall_back(error, GPU), _faults={}, _warned=set(),
    )  # fmt: skip
    with fastenc.backend("auto"), replaced, mock.patch.object(torch.cuda, "synchronize"):
        yield


@contextlib.contextmanager
def fake_driver() -> Iterator[Any]:
    """triton compiles for sm_90 and launches by the driver that is yielded: set its `launcher_cls` and its `utils`."""
    with recorded(90):
        driver.active.launcher_cls = _launcher
        yield driver.active


def _launcher(source: Any, metadata: Any) -> Any:
    def launch(grid_0: int, grid_1: int, grid_2: int, stream: int, function: Any, *rest: Any) -> None:
        if function is None:  # as triton's own launcher, which is C, says it
            raise TypeError("'NoneType' object cannot be interpreted as an integer")

    return launch


class Devices:
    """Two GPUs as torch and triton see them: each thread has a current one, and each GPU a current stream."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int]] = []  # the current device and the stream of each launch
        self.error: Exception | None = None
        self._thread = threading.local()

    @property
    def current(self) -> int:
        """The current device of this thread, 0 in a new one."""
        return getattr(self._thread, "current", 0)

    def exchange(self, device: int) -> int:
        before, self._thread.current = self.current, device if device >= 0 else self.current
        return before

    def stream(self, device: int) -> int:
        return 1000 + device

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(grid_0: int, grid_1: int, grid_2: int, stream: int, *rest: Any) -> None:
            if self.error is not None:
                raise self.error
            self.launches.append((self.current, stream))

        return launch


@contextlib.contextmanager
def two_gpus() -> Iterator[Devices]:
    """The driver and torch.cuda know two GPUs, and every thread starts on the first."""
    devices = Devices()
    properties = SimpleNamespace(multi_processor_count=132)
    cuda = mock.patch.multiple(
        torch.cuda, current_device=lambda: devices.current, get_device_properties=lambda device: properties,
        _exchange_device=devices.exchange, _maybe_exchange_device=devices.exchange,
    )  # fmt: skip
    with fake_driver() as fake, cuda:
        fake.get_current_device = lambda: devices.current
        fake.get_current_stream = devices.stream
        fake.launcher_cls = devices.launcher_cls
        yield devices


class OnSecond(Tensor):
    """A CPU tensor that says it is on GPU 1."""

    def get_device(self) -> int:
        return 1
