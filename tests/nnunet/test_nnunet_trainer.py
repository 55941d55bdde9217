"""nnUNetTrainerFastenc inside the real nnU-Net, on a CPU; `make nnunet` installs nnU-Net and runs this.

The data set is three cuts of the MNI152 brain with grey and white matter as labels. Only the eager route runs on a CPU:
there both trainers must agree bitwise. The Triton route runs with the formula in place of each kernel.
"""

import contextlib
import functools
import io
import itertools
import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="make nnunet installs it and runs this")

import nibabel
from nilearn import datasets
from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point
from nnunetv2.run.run_training import get_trainer_from_args, run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from support.backends import launches_replaced
from support.plain import assert_all_near, assert_near
from torch import Tensor, distributed, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.backends.common import aot_autograd

from fastenc.__main__ import main
from fastenc.fusion import deferred

VARIABLE = "nnUNet_extTrainer"
NAMES = OURS, PLAIN = "nnUNetTrainerFastenc", "nnUNetTrainer"
PLANS = {"nnUNetPlans": (10, 0), "nnUNetResEncUNetMPlans": (19, 2)}  # norms that are fused, and alone, at three stages
CORNERS = (20, 30, 30), (45, 30, 30), (30, 60, 30)  # of cuts through the cortex, in voxels of 2 mm
SIDE = 24
# nnU-Net looks into every file of its trainers. This one needs torchvision, which has no package for torch's CPU build.
PRIMUS = "nnunetv2.training.nnUNetTrainer.primus.primus_trainers"


def write_dataset(folder: Path) -> None:
    """Write nnU-Net's raw format: T1, and for each voxel 1 if it is mostly grey matter, 2 if white, else 0."""
    loaders = datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template
    images = [np.asarray(load(resolution=2).dataobj, dtype=np.float32) for load in loaders]
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i, corner in enumerate(CORNERS):
        t1, grey, white = (image[tuple(slice(start, start + SIDE) for start in corner)] for image in images)
        labels = np.select([grey > 0.5, white > 0.5], [1, 2]).astype(np.uint8)
        for kind, name, data in (("imagesTr", f"brain_{i}_0000", t1), ("labelsTr", f"brain_{i}", labels)):
            nibabel.save(nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), folder / kind / f"{name}.nii.gz")
    labels_by_name = {"background": 0, "grey matter": 1, "white matter": 2}
    about = {"channel_names": {"0": "T1"}, "labels": labels_by_name, "numTraining": 3, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["brain_0", "brain_1"], "val": ["brain_2"]}]))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's three folders, with a data set planned and preprocessed, and each trainer's checkpoints."""
    base = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(base / name))
            (base / name).mkdir()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["nnunet"]) == 0
        patch.setenv(VARIABLE, printed.getvalue().removesuffix("\n"))
        patch.setitem(sys.modules, PRIMUS, ModuleType(PRIMUS))
        patch.setenv("nnUNet_n_proc_DA", "1")
        write_dataset(base / "raw" / "Dataset001_Brain")
        planning.extract_fingerprints([1], num_processes=1, show_progress_bar=False)
        for planner in ("ExperimentPlanner", "nnUNetPlannerResEncM"):
            planning.plan_experiments([1], planner)
        planning.preprocess([1], configurations=("3d_fullres",), num_processes=(1,))
        patch.setenv("nnUNet_n_proc_DA", "0")  # data are augmented in this process, so that a seed settles them
        for name, plans in itertools.product(NAMES, PLANS):
            trainer_of(name, plans).run_training()
        yield base


def seed() -> None:
    for start in (torch.manual_seed, np.random.seed, random.seed):
        start(0)


def trainer_of(name: str, plans: str = "nnUNetPlans") -> Any:
    """nnU-Net's trainer as its command makes it; two iterations of training and one of validation are its epoch."""
    seed()
    trainer = get_trainer_from_args("1", "3d_fullres", 0, name, plans, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 2, 1, 1
    return trainer


def folder_of(home: Path, name: str, plans: str = "nnUNetPlans") -> Path:
    return home / "results" / "Dataset001_Brain" / f"{name}__{plans}__3d_fullres"


def checkpoint_of(home: Path, name: str, plans: str = "nnUNetPlans") -> Path:
    return folder_of(home, name, plans) / "fold_0" / "checkpoint_final.pth"


def loaded(path: Path) -> Any:
    """A checkpoint, by torch's safe unpickler; nnU-Net keeps numpy scalars in its log."""
    scalars = [np._core.multiarray.scalar, np.dtype, *(type(np.dtype(name)) for name in ("float32", "float64"))]
    with torch.serialization.safe_globals(scalars):
        return torch.load(path, map_location="cpu", weights_only=True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All that nested dicts and lists hold, with where it is."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{key}".removeprefix("."))
    else:
        yield path, value


def equal(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if isinstance(found, Tensor) else found == expected


def test_the_variable_finds_the_trainer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(recursive_find_trainer_class_by_name(OURS), nnUNetTrainer)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(RuntimeError, match=f"Could not find requested nnunet trainer {OURS}"):
        recursive_find_trainer_class_by_name(OURS)


@pytest.mark.parametrize("plans", PLANS)
def test_training_to_the_bit(home: Path, plans: str) -> None:
    """All that a checkpoint holds: weights, the optimizer's state, losses and Dice of training and validation."""
    ours, plain = (loaded(checkpoint_of(home, name, plans)) for name in NAMES)
    assert (ours["trainer_name"], plain["trainer_name"]) == NAMES
    assert ours["current_epoch"] == len(ours["logging"]["val_losses"]) == 1
    differing = {path for path, value in leaves(ours) if not equal(value, dict(leaves(plain))[path])}
    assert differing == {"trainer_name", "logging.epoch_start_timestamps.0", "logging.epoch_end_timestamps.0"}
    assert [path for path, _ in leaves(ours)] == [path for path, _ in leaves(plain)]


def started(name: str, plans: str = "nnUNetPlans") -> Any:
    """A trainer before its first iteration."""
    trainer = trainer_of(name, plans)
    trainer.on_train_start()
    return trainer


def assert_trains_like_plain(trainer: Any, plain: Any) -> None:
    """A step, with deep supervision."""
    batch = next(plain.dataloader_train)
    found, expected = (torch.as_tensor(each.train_step(batch)["loss"]) for each in (trainer, plain))
    assert_near(found, expected)
    assert_all_near(list(trainer.network.parameters()), list(plain.network.parameters()))


@pytest.mark.parametrize("plans", PLANS)
def test_every_pair_fuses_and_trains_alike(home: Path, plans: str) -> None:
    ours, plain = (started(name, plans) for name in NAMES)
    summary = ours.network.accelerated
    assert (summary.count("fused"), summary.count("alone"), len(summary)) == (*PLANS[plans], sum(PLANS[plans]))
    with launches_replaced(), mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs:
        assert_trains_like_plain(ours, plain)
    assert pairs.call_count == PLANS[plans][0]


@pytest.mark.parametrize(("plans", "pairs"), [("nnUNetPlans", 10), ("nnUNetResEncUNetMPlans", 19)])
def test_compiled_as_on_a_gpu(home: Path, tmp_path: Path, plans: str, pairs: int) -> None:
    """nnU-Net's torch.compile: a graph for training, and one after deep supervision was turned off for validation."""
    plain, x = started(PLAIN, plans), torch.randn(1, 1, SIDE, SIDE, SIDE)
    graphs: list[int] = []

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        pairs = sum("instance_norm_prelu" in str(node.target) for node in module.graph.nodes)
        graphs.extend([pairs] if pairs else [])  # nnU-Net compiles its Dice loss too
        return module.forward

    compiling = functools.partial(torch.compile, backend=aot_autograd(fw_compiler=look))
    torch.compiler.reset()
    with (
        mock.patch.object(nnUNetTrainer, "_do_i_compile", return_value=True),
        mock.patch.object(torch, "compile", compiling),
        launches_replaced(),
        mock.patch.dict("fastenc.route._faults", {x.device: "no kernel here"}),  # the operators take the formula
    ):
        ours = started(OURS, plans)
        assert isinstance(ours.network, OptimizedModule)
        assert_trains_like_plain(ours, plain)
        assert len(graphs) == 2, "forward and backward"
        assert graphs == [pairs, pairs]
        for trainer in (ours, plain):
            trainer.set_deep_supervision_enabled(False)
            trainer.network.eval()
        with torch.inference_mode():
            assert_near(ours.network(x), plain.network(x).double())
        assert graphs[2:] == graphs[:1]
        ours.save_checkpoint(str(tmp_path / "compiled.pth"))
    trainer_of(PLAIN, plans).load_checkpoint(str(tmp_path / "compiled.pth"))


def test_distributed(home: Path, tmp_path: Path) -> None:
    """The wrapper that nnU-Net puts around the network when there are several GPUs; its checkpoint is as without."""
    ours, plain = started(OURS), started(PLAIN)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ours.network = nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(ours.network))
        ours.is_ddp = True
        with launches_replaced(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Grad strides")
            assert_trains_like_plain(ours, plain)
        ours.set_deep_supervision_enabled(False)
        assert not ours.network.module.decoder.deep_supervision
        ours.save_checkpoint(str(tmp_path / "distributed.pth"))
    finally:
        distributed.destroy_process_group()
    trainer_of(PLAIN).load_checkpoint(str(tmp_path / "distributed.pth"))


def probabilities(path: Path) -> Tensor:
    with np.load(path) as file:
        return torch.from_numpy(file["probabilities"])


def test_validation_and_prediction_to_the_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By nnU-Net's commands; the brain that is predicted is the one that is validated on."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(entry_point: Callable[[], None], command: str) -> None:
        monkeypatch.setattr(sys, "argv", command.split())
        entry_point()

    found = []
    for name in NAMES:
        run(run_training_entry, f"nnUNetv2_train 1 3d_fullres 0 -tr {name} --val --npz -device cpu")
        folder = checkpoint_of(home, name).parent / "validation"
        found.append((probabilities(folder / "brain_2.npz"), json.loads((folder / "summary.json").read_text())["mean"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]

    images, out = home / "images", home / "predicted"
    images.mkdir()
    shutil.copy(home / "raw" / "Dataset001_Brain" / "imagesTr" / "brain_2_0000.nii.gz", images)
    options = "-c 3d_fullres -f 0 -device cpu -npp 1 -nps 1 --save_probabilities"
    run(predict_entry_point, f"nnUNetv2_predict -d 1 -i {images} -o {out} -tr {OURS} {options}")
    assert torch.equal(probabilities(out / "brain_2.npz"), found[0][0])


def predictor_of(home: Path, name: str, trainer_name: str | None = None) -> nnUNetPredictor:
    """What nnUNetv2_predict makes of a checkpoint, in which `trainer_name` may have been changed."""
    folder = home / f"{name} as {trainer_name}"
    shutil.copytree(folder_of(home, name), folder, dirs_exist_ok=True)
    if trainer_name is not None:
        path = folder / "fold_0" / "checkpoint_final.pth"
        torch.save(loaded(path) | {"trainer_name": trainer_name}, path)
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), ("0",))
    return predictor


def test_prediction_by_the_other_trainer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's trainer_name is the trainer that predicts. Without fastenc's folder it is not found."""
    x = torch.randn(1, SIDE, SIDE, SIDE)
    predictors = [predictor_of(home, name) for name in NAMES] + [predictor_of(home, PLAIN, OURS)]
    monkeypatch.delenv(VARIABLE)
    predictors.append(predictor_of(home, OURS, PLAIN))
    assert [hasattr(each.network, "accelerated") for each in predictors] == [True, False, True, False]
    first, *others = (each.predict_logits_from_preprocessed_data(x) for each in predictors)
    for other in others:
        assert torch.equal(first, other)
    with launches_replaced(), mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs:
        found = predictors[0].predict_logits_from_preprocessed_data(x)
    assert pairs.call_count == PLANS["nnUNetPlans"][0]
    assert_near(found, first, floor=torch.finfo(torch.float16).eps * first.abs().max().item())  # nnU-Net rounds logits
    with pytest.raises(RuntimeError, match=f"Could not find requested nnunet trainer {OURS}"):
        predictor_of(home, OURS)


def test_training_goes_on_with_the_other_trainer(home: Path) -> None:
    """Weights and the optimizer's state."""
    trainers = [trainer_of(name) for name in NAMES]
    for trainer, other in zip(trainers, reversed(NAMES), strict=True):
        trainer.load_checkpoint(str(checkpoint_of(home, other)))
        seed()
        trainer.on_train_start()
        trainer.train_step(next(trainer.dataloader_train))
    for found, expected in zip(*(trainer.network.parameters() for trainer in trainers), strict=True):
        assert torch.equal(found, expected)
