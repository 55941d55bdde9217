"""`python -m fastenc doctor`: installed versions, the route of each dtype, a self-test, and known problems.

It writes no file of its own. On a GPU, triton caches the kernels that it compiles. `--json` prints one document of
schema "fastenc-doctor-1":

    schema     "fastenc-doctor-1"
    versions   fastenc, python, torch, cuda, rocm, cudnn, triton, driver: a string each, null where there is none
    gpus       of each: name, compute_capability ("9.0"), memory_bytes, reason (why not the kernels, or null)
    settings   backend ("auto", "triton", "eager"), conv_fp32_precision (torch's word: "tf32", or float32 as it is),
               c_compiler (its name or null), cuda_failure (what a GPU raised that torch finds and cannot use, or null)
    routes     of each dtype and layout: dtype, layout, device, route ("triton", "eager"), reason (or null)
    self_test  device, route, passed, failure (what was raised, or null), rows: layout, result ("y", "dx", "dweight",
               "dbias", "dslope"), error (null: not finite), allowed
    warnings   of each: cause, remedy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

import fastenc

from .. import route
from ..bench.engine.machine import describe
from .self_test import LAYOUTS, SHAPE, SelfTest, self_test

SCHEMA = "fastenc-doctor-1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SLOW_CUDNN = range(90800, 91500)  # as torch.backends.cudnn.version() counts: 9.8 to 9.14


@dataclass(frozen=True)
class Gpu:
    """A GPU, and the reason why the kernels cannot run on it, or None."""

    name: str
    compute_capability: str
    memory_bytes: int
    reason: str | None


@dataclass(frozen=True)
class Choice:
    """The route that tensors of one dtype and layout take, and the reason for eager."""

    dtype: str
    layout: str
    device: str
    route: str
    reason: str | None


@dataclass(frozen=True)
class Advice:
    """A known problem of this machine, and its remedy."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """The report. Its fields are described at the top of this file."""

    schema: str
    versions: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    settings: dict[str, str | None]
    routes: tuple[Choice, ...]
    self_test: SelfTest
    warnings: tuple[Advice, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the doctor."""
    parser.description = (
        "Print versions, GPUs, the route of each dtype and layout with its reason, a self-test of the fused operation "
        "against the float64 formula, and warnings. Exit status 1 when the self-test fails."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0, or 1 if the self-test fails."""
    report = examine()
    print(json.dumps(asdict(report), indent=1) if arguments.json else text(report))
    return 0 if report.self_test.passed else 1


def examine() -> Report:
    """Inspect this machine and test its route."""
    device, failure = working_device()
    machine = describe(device)
    versions = {
        "fastenc": fastenc.__version__,
        "python": machine.python,
        "torch": machine.torch,
        "cuda": machine.cuda,
        "rocm": torch.version.hip,
        "cudnn": machine.cudnn,
        "triton": machine.triton,
        "driver": machine.driver,
    }
    settings = {
        "backend": route.chosen(),
        # Not allow_tf32, which raises if a program has used both ways to set it.
        "conv_fp32_precision": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "c_compiler": c_compiler(),
        "cuda_failure": failure,
    }
    found = gpus() if device.type == "cuda" else ()
    return Report(
        SCHEMA, versions, found, settings, choices(device), self_test(device), tuple(advice(versions, found, settings))
    )


def working_device() -> tuple[torch.device, str | None]:
    """The GPU if torch finds one, otherwise the CPU, and the error of a GPU that torch finds but cannot use."""
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            return torch.device("cpu"), " ".join(str(error).split())
        return torch.device("cuda"), None
    return torch.device("cpu"), None


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees."""
    found = []
    for i in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(i)
        reason = route.device_reason(torch.empty(SHAPE, device=f"cuda:{i}"))
        found.append(Gpu(has.name, f"{has.major}.{has.minor}", has.total_memory, reason))
    return tuple(found)


def choices(device: torch.device) -> tuple[Choice, ...]:
    """The route of every dtype and layout on `device`."""
    found = []
    for dtype in DTYPES:
        for layout, memory_format in LAYOUTS.items():
            x = torch.empty(SHAPE, dtype=dtype, device=device, memory_format=memory_format)
            reason = route.reason(x)
            taken = "triton" if reason is None else "eager"
            found.append(Choice(str(dtype).removeprefix("torch."), layout, str(device), taken, reason))
    return tuple(found)


def c_compiler() -> str | None:
    """The compiler with which triton would build its launcher: CC, otherwise gcc, otherwise clang."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next((os.path.basename(name) for name in names if shutil.which(name)), None)


def advice(
    versions: Mapping[str, str | None], gpus: Sequence[Gpu], settings: Mapping[str, str | None]
) -> Iterator[Advice]:
    """Known problems of these versions, GPUs and settings. PyTorch's issues are named by number."""
    cudnn = int(versions["cudnn"] or 0) if versions["rocm"] is None else 0
    if cudnn in SLOW_CUDNN:
        number = f"{cudnn // 10000}.{cudnn // 100 % 100}"
        package = f"nvidia-cudnn-cu{(versions['cuda'] or '').split('.')[0]}"
        yield Advice(
            f"cuDNN {number}: torch keeps contiguous half-precision Conv3d from cuDNN 9.8 to 9.14, which get it wrong "
            "(issue 163539); what runs instead is slow (166122) and takes several times the memory (166643)",
            f"pip install '{package}>=9.15', or tensors in torch.channels_last_3d, as the Triton route keeps them",
        )
    if (versions["torch"] or "").startswith("2.9."):
        yield Advice(
            "torch 2.9 comes with such a cuDNN, 9.10 or 9.13, and 2.9.0 keeps half-precision Conv3d from any other too "
            "(issue 166643)",
            "torch 2.11 or newer, which fastenc needs",
        )
    if settings["cuda_failure"] is not None:
        yield Advice(
            f"torch finds a GPU and cannot use it: {settings['cuda_failure']}",
            "nvidia-smi must list it without errors, with memory free and a driver as new as torch's CUDA",
        )
    for i, gpu in enumerate(gpus):
        if gpu.reason is not None:
            yield Advice(
                f"GPU {i}, {gpu.name}, takes the eager route: {gpu.reason}",
                "pip install triton" if not route.has_triton() else "none needed: same results, at PyTorch's own speed",
            )
    if gpus and settings["c_compiler"] is None and route.has_triton():
        yield Advice(
            "no C compiler: triton builds the launcher of its kernels with one",
            "install gcc or clang (and Python's headers), or let CC name one",
        )
    if gpus and versions["rocm"] is None and settings["conv_fp32_precision"] == "tf32":
        yield Advice(
            "float32 Conv3d runs in TF32, PyTorch's default (torch.backends.cudnn.allow_tf32): 10 bits of each "
            "input's mantissa count; the norms stay float32",
            'torch.backends.cudnn.conv.fp32_precision = "ieee" where float32 must be float32',
        )


def text(report: Report) -> str:
    """The report as text: the verdict, the warnings, and a block to paste into a bug report."""
    verdict = "passed" if report.self_test.passed else "FAILED"
    lines = [f"fastenc doctor: the self-test {verdict}; warnings: {len(report.warnings)}"]
    lines += ["", _verifiable(report)]
    for warning in report.warnings:
        lines += ["", f"Warning: {warning.cause}.", f"Remedy: {warning.remedy}."]
    lines += ["", "For a bug report, paste this:", "", "```text", *_versions(report), "", *_routes(report), ""]
    lines += [*_self_test(report.self_test), *(f"warning: {warning.cause}" for warning in report.warnings), "```"]
    return "\n".join(lines)


def _verifiable(report: Report) -> str:
    """What this machine can verify, and how."""
    if any(gpu.reason is None for gpu in report.gpus):
        return "This machine runs the kernels. In a checkout, `pytest tests/gpu` verifies them on its GPU."
    if report.versions["triton"] is None:
        return "Without triton, this machine can verify the eager route only."
    return (
        "No GPU here runs the kernels. This machine can still compile them and execute the compiled code on its CPU, "
        "with checks for races and bounds: `python -m fastenc demo` on one network, `make test` in a checkout on all."
    )


def _versions(report: Report) -> Iterator[str]:
    yield ", ".join(f"{name} {version or '–'}" for name, version in report.versions.items())
    yield ", ".join(f"{name} {value or '–'}" for name, value in report.settings.items())
    for i, gpu in enumerate(report.gpus):
        yield f"GPU {i}: {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 1e9:.1f} GB"
    if not report.gpus:
        yield "no GPU that torch sees"


def _routes(report: Report) -> Iterator[str]:
    for choice in report.routes:
        why = "" if choice.reason is None else f": {choice.reason}"
        yield f"{choice.dtype:<8} {choice.layout:<16} {choice.device} {choice.route}{why}"


def _self_test(test: SelfTest) -> Iterator[str]:
    verdict = "passed" if test.passed else "FAILED"
    yield f"self-test of the {test.route} route on {test.device}, float32, against float64: {verdict}"
    if test.failure is not None:
        yield test.failure
    for layout in LAYOUTS:
        rows = [row for row in test.rows if row.layout == layout]
        if rows:
            worst = max(rows, key=lambda row: float("inf") if row.error is None else row.error / row.allowed)
            off = "is not finite" if worst.error is None else f"is off by {worst.error:.2g}"
            yield f"{layout:<16} worst is {worst.result}: {off}, {worst.allowed:.2g} allowed"
