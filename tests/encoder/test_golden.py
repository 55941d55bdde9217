"""Five results of the reference network, kept as arrays: initialisation, outputs and every gradient, by each route.

How far float32 may be from float64 is measured, not chosen. `moved` is how far the float64 result of a plain network
moves when input, cotangent and parameters each move by up to one float32 ULP: the error that no float32 run escapes,
carried through this very network, so that a sum that cancels (a norm's bias gradient, say) gets the room it needs.
PyTorch's own float32 runs, with and without oneDNN, stay within 5.1 of it on every tensor of every case.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import PlainEncoder
from torch import Tensor, nn

import fastenc

FOLDER = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["id"]: case for case in json.loads((FOLDER / "manifest.json").read_text())["cases"]}
every_case = pytest.mark.parametrize("case", CASES)
FEW_ULP = 4.0
FLOAT64_STEP = 2.0**-29  # one float64 ULP over one float32 ULP


@functools.cache
def arrays(case: str) -> dict[str, Tensor]:
    with np.load(FOLDER / CASES[case]["file"]) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def constructor(case: str) -> dict:
    ctor = CASES[case]["ctor"]
    return {k: tuple(v) if k == "kernel_size" and isinstance(v, list) else v for k, v in ctor.items()}


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def matched(y: Tensor, x: Tensor, cot: Tensor) -> Tensor:
    """The loss of the golden results."""
    return (y * cot).sum()


def penalised(y: Tensor, x: Tensor, cot: Tensor) -> Tensor:
    """With a gradient penalty, as critics are trained: 10·mean over the samples of (|∂loss/∂x| − 1)² more."""
    loss = matched(y, x, cot)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


def results(net: nn.Module, data: dict[str, Tensor], dtype: torch.dtype, loss: Loss = matched) -> dict[str, Tensor]:
    """Output y, gradient gx of the input and g/<key> of each parameter, for a loss of y, x and cot."""
    net.load_state_dict({name[3:]: value for name, value in data.items() if name.startswith("sd/")})
    net.to(dtype)
    x = data["x"].to(dtype).clone().requires_grad_()
    y = net(x)
    loss(y, x, data["cot"].to(dtype)).backward()
    gradients = {f"g/{name}": parameter.grad for name, parameter in net.named_parameters()}
    return {"y": y.detach(), "gx": x.grad, **gradients}


def golden(case: str, bits: int) -> dict[str, Tensor]:
    data, prefix = arrays(case), f"g{bits}/"
    gradients = {f"g/{name[4:]}": value for name, value in data.items() if name.startswith(prefix)}
    return {"y": data[f"y{bits}"], "gx": data[f"gx{bits}"], **gradients}


@functools.cache
def of_the_plain_network(case: str, dtype: torch.dtype, loss: Loss) -> dict[str, Tensor]:
    return results(PlainEncoder(**constructor(case)), arrays(case), dtype, loss)


@functools.cache
def moved(case: str, loss: Loss = matched) -> dict[str, float]:
    """Root mean square, over eight draws, of the distance each float64 result moves for one ULP in what goes in."""
    truth = golden(case, 64) if loss is matched else of_the_plain_network(case, torch.float64, loss)
    squares = dict.fromkeys(truth, 0.0)
    ulp = torch.finfo(torch.float32).eps
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        data = {
            name: value.double()
            * (1 + ulp * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1))
            for name, value in arrays(case).items()
            if name in ("x", "cot") or name.startswith("sd/")
        }
        net = PlainEncoder(**constructor(case)).double()
        for name, value in results(net, data, torch.float64, loss).items():
            squares[name] += (value - truth[name]).square().sum().item() / 8
    return {name: math.sqrt(square) for name, square in squares.items()}


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).norm().item()


def too_far(truth: dict[str, Tensor], found: dict[str, Tensor], allowed: dict[str, float]) -> list[str]:
    """One line for each result that is farther from the float64 one than allowed; NaN is too far."""
    assert found.keys() == truth.keys()
    errors = {name: distance(found[name], truth[name]) for name in truth}
    return [
        f"{name}: {errors[name]:.2e} from float64, {allowed[name]:.2e} allowed"
        for name in truth
        if not errors[name] <= allowed[name]
    ]


def float32_allowance(case: str) -> dict[str, float]:
    """Twice the golden float32 run's own error, plus a few ULP."""
    truth, single = golden(case, 64), golden(case, 32)
    return {n: 2 * distance(single[n], truth[n]) + FEW_ULP * moved(case)[n] for n in truth}


@every_case
def test_initialisation_is_that_of_the_reference(case: str) -> None:
    torch.manual_seed(CASES[case]["init_seed"])
    net = fastenc.EncoderNet3d(**constructor(case))
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + str(tuple(value.shape)).encode() + value.numpy().tobytes())
    assert digest.hexdigest() == CASES[case]["init_sha256"]


@every_case
def test_construction_leaves_the_generator_where_the_draws_left_it(case: str) -> None:
    seed = CASES[case]["init_seed"]
    torch.manual_seed(seed)
    net = fastenc.EncoderNet3d(**constructor(case))
    after = torch.get_rng_state()

    torch.manual_seed(seed)
    fan_in = 1
    for name, parameter in net.state_dict().items():
        if parameter.dim() > 1:  # a convolution or fc; its bias, if any, comes next and shares its fan-in
            fan_in = parameter[0].numel()
        elif name.split(".")[-2] in ("0", "1") and "mconv" in name:
            continue  # a norm or a PReLU: constants
        bound = 1 / math.sqrt(fan_in)
        drawn = torch.empty(parameter.shape).uniform_(-bound, bound)
        torch.testing.assert_close(parameter, drawn, rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), after)


@every_case
def test_golden_attributes(case: str) -> None:
    expected = CASES[case]
    net = fastenc.EncoderNet3d(**constructor(case))
    assert list(net.state_dict()) == expected["state_dict_keys"]
    assert sum(p.numel() for p in net.parameters()) == expected["n_params"]
    assert net.nlayers == expected["nlayers"]
    assert net.is_out_vector is expected["is_out_vector"]
    assert net(torch.zeros(expected["in_shape"])).shape == tuple(expected["out_shape"])


@every_case
def test_float64_eager(case: str) -> None:
    """Two honest float64 runs are each within 5 of the truth, so within 10 of each other."""
    net = fastenc.EncoderNet3d(**constructor(case)).double()
    with fastenc.backend("eager"):
        found = results(net, arrays(case), torch.float64)
    assert not too_far(golden(case, 64), found, {n: 10 * FLOAT64_STEP * m for n, m in moved(case).items()})


@every_case
@pytest.mark.parametrize("route", ["auto", "eager", "triton"])
def test_float32(case: str, route: str) -> None:
    net = fastenc.EncoderNet3d(**constructor(case))
    with taken(route):
        found = results(net, arrays(case), torch.float32)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not too_far(golden(case, 64), found, float32_allowance(case))


@every_case
@pytest.mark.parametrize("route", ["auto", "triton"])
def test_output_is_the_reference_to_rounding(case: str, route: str) -> None:
    """README's figure: float32 outputs are within 1e-6 relative L2 of the reference's."""
    net = fastenc.EncoderNet3d(**constructor(case))
    with taken(route):
        y = results(net, arrays(case), torch.float32)["y"]
    expected = golden(case, 32)["y"]
    assert distance(y, expected) <= 1e-6 * expected.norm().item()


@every_case
def test_triton_route_runs_the_kernels(case: str) -> None:
    """Without this, a Triton route that quietly ran eagerly would pass the comparison above."""
    net = fastenc.EncoderNet3d(**constructor(case))
    with taken("triton"), eager_norms() as calls:
        results(net, arrays(case), torch.float32)
    assert calls.call_count == 0
    with taken("eager"), eager_norms() as calls:
        results(net, arrays(case), torch.float32)
    assert calls.call_count == sum(CASES[case]["ctor"]["layers"])


@every_case
@pytest.mark.parametrize(("route", "recompute"), [("eager", False), ("triton", False), ("triton", True)])
def test_a_step_with_a_gradient_penalty(case: str, route: str, recompute: bool) -> None:
    """The gradients that the step takes are those of the plain network: in float64, or twice as far as its float32."""
    truth = of_the_plain_network(case, torch.float64, penalised)
    net = fastenc.EncoderNet3d(**constructor(case), recompute=recompute)
    with taken(route) as dtype:
        found = results(net, arrays(case), dtype, penalised)
    if dtype == torch.float64:
        allowed = {n: 10 * FLOAT64_STEP * m for n, m in moved(case, penalised).items()}
    else:
        single = of_the_plain_network(case, torch.float32, penalised)
        allowed = {n: 2 * distance(single[n], truth[n]) + FEW_ULP * moved(case, penalised)[n] for n in truth}
    assert not too_far(truth, found, allowed)
