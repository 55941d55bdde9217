"""The record of a run: what was measured, on what and under which settings, as one JSON file of one schema.

Times are in seconds, memory in bytes, rates in bytes or floating-point operations per second, temperatures in degrees
Celsius, clocks in MHz, powers in watts. A field is null where the machine cannot give the figure (no git, no cuDNN, no
GPU), never a stand-in. `gpu`, `compare` and `ops` write the same schema; `report` and `load` read nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastenc.commands.shell import write_whole

from .summary import Ratio, Summary

SCHEMA = "fastenc-record-3"
MOST = 1e18
AT_LEAST_1 = {"shape", "channel", "channels", "in_planes", "kernel_size", "threads"}
SIGNED = ".temperature"  # the one number that may be below 0
NOT_REACHED = "not reached"  # the note of every peer of a workload that a run never came to

Status = Literal["ok", "wrong", "out of memory", "failed", "not here", "left out"]
TestStatus = Literal["passed", "failed", "stopped: no time left", "not run"]
Kind = Literal["network", "client", "instance_norm_prelu", "instance_norm_add_prelu", "stem"]
Mode = Literal["forward", "backward", "forward+backward", "training step"]
Precision = Literal["float32", "bfloat16", "float16", "bfloat16 autocast", "float16 autocast"]
Layout = Literal["contiguous", "channels_last"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MatmulRate:
    """Operations per second of a large matrix product; float32 with TF32 allowed as the run's convolutions have it."""

    dtype: DType
    rate: float


@dataclass(frozen=True)
class Machine:
    """The device, its software, and its ceilings, measured: `copy_bandwidth` counts bytes read plus bytes written."""

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

    def matmul_rate(self, dtype: DType) -> float | None:
        """Operations per second in `dtype`, where it was measured."""
        return next((each.rate for each in self.matmul_rates if each.dtype == dtype), None)


@dataclass(frozen=True)
class Condition:
    """What nvidia-smi tells of the GPU at one moment."""

    temperature: float | None
    sm_clock: float | None
    memory_clock: float | None
    power: float | None


@dataclass(frozen=True)
class Settings:
    """What every peer ran under."""

    cudnn_allow_tf32: bool
    matmul_allow_tf32: bool
    cudnn_benchmark: bool
    threads: int


@dataclass(frozen=True)
class Result:
    """One peer on one workload.

    `difference` is the relative L2 distance from the exact run, of the output or gradient that came closest to (or
    farthest beyond) its `tolerance`; `agreement.py` says how both are made. `first_call` is the wall-clock time of the
    first call: compiling and choosing algorithms are in it and in nothing else. `peak_memory` is what the peer holds
    between calls (parameters, inputs, optimizer state, frozen copies) plus the most that was allocated above it during
    one call; for an operation's backward, its forward included. `over_eager` is eager's time over this peer's,
    `over_fastenc` this peer's over fastenc's, round by round: above 1 this peer is faster than eager, and slower than
    fastenc. A peer that does not exist on this device is "not here", one that was not reached or had no time "left
    out"; `note` says why.
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


@dataclass(frozen=True)
class Network:
    """The arguments of EncoderNet3d; `out_length` 0 is a network that returns its last map."""

    channel: int
    layers: tuple[int, ...]
    in_planes: int
    out_length: int
    kernel_size: tuple[int, ...] = (3, 3, 3)


@dataclass(frozen=True)
class Client:
    """Somebody else's network, as `clients.py` makes it: of one channel, two classes, and these channels per stage."""

    name: Literal["nnU-Net PlainConvUNet", "nnU-Net ResidualEncoderUNet", "MONAI UNet"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """What was timed: a network, an operation or a stem, in which mode and precision, on an input of which shape.

    `network` is EncoderNet3d's and a stem's, of which it gives the first convolution; `client` is given for somebody
    else's network; both are null for an operation, which "instance_norm_add_prelu" is with a residual. `flops` and
    `least_bytes` are what the work cannot do without, `floor` the seconds that they take at the machine's measured
    rates; `floor.py` has the formula. `noise` is how far from 1 the ratio of two runs of the same version of fastenc
    was, at least 1: a ratio nearer to 1 than that says nothing.
    """

    kind: Kind
    mode: Mode
    precision: Precision
    shape: tuple[int, ...]
    layout: Layout = "contiguous"
    network: Network | None = None
    client: Client | None = None
    flops: int | None = None
    least_bytes: int | None = None
    floor: float | None = None
    noise: float | None = None
    results: tuple[Result, ...] = ()

    @property
    def dtype(self) -> DType:
        """What convolutions and operations compute in."""
        dtype: DType = self.precision.removesuffix(" autocast")  # type: ignore[assignment]
        return dtype

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        if self.client is not None:
            channels = " ".join(map(str, self.client.channels))
            return f"{self.client.name}, channels {channels}, {self.precision}, {shape}, {self.mode}"
        if self.network is None:
            return f"{self.kind}, {self.precision}, {shape} {self.layout}, {self.mode}"
        if self.kind == "stem":
            return f"stem of {self.network.channel} channels, {self.precision}, {shape}, {self.mode}"
        net = f"channel {self.network.channel}, layers {' '.join(map(str, self.network.layers))}"
        return f"EncoderNet3d {net}, {self.precision}, {shape}, {self.mode}"

    def within_noise(self, ratio: Ratio) -> bool:
        """Whether `ratio` cannot be told from 1: its interval meets that of two runs of the same version."""
        noise = 1.0 if self.noise is None else self.noise
        return ratio.low <= noise and ratio.high >= 1 / noise

    def timed(self, peer: str) -> Result | None:
        """The peer of that name, where it has a time."""
        return next((each for each in self.results if each.peer == peer and each.time is not None), None)

    def fastest(self, prefix: str = "") -> Result | None:
        """The fastest of the peers whose names begin like that, where one has a time."""
        found = [each for each in self.results if each.time is not None and each.peer.startswith(prefix)]
        return min(found, key=lambda each: each.time.median if each.time is not None else 0.0, default=None)

    def reached(self) -> bool:
        """Whether the run came to it; eager, the first result, is the first to be run."""
        return not self.results or self.results[0].note != NOT_REACHED

    def unfinished(self) -> bool:
        """Whether any peer was left out."""
        return not self.results or any(result.status == "left out" for result in self.results)


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
    """One run. `date` is UTC in ISO 8601; `commit` and `dirty` are null outside a git checkout.

    `source` is a hash of the Python files of fastenc, its kernels and benchmarks: two records with the same one timed
    the same code. `before` and `after` are the GPU at the start and at the end of the timing.
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


def write(record: Record, path: Path) -> None:
    """Write `record` to `path` as JSON, so that a reader at any moment finds the old file or the new one, whole."""
    text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"
    write_whole(path, text)


def load(path: Path) -> Record:
    """Read the record at `path`.

    Raises:
        ValueError: it is not JSON, is of another schema, or a field is missing, unknown or of the wrong kind; the
            message names the file and the field.
    """
    try:
        raw = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: a record of schema {_short(schema)}; this version of fastenc reads {SCHEMA!r} only")
    try:
        record: Record = _decode(Record, raw, "record")
        for i, workload in enumerate(record.workloads):
            _check(workload, f"record.workloads[{i}]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose keys stands there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _no_number(text: str) -> None:
    """Python's json reads NaN and infinities, which JSON has not."""
    raise ValueError(f"{text} is no number of JSON")


def _short(value: Any) -> str:
    """What came, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits without end, lists in lists
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check(workload: Workload, where: str) -> None:
    """What one field says of another: a network where the kind has one, and a shape that it takes."""
    for field, kinds in (("network", ("network", "stem")), ("client", ("client",))):
        if (getattr(workload, field) is not None) != (workload.kind in kinds):
            needed = "expected one" if workload.kind in kinds else "expected null"
            raise ValueError(f"{where}.{field}: {needed} for the kind {workload.kind!r}")
    if not 3 <= len(workload.shape) <= 5:
        raise ValueError(f"{where}.shape: expected 3 to 5 numbers, got {list(workload.shape)}")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as json.loads gives it, as an instance of the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            got = sorted(value) if isinstance(value, dict) else value
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {_short(got)}")
        return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if kind in (int, float) and type(value) in (int, kind):
        least = 1 if where.rsplit(".", 1)[-1].split("[")[0] in AT_LEAST_1 else 0
        signed = where.endswith(SIGNED)
        if abs(value) < MOST and (signed or value >= least):
            return kind(value)
        raise ValueError(
            f"{where}: expected a number {'' if signed else f'from {least} '}below 1e18, got {_short(value)}"
        )
    if kind not in (int, float) and origin is None and type(value) is kind:
        return value
    raise ValueError(
        f"{where}: expected {getattr(kind, '__name__', None) if origin is None else kind}, got {_short(value)}"
    )
