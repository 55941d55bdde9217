"""Tensors on a GPU that is not the current one: every launch is made with theirs current and on its stream."""

import threading

import pytest
import torch
from support.fake_gpu import Devices, OnSecond, taken_for_cuda, two_gpus
from support.plain import small_twins
from torch import Tensor, nn

from fastenc import route
from fastenc.functional import InstanceNormPReLU, launchers

SPATIAL = {"one pass": (4, 5, 6), "split": (33, 33, 33)}
LAUNCHES = {"one pass": (1, 2), "split": (2, 3)}  # of the forward and of the backward, the sum over n included


def leaves(spatial: tuple[int, ...]) -> list[Tensor]:
    x, weight = torch.randn(2, 3, *spatial), torch.ones(3)
    return [tensor.as_subclass(OnSecond).requires_grad_() for tensor in (x, weight)]


def elsewhere(devices: Devices, count: int) -> bool:
    """Whether `count` launches were made since the last question, all of them where the tensors are."""
    found, devices.launches = devices.launches, []
    return found == [(1, devices.stream(1))] * count and devices.current == 0


@pytest.mark.parametrize("plan", SPATIAL)
def test_launches_where_the_tensors_are(plan: str) -> None:
    """The forward runs here, the backward in its own thread, which starts on GPU 0 as every thread does."""
    forward, backward = LAUNCHES[plan]
    with two_gpus() as devices:
        y = InstanceNormPReLU.apply(*leaves(SPATIAL[plan]), None, 0.1, (1e-5, None))
        assert elsewhere(devices, forward)
        seen = []

        def run() -> None:
            y.sum().backward()
            seen.append(devices.current)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == [0]
        assert elsewhere(devices, backward)


def test_a_launch_that_raises_leaves_the_current_device() -> None:
    with two_gpus() as devices:
        x, weight = leaves(SPATIAL["one pass"])
        devices.error = RuntimeError("Triton Error [CUDA]: invalid argument")
        forward, backward = launchers()
        with pytest.raises(RuntimeError, match="invalid argument"):
            forward(x, weight, None, 0.1, 1e-5)
        assert devices.current == 0
        with pytest.raises(RuntimeError, match="invalid argument"):
            backward(torch.ones_like(x), x, weight, None, 0.1, torch.ones(2, 6))
        assert devices.current == 0
        devices.error = None
        forward(x, weight, None, 0.1, 1e-5)
        assert elsewhere(devices, 1)


def test_tensors_on_the_current_device_need_no_change() -> None:
    with two_gpus() as devices:
        devices.exchange(1)
        x, weight = leaves(SPATIAL["one pass"])
        launchers()[0](x, weight, None, 0.1, 1e-5)
        assert devices.launches == [(1, devices.stream(1))]
        assert devices.current == 1


@pytest.mark.parametrize("name", ["mconv.0.weight", "mconv.0.bias", "mconv.1.weight"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_parameter_elsewhere_gives_the_error_that_torch_gives(name: str, recompute: bool) -> None:
    """Here "meta" stands for another device. (To a convolution's weight torch does not object there.)"""
    net, plain = small_twins(torch.float32)
    layer, its = net.netbody[1].conv_scale, plain.netbody[1].conv_scale
    layer.recompute = recompute
    x = torch.randn(2, 2, 4, 5, 6)
    errors = []
    for module in (its, layer):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(module.get_parameter(name).to("meta")))
        with taken_for_cuda():
            with pytest.raises((RuntimeError, NotImplementedError)) as caught:
                module(x)
            assert not route._faults  # no kernel was tried
        errors.append(caught)
    assert errors[0].type is errors[1].type
    assert str(errors[0].value) == str(errors[1].value)
