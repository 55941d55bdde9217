"""The machine of a run: names and versions, PyTorch settings, temperature and clocks, and measured ceilings."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import fastenc

from .record import Condition, DType, Machine, MatmulRate, Settings
from .timing import Work, calls_per_sample, sample

CHECKOUT = Path(__file__).resolve().parents[2]
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
CONDITIONS = "temperature.gpu,clocks.sm,clocks.mem,power.draw"


def _output(*command: str) -> str | None:
    """What `command` prints; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether files differ from it; (None, None) outside a git checkout."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != CHECKOUT:
        return None, None
    changes = _output("git", "status", "--porcelain")
    return _output("git", "rev-parse", "--verify", "HEAD"), None if changes is None else bool(changes)


def source() -> str:
    """A hash of all Python files of fastenc, its kernels and its benchmarks."""
    package, digest = Path(fastenc.__file__).parent, hashlib.sha256()
    folders = os.walk(package, followlinks=True)  # in a checkout, kernels and bench are links
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def condition(device: torch.device) -> Condition | None:
    """The GPU's temperature, clocks and power now, as far as nvidia-smi reports them; None without a GPU."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    told = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={CONDITIONS}", "--format=csv,noheader,nounits")

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:  # "[N/A]"
            return None

    values = [number(text) for text in told.splitlines()[0].split(",")] if told else []
    return Condition(*values) if len(values) == len(CONDITIONS.split(",")) else None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> Machine:
    """Names and versions of this machine, without its measured ceilings."""
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
        matmul_rates=(),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device, read and written bytes together."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / _seconds(Work(lambda: target.copy_(source), queued=True), device)


def matmul_rates(dtypes: Iterable[DType], device: torch.device) -> tuple[MatmulRate, ...]:
    """Operations per second of a matrix product in each dtype; float32 with TF32 if convolutions may use it."""
    n, found = MATMUL_SIZE[device.type], []
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        for dtype in sorted(set(dtypes)):
            a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
            seconds = _seconds(Work(lambda a=a, b=b: torch.mm(a, b), queued=True), device)
            found.append(MatmulRate(dtype, 2 * n**3 / seconds))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return tuple(found)


def _seconds(work: Work, device: torch.device) -> float:
    calls = calls_per_sample(work, device)
    return min(sample(work, calls, device) for _ in range(7))  # a ceiling is the best sample


@contextlib.contextmanager
def settings(tf32: bool, benchmark: bool) -> Iterator[Settings]:
    """Run the block with these settings of TF32 in convolutions and of cuDNN's benchmark search.

    Matrix products run without TF32. By default PyTorch enables TF32 in convolutions only.
    """

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = tf32, False, benchmark
    try:
        yield Settings(tf32, False, benchmark, torch.get_num_threads())
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
