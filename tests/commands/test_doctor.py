"""The doctor: it says what the product decides, a wrong operation is an exit status, each warning has a cause."""

import argparse
import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import launches_replaced, taken
from torch import Tensor

from fastenc import functional, reference, route
from fastenc.__main__ import main
from fastenc.commands import doctor, self_test

RESULTS = len(self_test.LAYOUTS) * len(self_test.RESULTS)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same report on every machine; tests/gpu has the one of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it, without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return document


def run(capsys: pytest.CaptureFixture[str], as_json: bool = False) -> tuple[int, str]:
    status = doctor.run(argparse.Namespace(json=as_json))
    return status, capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- what is printed


def values(document: Any) -> list[str]:
    """Every string in the document, however deep."""
    if isinstance(document, dict):
        return [text for value in document.values() for text in values(value)]
    if isinstance(document, list):
        return [text for value in document for text in values(value)]
    return [document] if isinstance(document, str) else []


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    warning = doctor.Advice("a cause", "a remedy")
    gpu = doctor.Gpu("a GPU", "9.0", 80_000_000_000, None)
    monkeypatch.setattr(doctor, "advice", lambda *_: [warning])
    monkeypatch.setattr(doctor, "working_device", lambda: (torch.device("cpu"), "a failure"))
    assert main(["doctor", "--json"]) == 0
    document = strict(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert set(values(document)) - {document["schema"], *self_test.RESULTS} <= {
        value for value in values(document) if value in text
    }
    assert document["warnings"] == [asdict(warning)]
    assert document["versions"]["torch"] == torch.__version__
    assert len(document["self_test"]["rows"]) == RESULTS
    for row in document["self_test"]["rows"]:
        assert 0 <= row["error"] <= row["allowed"] < 1e-2
    documented = doctor.__doc__ or ""
    for name, part in {**document, "gpus": [asdict(gpu)]}.items():
        fields = part[0] if isinstance(part, list) else part if isinstance(part, dict) else {}
        assert all(field in documented for field in (name, *fields)), name


def test_what_to_paste_ends_the_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one fence, with the versions, the routes, the self-test and the causes of the warnings."""
    monkeypatch.setattr(doctor, "advice", lambda *_: [doctor.Advice("a cause", "a remedy")])
    _, text = run(capsys)
    before, paste, after = text.split("```")
    assert after == "\n"
    assert "Remedy: a remedy." in before
    for part in (f"torch {torch.__version__}", "bfloat16", "self-test", "warning: a cause"):
        assert part in paste


def test_what_this_machine_can_verify() -> None:
    report = doctor.examine()
    gpu = doctor.Gpu("a GPU", "9.0", 1 << 30, None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "python -m fastenc demo"),
        ({"gpus": (gpu,)}, "pytest tests/gpu"),
        ({"gpus": (replace(gpu, reason="too old"),)}, "python -m fastenc demo"),
        ({"versions": {**report.versions, "triton": None}}, "eager route only"),
    ]
    for changes, said in cases:
        assert said in doctor.text(replace(report, **changes))


def test_routes_are_the_products_own_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reason(x: Tensor) -> str | None:
        seen.append((x.dtype, self_test.LAYOUTS["channels_last_3d"] if x.stride(1) == 1 else torch.contiguous_format))
        return "because" if x.dtype == torch.float16 else None

    monkeypatch.setattr(route, "reason", reason)
    found = doctor.choices(torch.device("cpu"))
    assert {(choice.route, choice.reason) for choice in found if choice.dtype == "float16"} == {("eager", "because")}
    assert {(choice.route, choice.reason) for choice in found if choice.dtype != "float16"} == {("triton", None)}
    assert seen == [(dtype, layout) for dtype in doctor.DTYPES for layout in self_test.LAYOUTS.values()]


# ------------------------------------------------------------------------------------------------- the self-test


def test_the_triton_route_is_tested_where_it_is_taken() -> None:
    """Interpreted: the kernels run, and are right."""
    with taken("triton"), mock.patch.object(reference, "forward", side_effect=AssertionError("eager")):
        tested = self_test.self_test(torch.device("cpu"))
    assert tested.failure is None
    assert (tested.route, tested.passed, len(tested.rows)) == ("triton", True, RESULTS)


@pytest.mark.parametrize(("wrong", "factor"), [("y", 1.001), ("y", float("nan"))], ids=["off", "NaN"])
def test_a_wrong_formula_is_an_exit_status(
    wrong: str, factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *arguments: factor * right(*arguments))
    status, text = run(capsys)
    assert status == 1
    assert "the self-test FAILED" in text
    status, printed = run(capsys, as_json=True)
    document = strict(printed)["self_test"]
    assert status == 1
    assert not document["passed"]
    (row, *_) = [row for row in document["rows"] if row["result"] == wrong]
    assert row["error"] is None if factor != factor else row["error"] > row["allowed"]


@pytest.mark.parametrize("number", range(4), ids=self_test.RESULTS[1:])
def test_one_wrong_gradient_is_found(number: int) -> None:
    def backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        right = reference.backward(dy, x, *arguments[:3])  # weight, bias and slope
        return tuple(gradient * (factor if i == number else 1) for i, gradient in enumerate(right))

    with launches_replaced():
        launchers = functional.launchers()[0], backward
        for factor in (1.0, 1.01):
            with mock.patch.object(functional, "launchers", return_value=launchers):
                tested = self_test.self_test(torch.device("cpu"))
            assert tested.failure is None
            wrong = {row.result for row in tested.rows if not row.passed}
            assert wrong == ({self_test.RESULTS[1 + number]} if factor != 1 else set())
            assert tested.passed is (factor == 1)


def test_a_launch_that_fails_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where calls would fall back in silence, the doctor does not."""

    def launchers() -> None:
        raise RuntimeError("no such\ncompiler")

    monkeypatch.setattr(route, "device_reason", lambda x: None)
    monkeypatch.setattr(functional, "launchers", launchers)
    status, text = run(capsys)
    assert status == 1
    assert "RuntimeError: no such compiler" in text


# --------------------------------------------------------------------------------------------------- the warnings

HEALTHY: dict[str, str | None] = {"torch": "2.13.0", "cuda": "13.0", "rocm": None, "cudnn": "91900"}
SETTINGS: dict[str, str | None] = {"conv_fp32_precision": "ieee", "c_compiler": "gcc", "cuda_failure": None}
GPU = doctor.Gpu("a GPU", "9.0", 80_000_000_000, None)


def warned(
    versions: dict[str, str | None], gpus: tuple[doctor.Gpu, ...] = (GPU,), **settings: str | None
) -> list[doctor.Advice]:
    return list(doctor.advice({**HEALTHY, **versions}, gpus, {**SETTINGS, **settings}))


@pytest.mark.parametrize(
    ("versions", "settings", "cause", "remedy"),
    [
        ({"cudnn": "90800"}, {}, "cuDNN 9.8:", "nvidia-cudnn-cu13>=9.15"),
        ({"cudnn": "91401", "cuda": "12.6"}, {}, "cuDNN 9.14:", "nvidia-cudnn-cu12>=9.15"),
        ({"torch": "2.9.1+cu128"}, {}, "torch 2.9", "2.11"),
        ({}, {"c_compiler": None}, "no C compiler", "gcc"),
        ({}, {"conv_fp32_precision": "tf32"}, "TF32", "ieee"),
        ({}, {"cuda_failure": "out of memory"}, "cannot use it: out of memory", "nvidia-smi"),
    ],
)
def test_each_warning_alone(
    versions: dict[str, str | None], settings: dict[str, str | None], cause: str, remedy: str
) -> None:
    (found,) = warned(versions, **settings)
    assert cause in found.cause
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("versions", "gpus", "settings"),
    [
        ({}, (GPU,), {}),
        ({"cudnn": "90701"}, (GPU,), {}),
        ({"cudnn": "91500"}, (GPU,), {}),
        ({"cudnn": "91002", "rocm": "6.4", "cuda": None}, (GPU,), {"conv_fp32_precision": "tf32"}),  # MIOpen's number
        ({"torch": "2.10.0", "cudnn": None}, (GPU,), {}),
        ({}, (), {"c_compiler": None, "conv_fp32_precision": "tf32"}),  # neither bites without a GPU
    ],
)
def test_no_warning_without_cause(
    versions: dict[str, str | None], gpus: tuple[doctor.Gpu, ...], settings: dict[str, str | None]
) -> None:
    assert warned(versions, gpus, **settings) == []


@pytest.mark.parametrize(
    ("lacks", "cause", "remedy"),
    [
        ({"capability": (7, 5)}, "GPU 0 is sm_75; the kernels need sm_80 or newer", "none needed"),
        ({"hip": "6.4"}, "ROCm", "none needed"),
        ({"triton": False}, "triton is not installed", "pip install triton"),
        ({}, None, None),
    ],
    ids=["old", "ROCm", "no triton", "able"],
)
def test_a_gpu_without_the_kernels_is_warned_about_by_the_routes_reason(
    lacks: dict[str, Any], cause: str | None, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = lacks.get("capability", (9, 0))
    properties = SimpleNamespace(name="a GPU", major=capability[0], minor=capability[1], total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", lacks.get("hip"))
    monkeypatch.setattr(torch, "empty", lambda shape, device: torch.zeros(1))
    monkeypatch.setattr(route, "has_triton", lambda: lacks.get("triton", True))
    monkeypatch.setattr(route, "device_reason", lambda x: route._cuda_reason(0))
    route._lacking.cache_clear()
    try:
        found = doctor.gpus()
    finally:
        route._lacking.cache_clear()
    assert [(gpu.name, gpu.memory_bytes) for gpu in found] == [("a GPU", 80_000_000_000)]
    assert found[0].compute_capability == ".".join(map(str, capability))
    told = warned({}, found)
    assert [(cause in advice.cause, remedy in advice.remedy) for advice in told] == [(True, True)] * (cause is not None)


def test_a_gpu_that_cannot_be_used_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", mock.Mock(side_effect=RuntimeError("CUDA error: busy")))
    status, text = run(capsys)
    assert status == 0
    assert "Warning: torch finds a GPU and cannot use it: CUDA error: busy." in text
    assert "eager route on cpu" in text


@pytest.mark.parametrize(
    ("present", "cc", "found"),
    [((), None, None), (("clang",), None, "clang"), (("gcc", "clang"), None, "gcc"), (("gcc",), "nvc", None)],
)
def test_compiler_as_triton_looks_for_it(
    present: tuple[str, ...], cc: str | None, found: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in present:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    assert doctor.c_compiler() == found
