"""`compare` and `ops` from their command lines, the physical floor, and peak memory. No duration is asserted."""

import dataclasses
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastenc.bench.__main__ import main
from fastenc.bench.baselines import encoder
from fastenc.bench.commands import compare, ops, plots
from fastenc.bench.engine import floor, measure, record, session
from fastenc.bench.engine.memory import held_bytes, peak_bytes
from fastenc.bench.engine.record import MatmulRate, Network, Record, Workload

CPU = torch.device("cpu")
TINY = ["--channel", "4", "--layers", "2", "1", "--size", "8", "7", "6", "--out-length", "5"]
FEW = ["--peers", "fastenc", "eager channels_last_3d"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rounds than needed, and ceilings that cost nothing."""
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    monkeypatch.setattr(plots, "DPI", 30)
    monkeypatch.setattr(session, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(session, "matmul_rates", lambda dtypes, device: tuple(MatmulRate(d, 1e11) for d in dtypes))


def only_record(folder: Path) -> Record:
    (path,) = folder.glob("*.json")
    return record.load(path)


# ------------------------------------------------------------------------------------------------ the commands


def test_compare_times_every_batch_and_mode_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    asked = ["--batch", "2", "1", "--mode", "infer", "train", "--device", "cpu", "--out", str(out)]
    assert main(["compare", *TINY, *FEW, *asked]) == 0
    written = only_record(out)
    assert written.complete
    assert str(tmp_path) not in written.command
    assert written.command.startswith("python -m fastenc bench compare --channel 4")
    found = [(each.mode, each.shape) for each in written.workloads]
    shapes = [(1, 3, 8, 7, 6), (2, 3, 8, 7, 6)]
    assert found == list(itertools.product(["forward", "training step"], shapes))
    for workload in written.workloads:
        assert [result.peer for result in workload.results] == ["eager", "eager channels_last_3d", "fastenc"]
        assert {result.status for result in workload.results} == {"ok"}
        assert workload.noise is not None
        assert workload.floor == pytest.approx(workload.flops / 1e11 + workload.least_bytes / 1e10)  # type: ignore[operator]
    printed = capsys.readouterr().out
    assert "× eager" in printed
    pictures = sorted(path.name.split("-")[-2] for path in out.glob("*.png"))
    assert pictures == ["batch", "memory", "speedup"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))


@pytest.mark.parametrize("residual", [False, True])
def test_ops_times_both_directions_and_layouts(residual: bool, tmp_path: Path) -> None:
    shapes = ["2x4x5x4x3"]
    few = ["--peers", "fastenc", "GroupNorm(C, C)", *(["--residual"] if residual else [])]
    assert (
        main(["ops", "--shapes", *shapes, *few, "--dtype", "fp32", "bf16", "--device", "cpu", "--out", str(tmp_path)])
        == 0
    )
    written = only_record(tmp_path)
    assert len(written.workloads) == 8
    assert {result.status for workload in written.workloads for result in workload.results} == {"ok"}
    assert {workload.least_bytes for workload in written.workloads if workload.shape == (2, 4, 5, 4, 3)} == {
        480 * tensors * size for tensors in ((3, 5) if residual else (2, 3)) for size in (2, 4)
    }
    drawn = [path.name.split("-")[-2] for path in tmp_path.glob("*.png")]
    assert drawn == ([] if residual else ["roofline"])


def test_ops_takes_the_layers_of_a_network() -> None:
    shapes = encoder.norms(*ops.NETWORKS["example1"])
    assert shapes[0] == (64, 31, 32, 30)
    assert shapes[-1] == (1024, 2, 2, 2)
    assert len(shapes) == 15
    assert len(ops.workloads(shapes, "float32")) == 4 * len(set(shapes))


def test_a_wrong_baseline_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: Network, **options: Any) -> nn.Module:
        made = encoder.plain_encoder(network)
        made.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        return made

    monkeypatch.setattr(encoder, "fused_encoder", wrong)
    monkeypatch.setattr(encoder, "routes", lambda network, x: "")
    assert main(["compare", *TINY, "--peers", "fastenc", "--device", "cpu", "--out", str(tmp_path)]) == 1
    (workload,) = only_record(tmp_path).workloads
    assert [result.status for result in workload.results] == ["ok", "wrong"]
    assert workload.results[1].time is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1", "1", "1"], "Expected more than 1 spatial element"),
        (["--layers", "3"], "layers must have at least 2 entries"),
        (["--kernel-size", "3", "3"], "kernel_size must be an int or a sequence of 3 ints"),
        (["--size", "2", "2", "2", "--batch", "1", "4"], "Expected more than 1 spatial element"),
    ],
)
def test_the_network_itself_refuses_impossible_sizes_before_any_timing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "Session", None)
    assert main(["compare", *arguments, "--out", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["compare", "ops"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_timing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "Session", None)
    (tmp_path / "file").write_text("")
    assert main([command, "--out", str(tmp_path / "file")]) == 2
    assert f"--out: cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "ops", "clients"])
def test_without_a_gpu_cuda_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device cuda" in line
    assert "no CUDA GPU here" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["8x64x31x32", "8x64x31x32xa", "1x1x1x1x1", "0x1x2x2x2"])
def test_invalid_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ops", "--shapes", text])
    assert f"got {text}; " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- the floor


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("network", "size"),
    [(Network(2, (2, 1, 2), 3, 5), (7, 6, 5)), (Network(3, (1, 2), 1, 0, (3, 1, 5)), (4, 3, 6))],
    ids=["pooled", "map, uneven kernel"],
)
def test_the_floor_counts_what_a_plain_network_does(network: Network, size: tuple[int, ...], training: bool) -> None:
    """A convolution of ones with ones counts its multiplications; its weight's gradient shows which taps read input."""
    N, flops, moved = 2, 0, 0
    plain = encoder.plain_encoder(network)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, moved
        (x,) = inputs
        if isinstance(layer, nn.Conv3d):
            weight = torch.ones_like(layer.weight).requires_grad_()
            y = F.conv3d(torch.ones_like(x), weight, None, layer.stride, layer.padding)
            (gradient,) = torch.autograd.grad(y.sum(), weight)
            live, tensors = int((gradient != 0).sum()), x.numel() + output.numel()
            first = layer.in_channels == network.in_planes
            passes = (2 if first else 3) if training else 1
            flops += passes * 2 * int(y.sum())
            moved += 4 * passes * (tensors + live)
        elif isinstance(layer, nn.InstanceNorm3d):
            moved += 4 * x.numel() * (5 if training else 2)
        elif isinstance(layer, nn.Linear):
            flops += 2 * layer.weight.numel() * N * (3 if training else 1)
            moved += 4 * layer.weight.numel() * (3 if training else 1)
        elif isinstance(layer, nn.AdaptiveAvgPool3d):
            moved += 4 * x.numel() * (2 if training else 1)

    for layer in plain.modules():
        layer.register_forward_hook(note)
    plain(torch.ones(N, network.in_planes, *size))
    mode = "training step" if training else "forward"
    workload = Workload("network", mode, "float32", (N, network.in_planes, *size), network=network)  # type: ignore[arg-type]
    if training:
        moved += 28 * sum(p.numel() for p in plain.parameters())
    assert encoder.cost(workload) == floor.Cost(flops, moved)


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_the_floor_writes_a_weights_gradient_in_float32(precision: str) -> None:
    """Counted by hand: a 3³ kernel from 2 to 3 channels on a map of 4³, whose taps all read input."""
    layer = floor.Convolution(2, 3, (4, 4, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1))
    e = floor.ITEMSIZE[precision.split()[0]]
    x, y, weight = 5 * 2 * 64, 5 * 3 * 64, 3 * 2 * 27
    assert layer.cost(5, e, training=False).bytes == e * (x + y + weight)
    into_x, into_weight = e * (x + y + weight), e * (x + y) + 4 * weight
    assert layer.cost(5, e, training=True).bytes == e * (x + y + weight) + into_x + into_weight
    first = dataclasses.replace(layer, first=True)
    assert first.cost(5, e, training=True).bytes == e * (x + y + weight) + into_weight


def test_the_floor_is_flops_over_rate_plus_bytes_over_bandwidth() -> None:
    machine = record.Machine("cpu", "", None, None, "", "", None, None, None, 4.0, (MatmulRate("bfloat16", 8.0),))
    workload = Workload("network", "forward", "bfloat16 autocast", (1, 1), flops=16, least_bytes=12)
    assert floor.seconds(workload, machine) == 16 / 8 + 12 / 4
    assert floor.seconds(dataclasses.replace(workload, precision="float32"), machine) is None
    assert floor.seconds(dataclasses.replace(workload, precision="float32", flops=0), machine) == 3
    assert floor.seconds(workload, dataclasses.replace(machine, copy_bandwidth=None)) is None


# ------------------------------------------------------------------------------------------------------ memory


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return outputs

    def _gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


def test_peak_memory_on_a_cpu_is_that_of_the_storages_alive() -> None:
    def call() -> None:
        a, b = torch.empty(1_000_000), torch.empty(500_000)
        del a
        c = torch.empty(250_000, dtype=torch.float64)
        del b, c

    assert peak_bytes(call, CPU) == 6_000_000


@pytest.mark.parametrize("grad", [False, True])
def test_peak_memory_within_a_hundredth_of_the_storages_alive(grad: bool) -> None:
    """Without convolutions, because oneDNN takes memory from PyTorch that no operation returns."""
    layers = nn.Sequential(*(layer for _ in range(3) for layer in (nn.InstanceNorm3d(4, affine=True), nn.PReLU(4))))
    x = torch.randn(2, 4, 20, 21, 22)
    with torch.set_grad_enabled(grad):
        layers(x)
        counted = peak_bytes(lambda: layers(x), CPU)
        with Alive() as alive:
            y = layers(x)
    assert counted == pytest.approx(alive.peak, rel=0.01)
    assert counted == pytest.approx((6 if grad else 2) * y.nbytes, rel=0.01)


def test_storages_that_are_shared_count_once() -> None:
    x = torch.empty(100)
    assert held_bytes([x, x.view(10, 10), x[:3], torch.empty(5)]) == 420
