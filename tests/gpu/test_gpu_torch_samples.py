"""PyTorch's own sample inputs of InstanceNorm, PReLU and LeakyReLU on a GPU, as test_torch_samples.py on a CPU.

They need the package expecttest, and are left out where it is not installed.
"""

import importlib.util

import pytest
import torch
from support.opinfo import NORMS, SOURCES, distinct_calls, layers, outcome
from support.plain import assert_all_near
from test_gpu_op import Problem, check, settle

import fastenc

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None,
    reason="left out: torch.testing._internal needs the package expecttest, which is not installed",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_by_the_rule(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for call in distinct_calls(name, "cuda", dtype):
        x, weight, bias, slope, eps = (v.detach() if isinstance(v, torch.Tensor) else v for v in call.arguments)
        check(settle(Problem(x, weight, bias, slope, torch.randn_like(x), eps)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS[:3])
def test_layers(name: str, training: bool) -> None:
    """Running statistics and inputs without a batch among them: the same numbers or the same kind of error."""
    torch.manual_seed(0)
    for layer, twin, x in layers(name, "cuda", torch.float32, training):
        with fastenc.backend("auto"):
            found, expected = outcome(layer, x), outcome(twin, x)
        if isinstance(expected, type):
            assert found is expected
        else:
            assert_all_near(found, expected)
