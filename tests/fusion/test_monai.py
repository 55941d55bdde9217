"""MONAI's own ways to make and run a network, accelerated: bundles, sliding windows, Auto3DSeg, MetaTensor."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data.meta_tensor import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets.segresnet_ds import SegResNetDS
from support.backends import launches_replaced
from support.plain import assert_all_near, assert_near
from torch import Tensor, nn

import fastenc
from fastenc.commands import third_party
from fastenc.fusion import deferred

UNET = {"_target_": "UNet", **third_party.MONAI_UNET, "num_res_units": 2}
PAIRS = 9
BUNDLE = {
    "device": "$torch.device('cpu')",
    "network_def": UNET,
    "network": "$@network_def.to(@device)",
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [8, 8, 8], "sw_batch_size": 2, "overlap": 0.25},
    "outputs": "$@inferer(@inputs, @network.eval())",
    "inputs": "$torch.linspace(0, 1, 1440).view(1, 1, 12, 12, 10)",
}
OVERRIDE = {"_target_": "fastenc.accelerate", "model": "$@network_def.to(@device)"}


def twins(untouched: nn.Module) -> tuple[nn.Module, nn.Module]:
    return fastenc.accelerate(copy.deepcopy(untouched)), untouched


def unet() -> nn.Module:
    return third_party.monai()["UNet"]().eval()


def tagged(x: Tensor) -> MetaTensor:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    return MetaTensor(x, affine=affine, meta={"filename": "a.nii"})


def assert_tagged(found: Any) -> None:
    assert type(found) is MetaTensor
    assert found.meta["filename"] == "a.nii"
    assert found.affine[2, 2] == 3.0


# ---------------------------------------------------------------------------------------------------------- bundles


def test_network_of_a_config() -> None:
    """The network inside the call, as a config names both."""
    parser = ConfigParser({"network": {"_target_": "fastenc.accelerate", "model": UNET}})
    network = parser.get_parsed_content("network")
    assert network.accelerated.count("fused") == PAIRS
    assert type(network).__name__ == "UNet"


def test_override_of_a_bundle(tmp_path: Path) -> None:
    """As `monai.bundle run --network` overrides it; every other part of the bundle gets the accelerated network."""
    file = tmp_path / "configs" / "train.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"imports": ["$import torch"], **BUNDLE, "initialize": [], "run": ["$@outputs"]}))
    found = []
    for overrides in ({}, {"network": OVERRIDE}):
        workflow = ConfigWorkflow(str(file), workflow_type="train", meta_file=None, logging_file=False, **overrides)
        torch.manual_seed(0)
        workflow.initialize()
        workflow.run()
        content = workflow.parser.get_parsed_content
        assert content("network") is content("network_def")
        assert hasattr(content("network"), "accelerated") == bool(overrides)
        found.append(content("outputs"))
    assert torch.equal(*found)


# -------------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_sliding_windows(mode: str) -> None:
    """Overlapping windows; the last batch of them is smaller."""
    net, untouched = twins(unet())
    inferer = SlidingWindowInferer((8, 8, 8), sw_batch_size=4, overlap=0.25, mode=mode)
    x = tagged(torch.randn(1, 1, 14, 8, 20))
    with torch.inference_mode():
        expected = inferer(x, untouched)
        assert torch.equal(inferer(x, net), expected)
        with launches_replaced(), mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs:
            found = inferer(x, net)
    windows = 2 * 1 * 3
    assert pairs.call_count == PAIRS * -(-windows // 4)
    assert_tagged(found)
    assert_near(found.as_tensor(), expected.as_tensor().double())


# -------------------------------------------------------------------------------------------------------- Auto3DSeg


@pytest.fixture(scope="module")
def segresnet() -> nn.Module:
    """As Auto3DSeg configures it, narrower; without apex, MONAI takes torch's InstanceNorm3d for INSTANCE_NVFUSER."""
    torch.manual_seed(0)
    options: Any = {"init_filters": 4, "blocks_down": [1, 2, 2, 4, 4], "norm": "INSTANCE_NVFUSER", "dsdepth": 4}
    with pytest.warns(UserWarning, match="use nn.InstanceNorm3d instead"):
        return SegResNetDS(in_channels=1, out_channels=2, **options)


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of deep supervision and every gradient."""
    outputs = net(x)
    sum(y.double().square().mean() for y in outputs).backward()
    found = [*(y.detach() for y in outputs), *(parameter.grad for parameter in net.parameters())]
    net.zero_grad()
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_segresnet_of_auto3dseg_trains(segresnet: nn.Module, layout: torch.memory_format) -> None:
    """Auto3DSeg lays the network and the images out in channels-last, if its config does not say otherwise."""
    net, untouched = twins(copy.deepcopy(segresnet).to(memory_format=layout))
    summary = net.accelerated
    assert summary.count("fused") == len(summary) == 34
    x = tagged(torch.randn(2, 1, 32, 32, 32).to(memory_format=layout))
    expected = step(untouched, x)
    found = step(net, x)
    assert len(found) == 4 + len(list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    with launches_replaced(), mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs:
        found = step(net, x)
    assert pairs.call_count == 34
    for y in found[:4]:
        assert_tagged(y)
    assert_all_near([y.as_subclass(Tensor) for y in found], [y.as_subclass(Tensor).double() for y in expected])


def test_segresnet_of_auto3dseg_infers(segresnet: nn.Module) -> None:
    """In eval mode it gives one output instead of four."""
    net, untouched = twins(copy.deepcopy(segresnet).eval())
    inferer = SlidingWindowInferer((32, 32, 32), sw_batch_size=2, overlap=0.5)
    x = tagged(torch.randn(1, 1, 48, 32, 32))
    with torch.no_grad():
        expected = inferer(x, untouched)
        assert torch.equal(inferer(x, net), expected)
        with launches_replaced():
            assert_near(inferer(x, net).as_tensor(), expected.as_tensor().double())
