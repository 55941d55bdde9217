"""ConvModern1d, 2d and 3d, every option, against a torch.nn.Sequential written out here."""

import copy
import inspect
from typing import Any

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import assert_all_near, gradients
from torch import Tensor, nn

from fastenc import ConvModern1d, ConvModern2d, ConvModern3d

LAYERS = {1: ConvModern1d, 2: ConvModern2d, 3: ConvModern3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
SIZES = {1: (9,), 2: (7, 8), 3: (6, 5, 7)}


def norm(normalizer: str, planes: int, order: int) -> nn.Module:
    if normalizer == "batch":
        return getattr(nn, f"BatchNorm{order}d")(planes)
    return getattr(nn, f"InstanceNorm{order}d")(planes, affine=normalizer == "pinst")


def activation(activator: Any, planes: int) -> list[nn.Module]:
    if activator == "prelu":
        return [nn.PReLU(planes)]
    return [nn.ReLU()] if activator == "relu" else []


def sequential(
    in_planes: int,
    out_planes: int,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 1,
    output_size: Any = None,
    normalizer: str = "pinst",
    activator: Any = "prelu",
    layer_order: str = "new",
    scaler: str = "down",
    order: int = 3,
) -> nn.Sequential:
    """The documented order of modules, one line a case."""
    strides = any(s > 1 for s in (stride if isinstance(stride, tuple) else (stride,)))
    upsample: list[nn.Module] = []
    if scaler == "up" and (strides or output_size is not None):
        per_axis = stride if isinstance(stride, tuple) else (stride,) * order
        how = {"scale_factor": per_axis} if output_size is None else {"size": output_size}
        upsample = [nn.Upsample(**how, mode=LINEAR[order], align_corners=True)]
        stride = 1
    conv = getattr(nn, f"Conv{order}d")(in_planes, out_planes, kernel_size, stride, padding, bias=normalizer == "null")
    if normalizer == "null":
        return nn.Sequential(*upsample, conv, *activation(activator, out_planes))
    if layer_order not in ("new", "old"):
        return nn.Sequential(*upsample, conv)
    if layer_order == "old":
        return nn.Sequential(*upsample, conv, norm(normalizer, out_planes, order), *activation(activator, out_planes))
    return nn.Sequential(norm(normalizer, in_planes, order), *activation(activator, in_planes), *upsample, conv)


def compare(options: dict[str, Any], order: int = 3, dtype: torch.dtype = torch.float64) -> None:
    """Same keys in the same order, same children, same output and gradients, same buffers afterwards."""
    torch.manual_seed(0)
    expected = sequential(2, 3, **options, order=order).to(dtype)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layer = LAYERS[order](2, 3, **options).to(dtype)

    assert [name for name, _ in layer.named_children()] == ["mconv"]
    assert [type(m) for m in layer.mconv] == [type(m) for m in expected]
    assert [repr(m) for m in layer.mconv] == [repr(m) for m in expected]
    state = {f"mconv.{key}": value for key, value in expected.state_dict().items()}
    assert list(layer.state_dict()) == list(state)
    layer.load_state_dict(state)

    x = torch.randn(2, 2, *SIZES[order], dtype=dtype)
    results: list[list[Tensor]] = []
    for module in (layer, expected):
        inp = x.clone().requires_grad_()
        y = module(inp)
        y.square().sum().backward()
        results.append([y.detach(), inp.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    scale = 100 * torch.finfo(dtype).eps
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=scale, atol=scale * max(1.0, truth.abs().max().item()))
    torch.testing.assert_close(layer.eval()(x), expected.eval()(x), rtol=scale, atol=scale)


@pytest.mark.parametrize("layer_order", ["new", "old", "NEW", "", None])
@pytest.mark.parametrize("activator", ["prelu", "relu", "none", None])
@pytest.mark.parametrize("normalizer", ["pinst", "inst", "batch", "null"])
def test_normalizer_activator_order(normalizer: str, activator: Any, layer_order: str) -> None:
    compare({"normalizer": normalizer, "activator": activator, "layer_order": layer_order})


GEOMETRY: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kernel and padding": {"kernel_size": (3, 1, 5), "padding": (1, 0, 2)},
    "no padding": {"padding": 0},
    "even kernel": {"kernel_size": 2},
    "stride": {"stride": 2},
    "stride per axis": {"stride": (1, 2, 3)},
    "up, stride": {"stride": 2, "scaler": "up"},
    "up, stride per axis": {"stride": (1, 2, 1), "scaler": "up"},
    "up, output_size": {"output_size": (7, 6, 9), "scaler": "up"},
    "up, output_size wins over stride": {"output_size": (7, 6, 9), "stride": 2, "scaler": "up"},
    "up with nothing to scale": {"scaler": "up"},
    "unknown scaler with nothing to scale": {"scaler": "sideways"},
}


@pytest.mark.parametrize("layer_order", ["new", "old", "newest"])
@pytest.mark.parametrize("normalizer", ["pinst", "null"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str, normalizer: str, layer_order: str) -> None:
    compare({**GEOMETRY[name], "normalizer": normalizer, "layer_order": layer_order})


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scaler", ["down", "up"])
@pytest.mark.parametrize("layer_order", ["new", "old", "none"])
def test_other_orders(order: int, scaler: str, layer_order: str) -> None:
    compare({"stride": 2, "scaler": scaler, "layer_order": layer_order}, order=order)


@pytest.mark.parametrize("name", ["defaults", "stride per axis", "up, stride", "up, output_size"])
@pytest.mark.parametrize("normalizer", ["pinst", "inst"])
def test_triton_route(name: str, normalizer: str) -> None:
    options = {**GEOMETRY[name], "normalizer": normalizer}
    with taken("triton"):
        with eager_norms() as calls:
            ConvModern3d(2, 3, **options)(torch.randn(2, 2, 6, 5, 7))
        assert calls.call_count == 0
        compare(options, dtype=torch.float32)


@pytest.mark.parametrize("activator", ["prelu", "relu"])
@pytest.mark.parametrize("layer_order", ["new", "old"])
def test_recompute(layer_order: str, activator: str) -> None:
    """Only a layer that ends in its convolution can. A slope of 0.7, applied twice, is 0.49."""
    with taken("fused"):
        layer = ConvModern3d(2, 3, layer_order=layer_order, activator=activator)
        layer.recompute = True
        if activator == "prelu":
            with torch.no_grad():
                next(m for m in layer.mconv if isinstance(m, nn.PReLU)).weight.fill_(0.7)
        x = torch.randn(2, 2, *SIZES[3])
        assert_all_near(gradients(layer, x), gradients(nn.Sequential(*layer.mconv), x))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_convolutions_bias_may_change_before_the_backward(recompute: bool) -> None:
    """torch's convolution does not save it."""
    with taken("fused"):
        layer = ConvModern3d(2, 3)
        layer.mconv[2] = nn.Conv3d(2, 3, 3, padding=1)
        layer.recompute = recompute
        twin = copy.deepcopy(layer.mconv)
        found = []
        for net, bias in ((layer, layer.mconv[2].bias), (twin, twin[2].bias)):
            y = net(torch.ones(2, 2, *SIZES[3]).cumsum(-1).cumsum(-2))
            with torch.no_grad():
                bias.add_(1.0)
            found.append(torch.autograd.grad(y.square().sum(), [*net.parameters()]))
        assert_all_near(*found)


@pytest.mark.parametrize("replacement", [nn.Identity, nn.Dropout, lambda: nn.Flatten(0, 0), nn.AvgPool3d])
@pytest.mark.parametrize("last", [False, True])
def test_the_input_stays_where_the_convolution_was_replaced(replacement: Any, last: bool) -> None:
    """What takes its place may return its input, which is the user's."""
    layer = ConvModern3d(3, 3, layer_order="old").eval()
    layer.mconv[0] = replacement(1) if replacement is nn.AvgPool3d else replacement()
    layer.mconv[0].eval()
    x = torch.randn(2, 3, *SIZES[3])
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    before = x.clone()
    with taken("fused"), torch.no_grad():
        y = layer(x)
        assert torch.equal(x, before)
        assert_all_near([y], [nn.Sequential(*layer.mconv)(x)])


class DoubleConv(nn.Conv3d):
    """Gives float64, which the kernels would round to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


def test_float64_from_a_replaced_convolution() -> None:
    layer = ConvModern3d(2, 3, normalizer="inst", activator="relu", layer_order="old")
    layer.mconv[0] = DoubleConv(2, 3, 3)
    x = torch.randn(2, 2, *SIZES[3])
    expected = nn.Sequential(*layer.mconv)(x)
    with taken("fused"):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with taken("triton"), pytest.raises(RuntimeError, match="float64"):
        layer(x)


def test_running_statistics_that_are_counted_without_being_used() -> None:
    """torch counts them as long as the norm has them, whatever its `track_running_stats` says."""
    layer = ConvModern3d(2, 3)
    layer.mconv[0] = nn.InstanceNorm3d(2, affine=True, track_running_stats=True)
    layer.mconv[0].track_running_stats = False
    untouched = copy.deepcopy(layer.mconv)
    x = torch.randn(2, 2, *SIZES[3])
    with taken("fused"):
        layer(x)
    untouched(x)
    assert untouched[0].running_mean.any()
    assert torch.equal(layer.mconv[0].running_mean, untouched[0].running_mean)


def test_the_representation_of_an_upsampling_layer() -> None:
    """As the reference prints it: one factor for each axis, or the size as it was given."""
    layer = ConvModern3d(2, 3, stride=2, scaler="up")
    assert repr(layer.mconv[2]) == "Upsample(scale_factor=(2.0, 2.0, 2.0), mode='trilinear')"
    assert repr(ConvModern1d(2, 3, stride=3, scaler="up").mconv[2]) == "Upsample(scale_factor=(3.0,), mode='linear')"
    assert repr(ConvModern2d(2, 3, output_size=7, scaler="up").mconv[2]) == "Upsample(size=7, mode='bilinear')"
    layer = ConvModern3d(2, 3, output_size=(7, 6, 5), stride=2, scaler="up")
    assert repr(layer.mconv[2]) == "Upsample(size=(7, 6, 5), mode='trilinear')"


def test_signature() -> None:
    expected = (
        "(in_planes, out_planes, kernel_size=3, stride=1, padding=1, output_size=None, "
        "normalizer='pinst', activator='prelu', layer_order='new', scaler='down')"
    )
    for layer in LAYERS.values():
        parameters = inspect.signature(layer).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == expected


def test_relu_is_not_in_place() -> None:
    assert not ConvModern3d(2, 3, activator="relu").mconv[1].inplace


def test_initialisation_draws_what_torch_draws() -> None:
    torch.manual_seed(3)
    layer = ConvModern3d(2, 3)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = sequential(2, 3)
    assert torch.equal(torch.get_rng_state(), after)
    for found, truth in zip(layer.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("normalizer", ["layer", "", None, 3])
def test_unknown_normalizer(normalizer: Any) -> None:
    with pytest.raises(ValueError, match="normalizer") as error:
        ConvModern3d(2, 3, normalizer=normalizer)
    assert repr(normalizer) in str(error.value)


@pytest.mark.parametrize("stride", [2, (1, 2, 1)])
@pytest.mark.parametrize("scaler", ["sideways", None])
def test_unknown_scaler_with_a_stride(stride: Any, scaler: Any) -> None:
    with pytest.raises(ValueError, match="scaler") as error:
        ConvModern3d(2, 3, stride=stride, scaler=scaler)
    assert "stride" in str(error.value)
    assert repr(stride) in str(error.value)
    assert repr(scaler) in str(error.value)


@pytest.mark.parametrize("order", LAYERS)
def test_a_bias_that_the_norm_cancels(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's convolution with a bias, in the "old" order: the kernels' route leaves the bias out."""
    unit = LAYERS[order](2, 4, layer_order="old")
    unit.mconv[0] = getattr(nn, f"Conv{order}d")(2, 4, 3, padding=1)
    x = torch.randn(2, 2, *SIZES[order])
    expected = gradients(copy.deepcopy(unit).double(), x.double())
    biases = []
    convolution = torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *args: biases.append(args[2]) or convolution(*args))
    with taken("fused"):
        y, dx, dweight, dbias, *rest = gradients(unit, x)
    assert biases == [None]
    assert dbias.tolist() == [0.0] * 4
    assert_all_near([y, dx, dweight, *rest], [*expected[:3], *expected[4:]])
