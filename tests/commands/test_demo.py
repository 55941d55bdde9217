"""The demo: its data, its options, and a short run of the whole."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastenc.__main__ import main
from fastenc.commands import demo, demo_data, demo_routes


@pytest.fixture(scope="module")
def volumes() -> np.ndarray:
    return demo_data.mni152()


def options(out: Path, *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--out", str(out), *extra])


def voxels(patches: demo_data.Patches, shape: tuple[int, ...]) -> np.ndarray:
    """Which voxels of the volume any of the patches holds."""
    held = np.zeros(shape, dtype=bool)
    for corner in patches.corners:
        held[demo_data.cut(list(corner))[1:]] = True
    return held


def test_held_out_patches_share_no_voxel_with_training(volumes: np.ndarray) -> None:
    generator = np.random.default_rng(1)
    training, held_out = (
        demo_data.draw(volumes, part, 200, generator) for part in (demo_data.TRAINING, demo_data.HELD_OUT)
    )
    assert not (voxels(training, volumes.shape[1:]) & voxels(held_out, volumes.shape[1:])).any()


def test_targets_are_the_mean_of_the_tissue_maps(volumes: np.ndarray) -> None:
    patches = demo_data.draw(volumes, demo_data.HELD_OUT, 5, np.random.default_rng(2))
    for corner, fractions in zip(patches.corners, patches.fractions.numpy(), strict=True):
        expected = volumes[demo_data.cut(list(corner))][1:].mean(axis=(1, 2, 3), dtype=np.float64)
        np.testing.assert_allclose(fractions, expected, rtol=1e-5)


def test_a_short_run_writes_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(options(tmp_path, "--steps", "3", "--batch", "2")) == 0
    record = json.loads((tmp_path / demo.RECORD).read_text(encoding="utf-8"))
    rows = {row["route"]: row for row in record["encoding"]["rows"]}
    assert record["agreement"]["agree"]
    assert all(row["agrees"] for row in rows.values())
    assert any("executed on this CPU" in route for route in rows)
    assert len(record["training"]["routes"]) == 2
    assert all(len(result["loss"]) == 3 for result in record["training"]["routes"])
    assert (tmp_path / demo.FIGURE).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "plain PyTorch" in printed.out
    assert "encoding: plain PyTorch" in printed.err
    assert "training, fastenc, eager: step 1 of 3, loss " in printed.err


def test_tissue_fractions_are_learned(volumes: np.ndarray) -> None:
    """The demo's result at its default options, on fastenc's route. Plain PyTorch takes the same steps."""
    defaults = options(Path())
    generator = np.random.default_rng(demo.SEED)
    training, held_out = (
        demo_data.draw(volumes, part, count, generator)
        for part, count in (
            (demo_data.TRAINING, demo.TRAINING_PATCHES),
            (demo_data.HELD_OUT, demo.HELD_OUT_PATCHES),
        )
    )
    learned = demo_routes.train(
        demo_routes.Route("fastenc, eager", "eager"),
        demo.SMALL,
        (training.inputs, training.fractions),
        (held_out.inputs, held_out.fractions),
        steps=defaults.steps,
        batch=defaults.batch,
        device=torch.device("cpu"),
        seed=demo.SEED,
        on_step=lambda step, loss: None,
    )
    assert min(learned.r2) > 0.75


def test_r2_against_its_definition() -> None:
    true = torch.tensor([[1.0, 0.0], [2.0, 2.0], [3.0, 4.0]])
    assert demo_routes.r2(true, true) == [1, 1]
    assert demo_routes.r2(true.mean(0).expand(3, 2), true) == [0, 0]
    assert demo_routes.r2(true + torch.tensor([1.0, -2.0]), true) == [1 - 3 / 2, 1 - 12 / 8]


def test_plain_network_is_the_network() -> None:
    """The same seed gives bitwise the same parameters with the same names, and the same output."""
    plain, network = (
        route.network({**demo.SMALL, "layers": [2, 1]}, seed=3)
        for route in demo_routes.available(torch.device("cpu"))[0]
    )
    assert not any(type(module).__module__.startswith("fastenc") for module in plain.modules())
    expected, found = plain.state_dict(), network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    x = torch.randn(2, 2, 9, 8, 7)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-6)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(250_000)  # 1 MB
        b = a + 1
        del a
        return b.exp()

    assert demo_routes.peak_bytes(call, torch.device("cpu")) == pytest.approx(2e6, rel=0.01)


def test_a_wrong_kernel_is_seen(volumes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executed route with one gradient off by a part in fifty disagrees."""
    patches = demo_data.draw(volumes, demo_data.HELD_OUT, 2, np.random.default_rng(demo.SEED))
    x = patches.inputs[demo.EXECUTED]
    assert demo_routes.executed(x, demo.SEED).agrees
    original = demo_routes._output_and_gradients

    def one_gradient_off(route: demo_routes.Route, *arguments: Any) -> dict[str, torch.Tensor]:
        tensors = original(route, *arguments)
        if route.backend == "triton":
            tensors["netbody.2.conv_scale.mconv.1.weight"] *= 1.02
        return tensors

    monkeypatch.setattr(demo_routes, "_output_and_gradients", one_gradient_off)
    assert demo_routes.executed(x, demo.SEED).agrees is False


def test_a_route_that_fails_is_a_row() -> None:
    """A route that raises gets a row that disagrees; the others are still measured."""
    routes = [demo_routes.Route("plain PyTorch", None), demo_routes.Route("fastenc, Triton", "triton")]
    x = torch.randn(1, 2, 9, 8, 7)
    plain, triton = demo_routes.encode(routes, demo.SMALL, x, torch.device("cpu"), demo.SEED)
    assert plain.agrees
    assert plain.milliseconds
    assert triton.agrees is False
    assert "not interpreted" in triton.note


def test_routes_that_disagree_are_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastenc.commands.demo_routes.OUTPUT_TOLERANCE", -1.0)
    monkeypatch.setattr(demo, "EXAMPLE_1", {**demo.SMALL, "in_planes": 3})
    assert demo.run(options(tmp_path, "--steps", "1", "--batch", "1")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the GPU that the option asks for")
def test_cuda_requested_on_a_machine_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(options(tmp_path, "--device", "cuda")) == 2
    message = capsys.readouterr().err
    assert "--device cuda" in message
    assert len(message.splitlines()) == 1


def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "EXTRAS", ("rich", "no_such_package"))
    assert demo.run(options(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "no_such_package not installed: pip install 'fastenc[demo]'" in message


@pytest.mark.parametrize("option", ["--steps", "--batch"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_numbers_name_the_option(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert value in message


def test_unwritable_folder_is_reported_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.run(options(tmp_path / "file" / "folder")) == 2
    captured = capsys.readouterr()
    assert "--out" in captured.err
    assert captured.out == ""
