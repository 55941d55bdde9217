"""The record of a run, a JSON file: results, machine and settings.

Times are in seconds, memory in bytes, rates in bytes or floating-point operations per second, temperatures in degrees
Celsius, clocks in MHz, powers in watts. A figure that a machine cannot give (no git, no cuDNN, no GPU) is null. `gpu`,
`compare`, `ops` and `clients` write this schema, and `report` reads it. In its keys a baseline is called "peer" and a
third-party model "client".
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastenc.commands.shell import write_whole

from .summary import Ratio, Summary

SCHEMA = "fastenc-record-3"
MOST = 1e18
AT_LEAST_1 = {"shape", "channel", "channels", "in_planes", "kernel_size", "threads"}
SIGNED = "temperature"  # the only number that can be negative
NOT_REACHED = "not reached"  # the note of all baselines of a workload that the run did not reach

Status = Literal["ok", "wrong", "out of memory", "failed", "not here", "left out"]
TestStatus = Literal["passed", "failed", "stopped: no time left", "not run"]
Kind = Literal["network", "client", "instance_norm_prelu", "instance_norm_add_prelu", "stem"]
Mode = Literal["forward", "backward", "forward+backward", "training step"]
Precision = Literal["float32", "bfloat16", "float16", "bfloat16 autocast", "float16 autocast"]
Layout = Literal["contiguous", "channels_last"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Machine:
    """The device, its software and its measured ceilings. `copy_bandwidth` counts bytes read and bytes written."""

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
    matmul_rates: tuple[MatmulRate, ...]

    @property
    def label(self) -> str:
        """The device and its name, such as "CPU, AMD EPYC"."""
        return f"{'GPU' if self.device == 'cuda' else 'CPU'}, {self.name}"

    @property
    def slug(self) -> str:
        """The name in the form used in file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def matmul_rate(self, dtype: DType) -> float | None:
        """Operations per second in `dtype`, or None if not measured."""
        return next((each.rate for each in self.matmul_rates if each.dtype == dtype), None)


@dataclass(frozen=True)
class Condition:
    """What nvidia-smi reports about the GPU at one moment."""

    temperature: float | None
    sm_clock: float | None
    memory_clock: float | None
    power: float | None


@dataclass(frozen=True)
class Settings:
    """The settings under which all baselines ran."""

    cudnn_allow_tf32: bool
    matmul_allow_tf32: bool
    cudnn_benchmark: bool
    threads: int


@dataclass(frozen=True)
class Result:
    """One baseline on one workload.

    peer: the baseline's name.
    status: "not here" if the baseline does not exist on this device; "left out" if time ran out before it.
    over_eager: eager's time over this baseline's, round by round; above 1 this baseline is faster.
    over_fastenc: this baseline's time over fastenc's, round by round; above 1 this baseline is slower.
    difference: the relative L2 distance from the exact run, of the output or gradient that is nearest to its tolerance
        or exceeds it most.
    tolerance: the largest difference allowed for that tensor; see `agreement.py`.
    first_call: the wall-clock time of the first call, the only one that includes compiling and choosing algorithms.
    peak_memory: what the baseline holds between calls (parameters, inputs, optimizer state, frozen copies) plus the
        peak allocated above it during one call, which includes the forward of an operation's backward.
    note: the reason for the status, or what a reader should know.
    """

    peer: str
    status: Status
    time: Summary | None = None
    over_eager: Ratio | None = None
    over_fastenc: Ratio | None = None
    difference: float | None = None
    tolerance: float | None = None
    first_call: float | None = None
    peak_memory: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The median time; NaN if there is none."""
        return math.nan if self.time is None else self.time.median


@dataclass(frozen=True)
class Network:
    """The arguments of EncoderNet3d. With `out_length` 0 it returns its last map."""

    channel: int
    layers: tuple[int, ...]
    in_planes: int
    out_length: int
    kernel_size: tuple[int, ...] = (3, 3, 3)


@dataclass(frozen=True)
class ThirdPartyModel:
    """A third-party network with one input channel and two classes. channels: of each stage."""

    name: Literal["nnU-Net PlainConvUNet", "nnU-Net ResidualEncoderUNet", "MONAI UNet"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """What is timed: a network, an operation or a stem, with its mode, precision and input.

    kind: "instance_norm_add_prelu" is the operation with a residual.
    network: for an EncoderNet3d, and for a stem, which is its first convolution.
    client: for a third-party model.
    flops, least_bytes: the least operations and bytes that the workload needs.
    floor: the seconds that these take at the machine's measured rates; see `floor.py`.
    noise: the factor, at least 1, between two runs of the same version. A ratio that is closer to 1 means nothing.
    """

    kind: Kind
    mode: Mode
    precision: Precision
    shape: tuple[int, ...]
    layout: Layout = "contiguous"
    network: Network | None = None
    client: ThirdPartyModel | None = None
    flops: int | None = None
    least_bytes: int | None = None
    floor: float | None = None
    noise: float | None = None
    results: tuple[Result, ...] = ()

    @property
    def dtype(self) -> DType:
        """The dtype of convolutions and operations."""
        dtype: DType = self.precision.removesuffix(" autocast")  # type: ignore[assignment]
        return dtype

    @property
    def model(self) -> str:
        """The network, such as "channel 64, layers 3 3 3 3 3". Empty for an operation."""
        if self.network is not None:
            return f"channel {self.network.channel}, layers {' '.join(map(str, self.network.layers))}"
        return "" if self.client is None else self.client.name

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        if self.client is not None:
            channels = " ".join(map(str, self.client.channels))
            return f"{self.model}, channels {channels}, {self.precision}, {shape}, {self.mode}"
        if self.network is None:
            return f"{self.kind}, {self.precision}, {shape} {self.layout}, {self.mode}"
        if self.kind == "stem":
            return f"stem of {self.network.channel} channels, {self.precision}, {shape}, {self.mode}"
        return f"EncoderNet3d {self.model}, {self.precision}, {shape}, {self.mode}"

    def within_noise(self, ratio: Ratio) -> bool:
        """Whether the interval of `ratio` overlaps that of two runs of the same version."""
        noise = 1.0 if self.noise is None else self.noise
        return ratio.low <= noise and ratio.high >= 1 / noise

    @property
    def measured(self) -> list[Result]:
        """The results that have a time."""
        return [each for each in self.results if each.time is not None]

    def timed(self, baseline: str) -> Result | None:
        """The result of the baseline with this name, or None if it was not timed."""
        return next((each for each in self.measured if each.peer == baseline), None)

    def fastest(self, prefix: str = "") -> Result | None:
        """The fastest of the baselines whose names begin with `prefix`, or None if none was timed."""
        found = (each for each in self.measured if each.peer.startswith(prefix))
        return min(found, key=lambda each: each.median, default=None)

    def reached(self) -> bool:
        """Whether the run reached this workload. Eager, the first result, runs first."""
        return not self.results or self.results[0].note != NOT_REACHED

    def unfinished(self) -> bool:
        """Whether any baseline was left out."""
        return not self.results or any(result.status == "left out" for result in self.results)


@dataclass(frozen=True)
class GpuTests:
    """The outcome of tests/gpu on the same machine."""

    status: TestStatus
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """One run.

    date: UTC, in ISO 8601.
    commit, dirty: null outside a git checkout.
    source: a hash of the Python files of fastenc, its kernels and its benchmarks, equal for runs of the same code.
    before, after: the GPU's condition at the start and at the end of the timing.
    """

    command: str
    date: str
    commit: str | None
    dirty: bool | None
    source: str
    machine: Machine
    settings: Settings
    tests: GpuTests
    workloads: tuple[Workload, ...]
    complete: bool
    seconds: float = 0.0
    before: Condition | None = None
    after: Condition | None = None
    note: str = ""
    schema: str = SCHEMA


@dataclass(frozen=True)
class MatmulRate:
    """Operations per second of a large matrix product; float32 uses TF32 if the run's convolutions may."""

    dtype: DType
    rate: float


def write(record: Record, path: Path) -> None:
    """Write `record` to `path` as JSON. Readers see either the complete old file or the complete new one."""
    text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"
    write_whole(path, text)


def load(path: Path) -> Record:
    """Read the record at `path`.

    Raises:
        ValueError: the file is not JSON or has another schema, or a field is missing, unknown or invalid. The message
            names the file and the field.
    """
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: a record of schema {schema!r:.200}; this version of fastenc reads {SCHEMA!r} only")
    try:
        record: Record = _decode(Record, raw, "record")
        for i, workload in enumerate(record.workloads):
            _check(workload, f"record.workloads[{i}]")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError if a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _check(workload: Workload, where: str) -> None:
    """Check fields that depend on each other: network and client must match the kind. Raises ValueError."""
    for field, kinds in (("network", ("network", "stem")), ("client", ("client",))):
        if (getattr(workload, field) is not None) != (workload.kind in kinds):
            needed = "expected one" if workload.kind in kinds else "expected null"
            raise ValueError(f"{where}.{field}: {needed} for the kind {workload.kind!r}")
    if not 3 <= len(workload.shape) <= 5:
        raise ValueError(f"{where}.shape: expected 3 to 5 numbers, got {list(workload.shape)}")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Convert `value` from json.loads to the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            got = sorted(value) if isinstance(value, dict) else value
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {got!r:.200}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if kind in (int, float) and type(value) in (int, kind):
        field = where.rsplit(".", 1)[-1].split("[")[0]
        least = 1 if field in AT_LEAST_1 else -MOST if field == SIGNED else 0
        if least <= value < MOST:
            return kind(value)
        raise ValueError(f"{where}: expected a number from {least:g} below 1e18, got {value!r:.200}")
    if kind not in (int, float) and origin is None and type(value) is kind:
        return value
    raise ValueError(
        f"{where}: expected {getattr(kind, '__name__', None) if origin is None else kind}, got {value!r:.200}"
    )
