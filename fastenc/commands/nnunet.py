"""`python -m fastenc nnunet`: the folder in which nnU-Net finds fastenc's trainer."""

from __future__ import annotations

import argparse
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "nnunet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""
    parser.description = (
        "Print the folder of nnUNetTrainerFastenc, for nnU-Net 2.8 or newer: "
        "nnUNet_extTrainer=$(python -m fastenc nnunet) nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerFastenc. "
        "nnUNetv2_predict needs the same variable and the same -tr."
    )


def run(options: argparse.Namespace) -> int:
    """Print the folder, and nothing else."""
    print(FOLDER)
    return 0
