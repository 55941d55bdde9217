"""accelerate on MONAI's and nnU-Net's own networks, small: what fuses, and that numbers and checkpoints stay."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from support.backends import eager_norms, launches_replaced, taken
from support.plain import assert_near
from torch import Tensor, nn

import fastenc
from fastenc.__main__ import main
from fastenc.commands import third_party
from fastenc.fusion import deferred

NETWORKS = {**third_party.monai(), **third_party.nnunet()}
# fused, alone
COUNTS = {
    "UNet": (9, 0), "UNet, dropout": (4, 0), "UNet, NAD": (6, 0), "BasicUNet": (18, 0), "DynUNet": (10, 0),
    "DynUNet, residual": (10, 3), "SegResNet, INSTANCE": (25, 0), "SegResNet": (0, 0), "UNETR": (16, 5),
    "PlainConvUNet": (10, 0), "ResidualEncoderUNet": (21, 2), "SwinUNETR": (20, 6),
    "AttentionUnet, instance norm": (7, 2), "VNet, instance norm": (23, 1), "SegResNetDS2, VISTA3D": (42, 0),
    "DiNTS": (6, 13), "ResEnc M, L, XL": (58, 1),
}  # fmt: skip
BIASES = {
    "UNet": 9, "UNet, dropout": 4, "UNet, NAD": 6, "BasicUNet": 18, "PlainConvUNet": 10, "ResidualEncoderUNet": 21,
    "AttentionUnet, instance norm": 9, "VNet, instance norm": 4, "ResEnc M, L, XL": 58,
}  # fmt: skip
# One calls torch.jit.isinstance, the others branch on values: they do not compile as one graph, touched or not.
BROKEN = {"BasicUNet", "DiNTS", "SwinUNETR"}
LARGE = {"SwinUNETR", "VNet, instance norm", "SegResNetDS2, VISTA3D", "DiNTS", "ResEnc M, L, XL"}
network = pytest.mark.parametrize("name", NETWORKS)


def twins(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network accelerated, an untouched copy, and an input. No dropout: it follows the layout."""
    untouched = NETWORKS[name]().eval()
    return (
        fastenc.accelerate(copy.deepcopy(untouched)),
        untouched,
        torch.randn(1, 1, *3 * (third_party.SIZES.get(name, 8),)),
    )


def tensor(y: Any) -> Tensor:
    """The network's output; of the two of VISTA3D's, the first."""
    return y if isinstance(y, Tensor) else y[0]


def gradients(net: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output of net, or of what it was compiled to, and the gradients of every parameter that has one."""
    y = tensor(net(x) if run is None else run(x))
    y.double().square().mean().backward()
    found = [y.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]
    net.zero_grad()
    return found


def fused(name: str) -> Any:
    """ "fused"; with the formula in place of the kernels for networks too large to interpret."""
    return launches_replaced() if name in LARGE else taken("fused")


@network
def test_what_fuses(name: str) -> None:
    summary = twins(name)[0].accelerated
    assert (summary.count("fused"), summary.count("alone")) == COUNTS[name]
    assert summary.count("left") == 0


@network
def test_eager_route_is_bitwise_equal(name: str) -> None:
    net, untouched, x = twins(name)
    for found, expected in zip(gradients(net, x), gradients(untouched, x), strict=True):
        assert torch.equal(found, expected)


@network
def test_fused_as_near_as_torch(name: str) -> None:
    net, untouched, x = twins(name)
    torchs = gradients(untouched, x)
    with fused(name), eager_norms() as norms:
        ours = gradients(net, x)
        assert name in LARGE or norms.call_count == 0
    assert_as_near(ours, torchs, gradients(untouched.double(), x.double()))


def assert_as_near(ours: list[Tensor], torchs: list[Tensor], truth: list[Tensor]) -> None:
    """Farther from float64 by at most as much as torch is, and 16 ULP; in a sum that cancels, of the largest sum."""
    ulp = torch.finfo(torch.float32).eps
    floor = ulp * max(value.abs().max().item() for value in truth)
    for i, value in enumerate(truth):
        mine, theirs = ((tensor[i].double() - value).norm() for tensor in (ours, torchs))
        limit = 2 * theirs + 16 * ulp * value.norm() + floor * value.numel() ** 0.5
        assert mine <= limit, f"{i}: {mine:.2e}, torch {theirs:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("name", ["DynUNet, residual", "UNETR", "ResidualEncoderUNet"])
def test_additions_are_fused(name: str) -> None:
    """As often as a norm leads to an activation through an addition, and no activation runs by itself."""
    net, _, x = twins(name)
    with taken("fused"), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "leaky_relu", None)
        fused = mock.Mock(wraps=deferred.fused)
        patch.setattr(deferred, "fused", fused)
        net(x)
    added = [call for call in fused.call_args_list if call.kwargs["residual"] is not None]
    assert len(added) == {"DynUNet, residual": 3, "UNETR": 8, "ResidualEncoderUNet": 8}[name]
    assert all(call.args[3] == 0.01 for call in added)


@network
def test_checkpoints(name: str) -> None:
    net, untouched, _ = twins(name)
    assert list(net.state_dict()) == list(untouched.state_dict())
    assert str(net) == str(untouched)
    other = NETWORKS[name]()
    other.load_state_dict(net.state_dict())
    net.load_state_dict(other.state_dict())


def test_meta_tensors() -> None:
    """What MONAI's loaders hand out: the fused route sees through it, and the output carries what it carried."""
    net, untouched, x = twins("UNet")
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    tagged = MetaTensor(x, affine=affine, meta={"filename": "a.nii"})
    with taken("fused"), eager_norms() as norms, torch.no_grad():
        found = net(tagged)
        assert norms.call_count == 0
        expected = untouched(tagged)
    assert type(found) is type(expected) is MetaTensor
    assert found.meta["filename"] == expected.meta["filename"] == "a.nii"
    assert torch.equal(found.affine, expected.affine)
    assert_near(found.as_tensor(), expected.as_tensor().double())


@pytest.mark.parametrize("name", ["UNet", "DynUNet, residual", "PlainConvUNet"])
def test_explain(name: str) -> None:
    net, _, x = twins(name)
    with taken("fused"):
        rows = list(fastenc.explain(net, x))
    assert len(rows) == len(net.accelerated)
    assert {row.route for row in rows} == {"triton"}
    assert {row.name for row in rows} == {norm.name for norm in net.accelerated}


def test_parts_fuse_too() -> None:
    """nnU-Net's encoder and decoder, called one after the other."""
    net, untouched, x = twins("PlainConvUNet")
    calls: list[Any] = []
    plain: Callable[..., Tensor] = nn.functional.leaky_relu

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return plain(*args)

    with taken("fused"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "leaky_relu", counted)
        found = net.decoder(net.encoder(x))
        assert not calls
        assert_near(found, untouched(x).double())


KEPT = Path(__file__).parents[2] / "bench" / "third_party.md"


def test_the_committed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints and writes is what the repository keeps, and counts what COUNTS does."""
    assert main(["accelerate", "--out", str(tmp_path / "table.md")]) == 0
    kept = KEPT.read_text(encoding="utf-8")
    assert kept == capsys.readouterr().out == (tmp_path / "table.md").read_text(encoding="utf-8"), (
        f"python -m fastenc accelerate --out bench/{KEPT.name} writes it again"
    )
    for name, (pairs, alone) in COUNTS.items():
        counts = f"{pairs + alone} | {pairs} | {alone} | 0 | {BIASES.get(name, 0)} | {pairs}"
        assert f"| {name} | {counts} |" in kept


def test_the_table_without_a_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "monai" else find_spec(name))
    assert main(["accelerate"]) == 2
    out, error = capsys.readouterr()
    assert "pip install monai" in error
    assert "| PlainConvUNet | 10 | 10 | 0 | 0 | 10 | 10 |" in out
    assert "BasicUNet" not in out
