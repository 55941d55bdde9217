"""The demo's data: patches of the MNI152 brain, and the fractions of grey and white matter in each.

nilearn installs the volumes with itself, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from nilearn import datasets
from torch import Tensor

CHANNELS = ("T1", "grey matter", "white matter")
TISSUES = CHANNELS[1:]
PATCH_SHAPE = (31, 32, 30)
LEAST_BRAIN = 0.1  # the least share of brain among a patch's voxels
BRAIN_MEAN, BRAIN_SPREAD = 0.69, 0.2  # of T1, roughly, inside the brain


# Parts of the brain: slabs [start, stop) of voxels along the axis from the back of the head to the front. The template
# is its own mirror image from left to right, so a split along that axis would test on what was trained on.
Slabs = tuple[tuple[int, int], ...]
TRAINING: Slabs = ((0, 94), (146, 233))
HELD_OUT: Slabs = ((98, 142),)


@dataclass(frozen=True)
class Patches:
    """Patches of the volumes and where they were cut.

    corners: (count, 3) int, the lowest voxel indices of each patch.
    volumes: (count, 3, 31, 32, 30) float32 in [0, 1], channels as in `CHANNELS`.
    """

    corners: np.ndarray
    volumes: Tensor

    @property
    def inputs(self) -> Tensor:
        """The input from which tissue fractions are predicted, (count, 2, 31, 32, 30): centred T1, and ones.

        InstanceNorm removes the absolute intensity of a patch. At the convolutions' zero padding, the channel of ones
        has a step of known height, from which the network can recover it.
        """
        t1 = (self.volumes[:, :1] - BRAIN_MEAN) / BRAIN_SPREAD
        return torch.cat([t1, torch.ones_like(t1)], dim=1)

    @property
    def fractions(self) -> Tensor:
        """The fractions of grey and of white matter in each patch, (count, 2) in [0, 1]."""
        return self.volumes[:, 1:].mean(dim=(2, 3, 4))


def mni152() -> np.ndarray:
    """The MNI152 template at 1 mm, (3, 197, 233, 189) float32 in [0, 1], channels as in `CHANNELS`.

    The axes run from left to right, from back to front and from bottom to top. T1 is zero outside the brain; the other
    two channels say which fraction of each voxel is grey and which is white matter.
    """
    images = (
        datasets.load_mni152_template(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    return np.stack([np.asarray(image.dataobj, dtype=np.float32) for image in images])


def draw(volumes: np.ndarray, slabs: Slabs, count: int, generator: np.random.Generator) -> Patches:
    """Draw `count` patches, each within one of the slabs and with a share of brain of at least `LEAST_BRAIN`.

    volumes: as `mni152` returns them.
    """
    sides, _, heights = (np.arange(n - size + 1) for n, size in zip(volumes.shape[1:], PATCH_SHAPE, strict=True))
    depths = np.concatenate([np.arange(start, stop - PATCH_SHAPE[1] + 1) for start, stop in slabs])
    corners: list[list[int]] = []
    patches: list[np.ndarray] = []
    while len(patches) < count:
        corner = [int(generator.choice(starts)) for starts in (sides, depths, heights)]
        patch = volumes[cut(corner)]
        if np.count_nonzero(patch[0]) >= LEAST_BRAIN * patch[0].size:
            corners.append(corner)
            patches.append(patch)
    return Patches(np.array(corners), torch.from_numpy(np.stack(patches)))


def cut(corner: list[int]) -> tuple[slice, ...]:
    """The index of all channels of the patch at `corner`."""
    return (slice(None), *(slice(start, start + size) for start, size in zip(corner, PATCH_SHAPE, strict=True)))
