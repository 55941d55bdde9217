"""Taking a route on purpose in a test, and seeing which one was taken."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

import fastenc
from fastenc.bench.interpret import interpreted


@contextlib.contextmanager
def taken(backend: str) -> Iterator[torch.dtype]:
    """Run under this backend, the kernels interpreted for "triton"; yields the most exact dtype that it takes.

    "fused" is "auto" as it is on a GPU: CPU tensors take the Triton route, interpreted, unless a reason speaks against
    it, and then the eager route in silence. A kernel that fails there fails the test: no falling back.
    """
    if backend == "fused":
        able = mock.patch.multiple("fastenc.route", device_reason=lambda x: None, machine_fault=lambda *_: False)
        with interpreted(), fastenc.backend("auto"), able:
            yield torch.float32
    elif backend == "triton":
        with interpreted(), fastenc.backend("triton"):
            yield torch.float32
    else:
        with fastenc.backend(backend):
            yield torch.float64


@contextlib.contextmanager
def eager_norms() -> Iterator[mock.Mock]:
    """Counts the calls of torch.nn.functional.instance_norm, of which the Triton route makes none."""
    with mock.patch.object(nn.functional, "instance_norm", wraps=nn.functional.instance_norm) as calls:
        yield calls
