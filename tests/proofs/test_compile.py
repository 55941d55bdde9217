"""Every kernel variant that the launchers make compiles for its GPUs. No GPU is needed."""

import itertools

import pytest
import torch

from fastenc.bench.proofs.compile import Launch, recorded, resources
from fastenc.kernels.instance_norm_prelu_backward import instance_norm_prelu_backward
from fastenc.kernels.instance_norm_prelu_forward import instance_norm_prelu_forward
from fastenc.kernels.layout import MEMORY_FORMAT

ARCHITECTURES = (80, 90, 100)
SPATIAL = {2: (2, 1, 1), 3: (3, 1, 1), 7: (7, 1, 1), 120: (4, 5, 6), 1000: (10, 10, 10), 4097: (17, 241, 1)}
# The layers of Example 1, EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3), at batch 2: (C, spatial).
EXAMPLE_1 = [
    (64, (31, 32, 30)), (64, (16, 16, 15)), (128, (16, 16, 15)), (128, (8, 8, 8)), (256, (8, 8, 8)),
    (256, (4, 4, 4)), (512, (4, 4, 4)), (512, (2, 2, 2)), (1024, (2, 2, 2)),
]  # fmt: skip
EVERY_KERNEL = {
    "forward_one_pass", "forward_slab", "forward_statistics", "forward_combine_apply",
    "backward_one_pass", "backward_slab", "backward_sums", "backward_combine_apply", "backward_sum_n",
}  # fmt: skip


def launches(
    architecture: int | str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    affine: bool = True,
    slope: torch.Tensor | float | None = None,
    residual: bool = False,
) -> list[Launch]:
    """What the forward and the backward of one call would launch."""
    C = shape[1]
    memory_format = MEMORY_FORMAT[5] if channels_last else torch.contiguous_format
    x, dy = (torch.empty(shape, dtype=dtype, memory_format=memory_format) for _ in range(2))
    weight, bias = (torch.ones(C) if affine else None for _ in range(2))
    slope = torch.ones(C) if slope is None else slope
    r = torch.empty_like(x) if residual else None
    with recorded(architecture) as found:
        _, statistics = instance_norm_prelu_forward(x, weight, bias, slope, 1e-5, residual=r)
        instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics, residual=r)
    return found


def check(launch: Launch) -> None:
    """No atomic sum, and 64-bit offsets."""
    assert "atomic" not in launch.ttir, launch.name
    assert "xi64>" in launch.ttir or "i64" in launch.ttir, f"{launch.name} has no 64-bit offset"


def spills(launch: Launch) -> int:
    """Bytes of stack and local memory of a thread."""
    used = resources(launch.compiled.asm["cubin"])
    return used["STACK"] + used["LOCAL"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_variant_compiles(dtype: torch.dtype, channels_last: bool, architecture: int) -> None:
    shapes = [(3, C, *SPATIAL[S]) for S, C in itertools.product(SPATIAL, (1, 3, 8, 24, 64))]
    shapes += [(2, 3, 21, 21, 21), (2, 3, 33, 33, 37)]
    found = {launch.key: launch for shape in shapes for launch in launches(architecture, shape, dtype, channels_last)}
    # Contiguous rows that are read twice are split, but with a residual.
    assert {launch.name for launch in found.values()} == EVERY_KERNEL - (set() if channels_last else {"forward_slab"})
    for launch in found.values():
        check(launch)


@pytest.mark.parametrize(
    ("affine", "slope", "residual"),
    [
        (True, torch.ones(1), False), (True, 0.01, False), (False, torch.ones(1), False), (False, 0.01, False),
        (False, torch.ones(1), True), (True, 0.01, True),
    ],
)  # fmt: skip
def test_other_parameters_compile(affine: bool, slope: torch.Tensor | float, residual: bool) -> None:
    for spatial in ((4, 5, 6), (17, 241, 1)):
        assert launches(90, (2, 8, *spatial), torch.bfloat16, True, affine, slope, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_example_1_does_not_spill(dtype: torch.dtype) -> None:
    checked = set()
    for C, spatial in EXAMPLE_1:
        for launch in launches(90, (2, C, *spatial), dtype, True):
            if launch.key not in checked:
                checked.add(launch.key)
                assert spills(launch) == 0, (launch.name, C, spatial)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residual(architecture: int) -> None:
    """Example 1's layers, and contiguous rows of odd length, whole and split, where each element has an address."""
    cases = [((2, C, *spatial), torch.bfloat16, True) for C, spatial in EXAMPLE_1]
    cases += [((2, 3, *spatial), torch.float32, False) for spatial in ((17, 241, 1), (33, 33, 37))]
    found = {launch.key: (launch, case) for case in cases for launch in launches(architecture, *case, residual=True)}
    assert {launch.name for launch, _ in found.values()} == EVERY_KERNEL - {"backward_slab"}
    for launch, case in found.values():
        check(launch)
        assert spills(launch) == 0, (launch.name, case)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_for_rocm(residual: bool) -> None:
    for spatial in ((4, 5, 6), (17, 241, 1)):
        for channels_last in (False, True):
            assert launches("gfx942", (2, 8, *spatial), torch.bfloat16, channels_last, residual=residual)
