"""A replacement for triton's GPU driver, on machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from .ceilings import SHARED_BYTES


class StandInDriver:
    """Reports a target, so that triton compiles for it. Subclasses add `launcher_cls`.

    Args:
        architecture: 80, 90, 100, … for CUDA, or a name such as "gfx942" for ROCm.
        load_binary: what triton calls with name, binary, shared memory and device before the first launch of a kernel.
    """

    def __init__(self, architecture: int | str, load_binary: Callable[..., tuple[Any, ...]]) -> None:
        if isinstance(architecture, int):
            self.target = GPUTarget("cuda", architecture, 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)
        properties = {
            "max_shared_mem": SHARED_BYTES.get(f"sm_{architecture}", max(SHARED_BYTES.values())),
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=load_binary, unload_module=lambda module: None
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
