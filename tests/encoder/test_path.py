"""How long the way from a network's forward to the launch of a kernel is: its files and its functions."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.backends import launches_replaced

import fastenc

PACKAGE = str(Path(fastenc.__file__).parent)


@pytest.mark.parametrize(("training", "functions"), [(False, 20), (True, 24)])
def test_from_the_networks_forward_to_the_first_launch(training: bool, functions: int) -> None:
    """On EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3), with the stem's convolution, which lies on the way."""
    net = fastenc.EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3)
    x = torch.randn(1, 3, 31, 32, 30)
    called: set[tuple[str, str]] = set()
    launched = False

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal launched
        code = frame.f_code
        launched = launched or code.co_name == "_forward_by_formula"
        if event == "call" and not launched and code.co_filename.startswith(PACKAGE):
            called.add((code.co_filename, code.co_name))

    with launches_replaced(), torch.set_grad_enabled(training):
        net(x)  # fills the caches
        sys.setprofile(note)
        try:
            net(x)
        finally:
            sys.setprofile(None)
    assert launched
    assert len({file for file, _ in called}) <= 6
    assert len(called) <= functions, sorted(called)
