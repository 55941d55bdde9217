"""The tuning sweep: it finds the best value, changes nothing, and runs in the interpreter."""

import math

import pytest
import torch

from fastenc.bench.__main__ import main
from fastenc.bench.commands import tune
from fastenc.kernels import plan
from fastenc.kernels.launch import prepared


@pytest.mark.parametrize("constant", tune.CONSTANTS, ids=str)
def test_every_value_reaches_the_plans_and_none_stays(constant: tune.Constant) -> None:
    before = constant.now
    assert before in constant.values, "the sweep compares with what is in force"
    seen = []

    def measure(shape: tune.Shape, dtype: torch.dtype, backward: bool) -> float:
        assert backward == constant.backward
        N, C, S = shape
        launch = prepared((N, C, S), (S * C, 1, C), dtype.itemsize, -1, backward)
        assert launch is not None
        seen.append((constant.now, launch[3]))
        return 1.0

    shapes = tune.SHAPES[constant.branch]
    tune.sweep(constant, shapes, measure)
    assert {value for value, _ in seen} == set(constant.values)
    assert len({str(made) for _, made in seen}) > len(shapes), "the constant decides something for these shapes"
    assert constant.now == before


def test_the_fastest_wins_and_a_failure_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    constant = tune.CONSTANTS[-1]
    slow, fast, failing = constant.values
    cost = {slow: 3.0, fast: 2.0}

    def measure(shape: tune.Shape, dtype: torch.dtype, backward: bool) -> float:
        if constant.now not in cost:
            raise RuntimeError("out of resource")
        return cost[constant.now]

    found = tune.sweep(constant, tune.SHAPES[constant.branch], measure)
    assert found[slow] == pytest.approx(3.0)
    assert found[fast] == pytest.approx(2.0)
    assert math.isinf(found[failing])
    assert "out of resource" in capsys.readouterr().err


def test_runs_interpreted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [constant for constant in tune.CONSTANTS if constant.name in ("PROGRAMS_PER_SM", "SLAB_POSITIONS")]
    monkeypatch.setattr(tune, "CONSTANTS", chosen)
    assert main(["tune", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert "PROGRAMS_PER_SM = 4: " in captured.err
    assert "say nothing of a GPU" in printed
    assert f"PROGRAMS_PER_SM, forward, split: now {plan.PROGRAMS_PER_SM}, best " in printed
    assert f"SLAB_POSITIONS[True], backward, slab: now {plan.SLAB_POSITIONS[True]}, best " in printed
    assert "failed" not in printed


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
