"""`clients`: records of nnU-Net's and MONAI's U-Nets, their floor, and gradients that cannot be compared."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastenc.bench.__main__ import main
from fastenc.bench.baselines import third_party as baselines
from fastenc.bench.baselines import third_party_networks
from fastenc.bench.commands import compare, gpu, third_party
from fastenc.bench.engine import measure, record, session
from fastenc.bench.engine.floor import Cost
from fastenc.bench.engine.record import MatmulRate

SHAPE = (2, 1, 8, 8, 8)
TINY = ["--channels", "4", "8", "--size", "8", "8", "8", "--dtype", "fp32", "--device", "cpu"]
network = pytest.mark.parametrize("name", third_party.NAMES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rounds than needed, no pictures, and ceilings that cost nothing."""
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    monkeypatch.setattr(compare, "draw", lambda session: None)
    monkeypatch.setattr(session, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(session, "matmul_rates", lambda dtypes, device: tuple(MatmulRate(d, 1e11) for d in dtypes))


def test_every_network_in_every_mode_is_compared_and_timed(tmp_path: Path) -> None:
    asked = ["--mode", "infer", "train", "--peers", "fastenc", "eager channels_last_3d", "--out", str(tmp_path)]
    assert main(["clients", *TINY, *asked]) == 0
    (path,) = tmp_path.glob("*.json")
    written = record.load(path)
    assert written.complete
    assert len(written.workloads) == 6
    for workload in written.workloads:
        assert workload.client is not None
        assert workload.client.channels == (4, 8)
        assert [(result.peer, result.status) for result in workload.results] == [
            ("eager", "ok"),
            ("eager channels_last_3d", "ok"),
            ("fastenc", "ok"),
        ]
        assert " fused, " in workload.results[2].note
        assert workload.flops
        assert workload.least_bytes
        assert workload.floor == pytest.approx(workload.flops / 1e11 + workload.least_bytes / 1e10)


@network
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_floor_counts_what_the_network_does(name: str, mode: str) -> None:
    """Convolutions of ones with ones, transposed or not, count their multiplications. All taps here read input."""
    asked = third_party.workload(name, mode, "fp32", SHAPE, (4, 8))
    training, flops, moved = mode == "train", 0, 0

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal flops, moved
        (x,) = inputs
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            ones, weight = torch.ones_like(x), torch.ones_like(layer.weight)
            sums = (
                F.conv_transpose3d(ones, weight, None, layer.stride, layer.padding, layer.output_padding)
                if isinstance(layer, nn.ConvTranspose3d)
                else F.conv3d(ones, weight, None, layer.stride, layer.padding)
            )
            passes = (2 if layer.in_channels == 1 else 3) if training else 1
            flops += passes * 2 * int(sums.sum())
            moved += 4 * passes * (x.numel() + y.numel() + weight.numel())
        elif isinstance(layer, nn.InstanceNorm3d):
            moved += 4 * x.numel() * (5 if training else 2)

    assert asked.client is not None
    plain = third_party_networks.build(asked.client)
    for layer in plain.modules():
        layer.register_forward_hook(note)
    plain(torch.randn(SHAPE))
    if training:
        moved += 28 * sum(parameter.numel() for parameter in plain.parameters())
    assert baselines.SUITE.cost(asked) == Cost(flops, moved)


@network
def test_idle_biases_are_those_whose_gradients_are_zero(name: str) -> None:
    asked = third_party.workload(name, "train", "fp32", SHAPE, (4, 8))
    assert asked.client is not None
    torch.manual_seed(0)
    net = third_party_networks.build(asked.client).double()
    net(torch.randn(SHAPE, dtype=torch.float64)).square().sum().backward()
    norms = {each: float(p.grad.norm()) for each, p in net.named_parameters() if p.grad is not None}
    zero = {each for each, norm in norms.items() if norm < 1e-9 * max(norms.values())}
    assert zero == third_party_networks.idle_biases(asked.client, SHAPE)
    assert zero
    exact = baselines.SUITE.exact(baselines.Inputs(asked, torch.device("cpu"))).numbers()
    assert exact.keys() == norms.keys() - zero | {"output"}


@network
def test_a_layer_of_two_names_is_one(name: str) -> None:
    """nnU-Net registers every layer twice, but each parameter is stepped once, in either layout."""
    asked = third_party.workload(name, "train", "fp32", SHAPE, (4, 8))
    inputs = baselines.Inputs(asked, torch.device("cpu"))
    for parameters, optimizer in (
        (inputs.parameters, inputs.adamw),
        (inputs.channels_last, inputs.adamw_channels_last),
    ):
        net = inputs.holding(inputs.plain, parameters)
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(list(net.parameters()))
        assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in net.parameters()}
    weights = [parameter for parameter in inputs.channels_last.values() if parameter.dim() == 5]
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_a_network_that_is_wrong_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated = baselines.accelerated

    def wrong(inputs: baselines.Inputs) -> nn.Module:
        made = accelerated(inputs)
        made.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        return made

    monkeypatch.setattr(baselines, "accelerated", wrong)
    asked = ["--networks", "UNet", "--mode", "infer", "--peers", "fastenc", "--out", str(tmp_path)]
    assert main(["clients", *TINY, *asked]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--size", "9", "8", "8"], "nnU-Net PlainConvUNet: RuntimeError: Sizes of tensors must match"),
        (["--size", "2", "2", "2"], "nnU-Net PlainConvUNet: ValueError: Expected more than 1 spatial element"),
        (["--out", "/dev/null/folder"], "--out: cannot write to /dev/null/folder"),
    ],
)
def test_impossible_runs_are_refused_in_one_line_before_any_work(
    change: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "Session", None)
    assert main(["clients", *TINY, "--networks", "PlainConvUNet", "--out", str(tmp_path), *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastenc bench clients: {words}")
    assert error.count("\n") == 1


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["clients", *TINY, "--networks", "UNet"]) == 2
    assert capsys.readouterr().err == "fastenc bench clients: monai is not installed: pip install monai\n"


def test_the_networks_of_the_gpu_run_are_whole() -> None:
    """128³, batch 2, bfloat16, a whole training step. The networks have the channels that the record states."""
    asked = [each for each in gpu.plan(torch.device("cuda")) if each.client is not None]
    assert [each.client.name for each in asked if each.client is not None] == list(third_party_networks.CHANNELS)
    promised = gpu.plan(torch.device("cuda"))[: gpu.PROMISED]
    assert asked[0] in promised
    assert asked[1] in promised
    for each in asked:
        assert (each.mode, each.precision, each.shape) == ("training step", "bfloat16 autocast", (2, 1, 128, 128, 128))
        assert each.client is not None
        with torch.device("meta"):
            built = third_party_networks.build(each.client)
        widths = dict.fromkeys(layer.out_channels for layer in built.modules() if isinstance(layer, nn.Conv3d))
        assert list(widths)[:5] == sorted(set(each.client.channels)), "from the first stage down"
