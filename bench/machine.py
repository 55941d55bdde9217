"""The machine a run is made on: names and versions, the settings that peers share, and the two ceilings, measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from .record import Machine, Settings
from .timing import Work, calls_per_sample, sample

CHECKOUT = Path(__file__).resolve().parent.parent
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def _output(*command: str) -> str | None:
    """What `command` prints, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout and whether files differ from it; (None, None) where it is no git checkout."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != CHECKOUT:
        return None, None
    changes = _output("git", "status", "--porcelain")
    return _output("git", "rev-parse", "--verify", "HEAD"), None if changes is None else bool(changes)


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> Machine:
    """The names and versions of this machine; the ceilings are measured by `ceilings`."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    cudnn = torch.backends.cudnn.version() if cuda else None
    return Machine(
        device="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name(device) if cuda else _processor(),
        compute_capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        driver=driver.splitlines()[0] if driver else None,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        triton=triton,
        copy_bandwidth=None,
        matmul_rate=None,
    )


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy on the device, read plus written; operations per second of a bf16 matrix product."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = _seconds(Work(lambda: target.copy_(source), queued=True), device)
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    matmul = _seconds(Work(lambda: torch.mm(a, b), queued=True), device)
    return 2 * COPY_BYTES[device.type] / copy, 2 * n**3 / matmul


def _seconds(work: Work, device: torch.device) -> float:
    calls = calls_per_sample(work, device)
    return median(sample(work, calls, device) for _ in range(7))


@contextlib.contextmanager
def settings(tf32: bool, benchmark: bool) -> Iterator[Settings]:
    """Run the block with `tf32` in convolutions and cuDNN's `benchmark` search on or off; matrix products without TF32.

    PyTorch ships with TF32 on in convolutions and off in matrix products.
    """
    before = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    _apply(tf32, False, benchmark)
    try:
        yield Settings(tf32, False, benchmark, torch.get_num_threads())
    finally:
        _apply(*before)


def _apply(cudnn_tf32: bool, matmul_tf32: bool, benchmark: bool) -> None:
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.benchmark = benchmark
