"""What a user runs to look into a GPU machine: the doctor, and the sanitizer where CUDA's toolkit is installed."""

import pytest
import torch

import fastenc
from fastenc.bench.commands import sanitize
from fastenc.commands import doctor


def test_the_doctor_tests_the_triton_route() -> None:
    with fastenc.backend("auto"):
        report = doctor.examine()
    assert report.self_test.route == "triton"
    assert report.self_test.passed, report.self_test
    assert {choice.route for choice in report.routes if choice.dtype != "float64"} == {"triton"}
    assert report.gpus[0].name == torch.cuda.get_device_name(0)
    assert report.versions["cudnn"] is not None


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = sanitize.find()
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on PATH or in CUDA_HOME")
    assert sanitize.check(sanitizer, tool, "test_forward_and_backward and 1x3x7-torch.float32-channels_last") == 0
