"""EncoderNet3d on a GPU: the fused network against PyTorch's own, against kept results, and its routes.

`agreement` says how far a result may be off: no more than twice what PyTorch's own network is off from the exact run
at the same precision, plus a floor that float32 needs.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastenc
from fastenc.bench.baselines.encoder import plain_encoder
from fastenc.bench.engine.agreement import OUTPUT, distance, distances, judge
from fastenc.bench.engine.record import Network

EXAMPLE_1 = Network(64, (3, 3, 3, 3, 3), 3, 32)
SIZE = (31, 32, 30)
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3), Example 1, in PyTorch. No parameter hides a wrong formula."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = plain_encoder(EXAMPLE_1)
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.6, 1.2)
    return network


@pytest.fixture(scope="module")
def fused(plain: nn.Module) -> nn.Module:
    """fastenc's Example 1 with the same parameters."""
    with torch.device("cuda"):
        network = fastenc.EncoderNet3d(EXAMPLE_1.channel, EXAMPLE_1.layers, in_planes=3, out_length=32)
    network.load_state_dict(plain.state_dict())
    return network


def batch(N: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(N)
    x = torch.randn(N, 3, *SIZE, generator=generator, device="cuda")
    return x, torch.randn(N, 32, generator=generator, device="cuda")


def numbers(network: nn.Module, x: Tensor, dy: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradient of x and gradient of every parameter."""
    leaf = x.detach().requires_grad_()
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        y = network(leaf)
    y.backward(dy.to(y.dtype))
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    assert leaf.grad is not None
    return {OUTPUT: y.detach(), "x": leaf.grad, **gradients}


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_example_1_agrees_with_pytorch(
    autocast: torch.dtype | None, N: int, plain: nn.Module, fused: nn.Module
) -> None:
    x, dy = batch(N)
    exact = numbers(copy.deepcopy(plain).double(), x.double(), dy.double())
    eager = distances(numbers(plain, x, dy, autocast), exact)
    results = numbers(fused, x, dy, autocast)
    verdict = judge(distances(results, exact), eager)
    assert verdict.agrees, verdict
    assert results[OUTPUT].dtype == (autocast or torch.float32)


def test_float32_gradients_as_one_vector(plain: nn.Module, fused: nn.Module) -> None:
    """1e-3: at this size one PReLU input that changes sign moves a gradient by 1e-4."""
    x, dy = batch(8)
    expected, results = numbers(plain, x, dy), numbers(fused, x, dy)

    def vector(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in expected if name not in (OUTPUT, "x")])

    assert distance(results[OUTPUT], expected[OUTPUT]) < 1e-4
    assert distance(vector(results), vector(expected)) < 1e-3


def test_forward_alone_is_the_forward_of_training(
    fused: nn.Module, check_near: Callable[[Tensor, Tensor], None]
) -> None:
    x, dy = batch(2)
    expected, before = numbers(fused, x, dy)[OUTPUT], x.clone()
    with torch.no_grad():
        result = fused(x)
    check_near(result, expected)  # cuDNN may choose other algorithms
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=str)
def test_layout_of_the_input_does_not_matter(
    layout: torch.memory_format, fused: nn.Module, check_near: Callable[[Tensor, Tensor], None]
) -> None:
    x, _ = batch(2)
    with torch.no_grad():
        check_near(fused(x.contiguous(memory_format=layout)), fused(x))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_every_layer_takes_the_triton_route(autocast: bool, fused: nn.Module) -> None:
    x, _ = batch(1)
    with fastenc.backend("auto"), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        rows = list(fastenc.explain(fused, x))
    assert len(rows) == sum(EXAMPLE_1.layers)
    assert {(row.route, row.reason) for row in rows} == {("triton", None)}


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_repeat_bitwise(fused: nn.Module) -> None:
    x, dy = batch(2)
    first = numbers(fused, x, dy)
    for _ in range(5):
        again = numbers(fused, x, dy)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_side_stream(fused: nn.Module, on_a_side_stream: Callable[..., dict[str, Tensor]]) -> None:
    x, dy = batch(2)
    expected = numbers(fused, x, dy)
    results = on_a_side_stream(lambda late: numbers(fused, late, dy), x)
    assert max(distances(results, expected).values()) < 6e-3  # cuDNN's own atomics differ from run to run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_kept_results(case: dict) -> None:
    """Results of the reference network in float64, and how far its own float32 was off."""
    with np.load(GOLDEN / case["file"]) as file:
        arrays = {name: torch.from_numpy(file[name]).cuda() for name in file.files}
    constructor = {k: tuple(v) if k == "kernel_size" and isinstance(v, list) else v for k, v in case["ctor"].items()}
    network = getattr(fastenc, case["class"])(**constructor).cuda()
    network.load_state_dict({k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")})

    def kept(bits: int) -> dict[str, Tensor]:
        gradients = {k.removeprefix(f"g{bits}/"): v for k, v in arrays.items() if k.startswith(f"g{bits}/")}
        return {OUTPUT: arrays[f"y{bits}"], "x": arrays[f"gx{bits}"], **gradients}

    results = numbers(network, arrays["x"], arrays["cot"])
    verdict = judge(distances(results, kept(64)), distances(kept(32), kept(64)))
    assert verdict.agrees, verdict
