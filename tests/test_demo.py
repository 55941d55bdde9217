"""The demo: its data, its options, and a short run of the whole."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from fastenc import demo, demo_data
from fastenc.__main__ import main


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
    assert any("interpreted" in route for route in rows)
    assert len(record["training"]["routes"]) == 2
    assert all(len(result["loss"]) == 3 for result in record["training"]["routes"])
    assert (tmp_path / demo.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert "plain PyTorch" in capsys.readouterr().out


def test_routes_that_disagree_are_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastenc.demo_routes.OUTPUT_TOLERANCE", -1.0)
    assert demo.run(options(tmp_path, "--steps", "1", "--batch", "1")) == 1


@pytest.mark.parametrize("option", ["--steps", "--batch"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_bad_numbers_name_the_option(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", option, value])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert option in message
    assert value in message


def test_unwritable_folder_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.run(options(tmp_path / "file" / "folder")) == 2
    captured = capsys.readouterr()
    assert "--out" in captured.err
    assert captured.out == ""
