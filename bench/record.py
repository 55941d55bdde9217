"""The record of a run: what was measured, on what and under which settings, as one JSON file of one schema.

Times are in seconds, memory in bytes, rates in bytes or floating-point operations per second. A field is null where
the machine cannot give the figure (no git, no cuDNN, no GPU), never a stand-in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SCHEMA = "fastenc-record-1"

Status = Literal["ok", "wrong", "out of memory", "failed", "left out: no time left"]
TestStatus = Literal["passed", "failed", "stopped: no time left", "not run"]


@dataclass(frozen=True)
class Machine:
    """The device and its software. `copy_bandwidth` counts bytes read plus bytes written; `matmul_rate` is bf16."""

    device: Literal["cuda", "cpu"]
    name: str
    compute_capability: str | None
    driver: str | None
    python: str
    torch: str
    cuda: str | None
    cudnn: str | None
    triton: str | None
    copy_bandwidth: float | None
    matmul_rate: float | None


@dataclass(frozen=True)
class Settings:
    """What every peer ran under."""

    cudnn_allow_tf32: bool
    matmul_allow_tf32: bool
    cudnn_benchmark: bool
    threads: int


@dataclass(frozen=True)
class Summary:
    """Samples of one peer, in seconds per call."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """The median and the 20th and 80th percentile of `samples`, by linear interpolation."""
        ordered = sorted(samples)

        def quantile(q: float) -> float:
            position = q * (len(ordered) - 1)
            low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
            return low + (high - low) * (position - math.floor(position))

        return cls(quantile(0.5), quantile(0.2), quantile(0.8), len(ordered))


@dataclass(frozen=True)
class Result:
    """One peer on one workload.

    `difference` is the relative L2 distance from the exact run, of the output or gradient that came closest to (or
    farthest beyond) its `tolerance`; `agreement.py` says how both are made. `first_call` is the wall-clock time of the
    first call: compiling and choosing algorithms are in it and in nothing else. `peak_memory` is the peer's parameters
    and inputs plus the most that was allocated above them during one call; for an operation's backward, its forward
    included.
    """

    peer: str
    status: Status
    time: Summary | None = None
    difference: float | None = None
    tolerance: float | None = None
    first_call: float | None = None
    peak_memory: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Network:
    """The arguments of EncoderNet3d; the kernel size is 3."""

    channel: int
    layers: tuple[int, ...]
    in_planes: int
    out_length: int


@dataclass(frozen=True)
class Workload:
    """What was timed: a network or an operation, in which mode and precision, on an input of which shape and layout.

    `network` is null for an operation. `least_bytes` is what an operation cannot avoid moving, every input read once
    and every output written once; null for a network.
    """

    kind: Literal["network", "instance_norm_prelu"]
    mode: Literal["forward", "backward", "forward+backward"]
    precision: Literal["float32", "bfloat16", "bfloat16 autocast"]
    shape: tuple[int, ...]
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    network: Network | None = None
    least_bytes: int | None = None
    results: tuple[Result, ...] = ()

    def __str__(self) -> str:
        if self.kind == "network":
            return f"network, {self.precision}, batch {self.shape[0]}, {self.mode}"
        return f"{self.kind}, {self.precision}, {'x'.join(map(str, self.shape))} {self.layout}, {self.mode}"


@dataclass(frozen=True)
class GpuTests:
    """The outcome of tests/gpu on the same machine, just before the timing."""

    status: TestStatus
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """One run. `date` is UTC in ISO 8601; `commit` and `dirty` are null outside a git checkout."""

    command: str
    date: str
    commit: str | None
    dirty: bool | None
    machine: Machine
    settings: Settings
    tests: GpuTests
    workloads: tuple[Workload, ...]
    complete: bool
    note: str = ""
    schema: str = SCHEMA


def write(record: Record, path: Path) -> None:
    """Write `record` to `path` as JSON, so that a reader at any moment finds the old file or the new one, whole."""
    text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> Record:
    """Read the record at `path`.

    Raises:
        ValueError: it is not JSON, is of another schema, or a field is missing, unknown or of the wrong kind; the
            message names the file and the field.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: a record of schema {schema!r}; this version of fastenc reads {SCHEMA!r} only")
    try:
        record: Record = _decode(Record, raw, "record")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as json.loads gives it, as an instance of the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            got = sorted(value) if isinstance(value, dict) else value
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {got!r}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', None) if origin is None else kind}, got {value!r}")
