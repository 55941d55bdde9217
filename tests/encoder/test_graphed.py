"""Graphed inference, as far as a machine without CUDA can see it: what it refuses, and what it does around a graph.

A recording is emulated by running the model again at each replay, into the same output.
"""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from support.plain import small_input, small_twins
from torch import Tensor, nn

from fastenc.graphed import Graphed, graphed

MODULE: Any = import_module("fastenc.graphed")  # the package's attribute of this name is the function


class Recording:
    """Stands in for `graph.record`: counts recordings and replays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        output = run()

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return replay, output


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    seen = Recording()
    monkeypatch.setattr(MODULE, "record", seen)
    return seen


def model_and_sample() -> tuple[nn.Module, Tensor]:
    return small_twins(torch.float32)[0].eval(), small_input(dtype=torch.float32)


def made(model: nn.Module, sample: Tensor, borrow: bool = False) -> Graphed:
    return Graphed(model, (sample,), {}, None, borrow)


def test_inputs_like_the_sample_are_replayed(recording: Recording) -> None:
    model, sample = model_and_sample()
    run = made(model, sample)
    x = torch.randn_like(sample)
    first, second = run(x), run(sample)
    assert recording.recordings == 1
    assert recording.replays == 2
    assert torch.equal(first, model(x).detach())  # copied out: the second call left it alone
    assert torch.equal(second, model(sample).detach())


def test_a_borrowed_output_is_the_graphs_own(recording: Recording) -> None:
    model, sample = model_and_sample()
    run = made(model, sample, borrow=True)
    first = run(sample)
    assert run(2 * sample) is first
    assert torch.equal(first, model(2 * sample).detach())


def test_the_sample_is_copied(recording: Recording) -> None:
    model, sample = model_and_sample()
    before = sample.clone()
    made(model, sample)(torch.randn_like(sample))
    assert torch.equal(sample, before)


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x[:, :, :-1], lambda x: x.double()])
def test_other_inputs_run_ungraphed(change: Callable[[Tensor], Tensor], recording: Recording) -> None:
    model, sample = model_and_sample()
    run, x = made(model, sample), change(sample)
    if x.dtype == sample.dtype:
        assert torch.equal(run(x), model(x).detach())
    else:
        with pytest.raises(RuntimeError):  # torch's own, for weights of another dtype
            run(x)
    assert recording.replays == 0


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return x * float(scale.sum())


def test_an_argument_that_is_an_array(recording: Recording) -> None:
    """`==` of two arrays is no bool. The same array is replayed, any other runs without the graph."""
    sample, scale = torch.randn(2, 3), numpy.array([1.0, 2.0])
    run = Graphed(Scaled(), (sample, scale), {}, None, False)
    assert torch.equal(run(sample, scale), 3 * sample)
    assert recording.replays == 1
    assert torch.equal(run(sample, numpy.array([1.0, 3.0])), 4 * sample)
    assert recording.replays == 1


def test_refresh_takes_new_weights_into_the_same_graph(recording: Recording) -> None:
    model, sample = model_and_sample()
    run = made(model, sample)
    old = run(sample)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert torch.equal(run(sample), old)
    run.refresh()
    assert torch.equal(run(sample), model(sample).detach())
    assert recording.recordings == 1
    model.fc = nn.Linear(4, 3).eval()
    run.refresh()
    assert recording.recordings == 2
    assert torch.equal(run(sample), model(sample).detach())


def test_an_error_inside_the_capture_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Callable[[], Any], device: torch.device) -> None:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    model, sample = model_and_sample()
    expected = model(sample).detach()
    monkeypatch.setattr(MODULE, "record", fails)
    with pytest.raises(RuntimeError, match="could not be captured") as error:
        made(model, sample)
    assert "stream is capturing" in str(error.value)
    assert "fastenc.freeze" in str(error.value)
    assert torch.equal(model(sample).detach(), expected)


def test_synchronizing_calls_are_found_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails breaks more than itself, so that none must begin."""
    cuda = mock.MagicMock()
    modes: list[object] = [1]
    cuda.get_sync_debug_mode = lambda: modes[-1]
    cuda.set_sync_debug_mode = modes.append
    monkeypatch.setattr(MODULE.torch, "cuda", cuda)
    runs = []

    def waits() -> None:
        runs.append(modes[-1])
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        MODULE.record(waits, torch.device("cpu"))
    assert not cuda.graph.called
    assert runs == [1, 1, 1, "error"], "the other calls are as the user has them"
    assert modes == [1, "error", 1]
    MODULE.record(lambda: runs.append(modes[-1]), torch.device("cpu"))
    assert cuda.graph.called
    assert runs[4:] == [1, 1, 1, "error", 1]


def test_out_of_memory_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Callable[[], Any], device: torch.device) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(MODULE, "record", fails)
    with pytest.raises(torch.OutOfMemoryError):
        made(*model_and_sample())


def test_a_copy_is_recorded_from_a_copy_of_the_model(recording: Recording) -> None:
    model, sample = model_and_sample()
    run = made(model, sample)
    twin = copy.deepcopy(run)
    assert recording.recordings == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    run.refresh()
    assert torch.equal(twin(sample), small_twins(torch.float32)[0](sample).detach())


def test_bad_arguments_say_what_to_do() -> None:
    model, sample = model_and_sample()
    with pytest.raises(ValueError, match=r"sample.*CUDA.*cpu.*fastenc\.freeze"):
        graphed(model, sample)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        graphed(model.train(), sample)
    model.eval()
    with pytest.raises(ValueError, match=r"sample requires a gradient.*sample\.detach\(\)"):
        graphed(model, sample.requires_grad_())
    with pytest.raises(TypeError, match=r"sample.*list"):
        graphed(model, [1, 2])
    with pytest.raises(ValueError, match="sample holds no tensor"):
        graphed(model, (1, 2))


class TwoInputs(nn.Module):
    """Two tensors, one of them by keyword, and an option."""

    def forward(self, x: Tensor, scales: dict[str, Tensor], *, shift: Tensor, negative: bool = False) -> Tensor:
        y = x * scales["all"] + shift
        return -y if negative else y


def test_several_tensors_and_keywords(recording: Recording) -> None:
    model = TwoInputs().eval()
    x, scale, shift = torch.randn(3, 2, 4).unbind()
    run = Graphed(model, (x, {"all": scale}), {"shift": shift}, None, False)
    for values in torch.randn(2, 3, 2, 4):
        x, scale, shift = values.unbind()
        assert torch.equal(run(x, {"all": scale}, shift=shift), x * scale + shift)
    assert recording.replays == 2
    for arguments, keywords in (
        ((x, {"all": scale}), {"shift": shift, "negative": True}),
        ((x, {"all": scale}), {"shift": shift[:1]}),
        ((x, {"all": scale.double()}), {"shift": shift}),
        ((x, {"all": scale, "other": scale}), {"shift": shift}),
    ):
        assert torch.equal(run(*arguments, **keywords), model(*arguments, **keywords))
    assert recording.replays == 2
    other = Graphed(model, (x, {"all": scale}), {"shift": shift, "negative": True}, None, False)
    assert torch.equal(other(x, {"all": scale}, shift=shift, negative=True), -(x * scale + shift))
    assert recording.replays == 3
    assert torch.equal(other(x, {"all": scale}, shift=shift, negative=False), x * scale + shift)
    assert recording.replays == 3
    assert repr(other) == "Graphed(TwoInputs, dtype=None, shapes=[(2, 4), (2, 4), (2, 4)])"


@pytest.mark.parametrize("refreshed_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("called", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_inference_mode(made_in: Any, called: Any, refreshed_in: Any, recording: Recording) -> None:
    """Its memory is written to at every call and refresh, in inference mode and outside."""
    model, _ = model_and_sample()
    with made_in():
        run = made(model, small_input(dtype=torch.float32))
    x = torch.randn_like(small_input(dtype=torch.float32))
    for _ in range(2):
        with called():
            run(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        with refreshed_in():
            run.refresh()
        assert torch.equal(run(x), model(x).detach())
    assert recording.recordings == 1


def test_a_changed_option_is_recorded_again(recording: Recording) -> None:
    model, sample = model_and_sample()
    run = made(model, sample)
    assert run.refresh()
    model.netbody[1].conv_scale.mconv[0].eps = 0.5
    assert not run.refresh()
    assert recording.recordings == 2
    assert torch.equal(run(sample), model(sample).detach())
