"""What a user runs to look into a GPU machine."""

import torch

import fastenc
from fastenc.commands import doctor


def test_the_doctor_tests_the_triton_route() -> None:
    with fastenc.backend("auto"):
        report = doctor.examine()
    assert report.self_test.route == "triton"
    assert report.self_test.passed, report.self_test
    assert {choice.route for choice in report.routes if choice.dtype != "float64"} == {"triton"}
    assert report.gpus[0].name == torch.cuda.get_device_name(0)
    assert report.versions["cudnn"] is not None
