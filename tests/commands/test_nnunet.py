"""`python -m fastenc nnunet` and the trainer in the folder that it prints, in front of a stand-in for nnU-Net.

`make nnunet` tests the trainer in nnU-Net itself.
"""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from fastenc.__main__ import main
from fastenc.commands import third_party

NAME = "nnUNetTrainerFastenc"
BASE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


class Trainer:
    """nnU-Net's, as far as fastenc's goes by it. nnU-Net 2.6 and older has other parameters."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any, configuration_manager: Any, num_output_channels: int, enable_deep_supervision: bool = True
    ) -> nn.Module:
        network = third_party.nnunet()["PlainConvUNet"]
        return network(num_classes=num_output_channels, deep_supervision=enable_deep_supervision)


@pytest.fixture
def folder(capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["nnunet"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert out.count("\n") == 1
    return Path(out.removesuffix("\n"))


def test_the_folder_holds_the_trainer_alone(folder: Path) -> None:
    """nnU-Net puts it before every other folder that Python imports from."""
    assert folder.is_absolute()
    assert [path.name for path in folder.glob("*.py")] == [f"{NAME}.py"]


def test_the_trainer_accelerates_what_nnunet_builds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = BASE.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
    monkeypatch.setattr(sys.modules[BASE], "nnUNetTrainer", Trainer, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, NAME, importlib.import_module(NAME))
    trainer = getattr(sys.modules[NAME], NAME)
    assert issubclass(trainer, Trainer)
    assert inspect.signature(trainer.build_network_architecture) == inspect.signature(
        Trainer.build_network_architecture
    )
    net = trainer.build_network_architecture(None, None, 3, enable_deep_supervision=False)
    untouched = Trainer.build_network_architecture(None, None, 3, False)
    assert net.accelerated.count("fused") == len(net.accelerated) == 10
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in untouched.state_dict().items()}
