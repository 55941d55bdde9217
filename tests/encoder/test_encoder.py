"""EncoderNet3d and its 1-D and 2-D twins: structure, constructor arguments good and bad, presets, summary tables."""

import contextlib
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import taken
from support.plain import ENCODER, PlainEncoder, assert_same, twins
from torch import Tensor, nn
from torchsummary import summary

import fastenc
from fastenc import EncoderNet1d, EncoderNet2d, EncoderNet3d

DATA = Path(__file__).parents[1] / "data"
PRESETS = {"encnet12": 84_954_754, "encnet15": 122_119_042, "encnet17": 122_672_578, "encnet22": 160_390_402}


UNIT = ["0.weight", "0.bias", "1.weight", "2.weight"]


@pytest.mark.parametrize("out_length", [2, None])
def test_state_dict(out_length: int | None) -> None:
    net = EncoderNet3d(2, [2, 1], in_planes=3, kernel_size=3, out_length=out_length)
    expected = {
        "netbody.0.weight": (2, 3, 5, 5, 5),
        **dict.fromkeys([f"netbody.1.conv_list.0.mconv.{k}" for k in UNIT[:3]], (2,)),
        "netbody.1.conv_list.0.mconv.2.weight": (2, 2, 3, 3, 3),
        **dict.fromkeys([f"netbody.1.conv_scale.mconv.{k}" for k in UNIT[:3]], (2,)),
        "netbody.1.conv_scale.mconv.2.weight": (2, 2, 3, 3, 3),
        **dict.fromkeys([f"netbody.2.conv_scale.mconv.{k}" for k in UNIT[:3]], (2,)),
        "netbody.2.conv_scale.mconv.2.weight": (4, 2, 3, 3, 3),
        "netbody.3.weight": (4, 4, 3, 3, 3),
        "netbody.3.bias": (4,),
    }
    if out_length is not None:
        expected |= {"fc.weight": (2, 4), "fc.bias": (2,)}
    assert [(k, tuple(v.shape)) for k, v in net.state_dict().items()] == list(expected.items())
    assert [k for k, _ in net.named_parameters()] == list(expected)
    assert not list(net.buffers())
    assert all(p.is_contiguous() and p.requires_grad and type(p) is nn.Parameter for p in net.parameters())
    assert all(v.dtype == torch.float32 for v in net.state_dict().values())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_submodules_are_real(order: int) -> None:
    net = ENCODER[order](2, [2, 1])
    kinds = {type(m) for m in net.modules()}
    for name in (f"Conv{order}d", f"InstanceNorm{order}d", "PReLU", f"AdaptiveAvgPool{order}d", "Linear"):
        assert getattr(nn, name) in kinds
    norms = [m for m in net.modules() if isinstance(m, getattr(nn, f"InstanceNorm{order}d"))]
    assert len(norms) == 3
    assert all(m.affine and m.eps == 1e-5 and not m.track_running_stats for m in norms)
    names = {type(m).__name__ for m in net.modules()}
    assert {"_ConvModernNd", "_BlockConvStkNd", f"EncoderNet{order}d"} <= names


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_representation_of_the_pool(order: int) -> None:
    """As the reference prints it: one size for each axis."""
    assert repr(ENCODER[order](2, [1, 1]).netbody[4]) == f"AdaptiveAvgPool{order}d(output_size={(1,) * order})"


def test_the_representation_shows_recompute() -> None:
    lines = [repr(EncoderNet3d(2, [1, 1], recompute=recompute)).splitlines() for recompute in (False, True)]
    assert [line for line in lines[1] if line not in lines[0]] == ["  recompute=True"]


def test_widths_and_depths() -> None:
    net = EncoderNet3d(3, [1, 2, 3])
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv3d)]
    widths = [(m.in_channels, m.out_channels, m.stride[0], m.bias is not None) for m in convolutions]
    assert widths == [
        (1, 3, 1, False),
        (3, 3, 2, False),
        (3, 6, 1, False),
        (6, 6, 2, False),
        (6, 12, 1, False),
        (12, 12, 1, False),
        (12, 12, 2, False),
        (12, 12, 1, True),
    ]


@pytest.mark.parametrize("kind", [list, tuple, torch.Size])
def test_sequences_are_accepted(kind: Callable) -> None:
    net = EncoderNet3d(2, kind([2, 1]), kernel_size=kind([3, 1, 2]))
    assert net.nlayers == 5
    assert net.netbody[0].kernel_size == (5, 1, 4)
    assert net.netbody[1].conv_scale.mconv[2].kernel_size == (3, 1, 2)


def test_attributes() -> None:
    net = EncoderNet3d(2, [2, 3, 1], out_length=4)
    assert net.nlayers == 8
    with pytest.raises(AttributeError):
        net.nlayers = 3
    assert net.is_out_vector is True
    assert net.fc.out_features == 4
    assert len(net.netbody) == 6
    assert isinstance(net.netbody[5], nn.AdaptiveAvgPool3d)
    layer = net.netbody[1].conv_scale
    assert [name for name, _ in layer.named_children()] == ["mconv"]
    assert [type(m) for m in layer.mconv] == [nn.InstanceNorm3d, nn.PReLU, nn.Conv3d]


def test_signature() -> None:
    """The reference's five arguments, by place or by name; what fastenc adds goes by name only."""
    for net in ENCODER.values():
        parameters = list(inspect.signature(net).parameters.values())
        places = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters[:5]]
        assert places == ["channel", "layers", "kernel_size=3", "in_planes=1", "out_length=2"]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[5:])
    assert list(inspect.signature(EncoderNet3d.forward).parameters) == ["self", "x"]
    net = EncoderNet3d(2, [1, 1], 1, 3, None)
    assert net.netbody[0].weight.shape == (2, 3, 1, 1, 1)
    assert net.is_out_vector is False


@pytest.mark.parametrize("out_length", [None, 0, -1, -7])
def test_map_mode(out_length: int | None) -> None:
    net, plain = twins(2, [1, 1], out_length=out_length)
    assert net.is_out_vector is False
    assert not hasattr(net, "fc")
    assert len(net.netbody) == 4
    x = torch.randn(2, 1, 6, 7, 5, dtype=torch.float64)
    y = net(x)
    assert y.shape == (2, 4, 2, 2, 2)
    torch.testing.assert_close(y, plain(x))


@pytest.mark.parametrize("out_length", [1, 5])
def test_vector_mode(out_length: int) -> None:
    net, plain = twins(2, [1, 1], out_length=out_length)
    x = torch.randn(3, 1, 6, 7, 5, dtype=torch.float64)
    assert net(x).shape == (3, out_length)
    torch.testing.assert_close(net(x), plain(x))


KERNELS: dict[str, Any] = {
    "1-D, 3": (1, 3, (17,)),
    "1-D, (5,)": (1, (5,), (16,)),
    "1-D, 2": (1, 2, (9,)),
    "2-D, 3": (2, 3, (9, 12)),
    "2-D, (1, 4)": (2, (1, 4), (5, 8)),
    "3-D, 1": (3, 1, (3, 4, 2)),
    "3-D, 0 is 1": (3, 0, (3, 4, 2)),
    "3-D, 2": (3, 2, (6, 5, 4)),
    "3-D, 5": (3, 5, (7, 6, 5)),
    "3-D, (3, 1, 5)": (3, (3, 1, 5), (6, 3, 8)),
    "3-D, (2, 3, 4)": (3, [2, 3, 4], (5, 6, 7)),
    "3-D, (-1, 3, 3)": (3, (-1, 3, 3), (2, 6, 7)),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("route", "out_length"), [("auto", 2), ("auto", None), ("fused", 2), ("fused", None)])
def test_kernel_sizes_and_orders(name: str, route: str, out_length: int | None) -> None:
    order, kernel_size, size = KERNELS[name]
    with taken(route) as dtype:
        net, plain = twins(2, [2, 1], kernel_size, 3, out_length, order=order, dtype=dtype)
        assert [(k, v.shape) for k, v in net.state_dict().items()] == [
            (k, v.shape) for k, v in plain.state_dict().items()
        ]
        assert_same(net, plain, torch.randn(2, 3, *size, dtype=dtype))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeded_initialisation_of_the_twins(order: int) -> None:
    torch.manual_seed(7)
    net = ENCODER[order](3, [2, 1], in_planes=2)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    plain = PlainEncoder(3, [2, 1], in_planes=2, order=order)
    assert torch.equal(torch.get_rng_state(), after)
    for (key, value), (key_plain, value_plain) in zip(
        net.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert key == key_plain
        assert torch.equal(value, value_plain)


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    preset = getattr(fastenc, name)
    with torch.device("meta"):
        net = preset(3)
        assert type(net) is EncoderNet3d
        assert sum(p.numel() for p in net.parameters()) == PRESETS[name]
        assert type(preset()) is EncoderNet2d
        assert type(preset(order=1)) is EncoderNet1d
        net = preset(3, kernel_size=1, in_planes=4, out_length=None)
    assert net.netbody[0].weight.shape == (64, 4, 1, 1, 1)
    assert net.is_out_vector is False
    assert str(net.nlayers) == name.removeprefix("encnet")
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(preset).parameters.values()]
    assert str(inspect.Signature(bare)) == "(order=2, **kwargs)"


@pytest.mark.parametrize("order", [0, 4, -1, 2.5, "3", None])
def test_preset_order(order: Any) -> None:
    with pytest.raises(ValueError, match="order") as error:
        fastenc.encnet12(order)
    assert str(order) in str(error.value)


def test_presets_fix_the_channel() -> None:
    with pytest.raises(TypeError):
        fastenc.encnet12(3, channel=8)


# The user's two summary tables


def words(line: str) -> str:
    return " ".join(line.split())


def printed_summary(net: nn.Module) -> list[str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        summary(net, (3, 31, 32, 30), device="cpu")
    return [words(line) for line in text.getvalue().splitlines()]


def megabytes(line: str) -> tuple[str, float]:
    name, value = line.split(": ")
    return name, float(value)


@pytest.mark.parametrize(("example", "out_length", "rows"), [(1, 32, 70), (2, None, 68)])
def test_summary_tables_of_the_user(example: int, out_length: int | None, rows: int) -> None:
    """torchsummary leaves the root out: its row comes from a hook, and the last four lines are off by its output."""
    table = [words(line) for line in (DATA / f"summary_example_{example}.txt").read_text().splitlines()]
    root = next(i for i, line in enumerate(table) if line.startswith("EncoderNet3d"))

    net = EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3, out_length=out_length)
    assert net.nlayers == 17  # the document prints it above each table
    outputs: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, args, y: outputs.append(y))
    printed = printed_summary(net)
    hook.remove()
    sizes = slice(-5, -1)
    assert len(printed) == len(table) - 1
    assert printed[:-5] == table[:root] + table[root + 1 : -5]
    assert f"{type(net).__name__}-{rows} {[-1, *outputs[0].shape[1:]]} 0" == table[root]
    of_the_root = 2 * 4 * outputs[0][0].numel() / 2**20
    for found, expected in zip(map(megabytes, printed[sizes]), map(megabytes, table[sizes]), strict=True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], abs=of_the_root + 0.0101)


# Constructor arguments that cannot work


def generated() -> Any:
    return (n for n in (1, 1))


BAD: list[tuple[str, Any, str]] = [
    ("layers", [], "[]"),
    ("layers", [3], "[3]"),
    ("layers", (2,), "(2,)"),
    ("layers", [1, 0], "0"),
    ("layers", [-1, 2], "-1"),
    ("layers", [1.0, 1], "1.0"),
    ("layers", [1, 2.5], "2.5"),
    ("layers", ["1", "2"], "'1'"),
    ("layers", "12", "'12'"),
    ("layers", [None, 1], "None"),
    ("layers", None, "None"),
    ("layers", 3, "3"),
    ("layers", 2.5, "2.5"),
    ("layers", generated, "generator"),
    ("channel", 0, "0"),
    ("channel", -1, "-1"),
    ("channel", 2.5, "2.5"),
    ("channel", "4", "'4'"),
    ("channel", None, "None"),
    ("in_planes", 0, "0"),
    ("in_planes", -1, "-1"),
    ("in_planes", 1.5, "1.5"),
    ("in_planes", None, "None"),
    ("kernel_size", (), "()"),
    ("kernel_size", (3,), "(3,)"),
    ("kernel_size", [3, 3], "[3, 3]"),
    ("kernel_size", (3, 3, 3, 3), "(3, 3, 3, 3)"),
    ("kernel_size", 3.0, "3.0"),
    ("kernel_size", "3", "'3'"),
    ("kernel_size", "333", "'333'"),
    ("kernel_size", None, "None"),
    ("kernel_size", (3, 3.0, 3), "3.0"),
    ("kernel_size", (3, None, 3), "None"),
    ("out_length", 2.0, "2.0"),
    ("out_length", "2", "'2'"),
    ("out_length", [2], "[2]"),
]


@pytest.mark.parametrize(("argument", "value", "came"), BAD, ids=[f"{a}={came}" for a, _, came in BAD])
def test_bad_arguments(argument: str, value: Any, came: str) -> None:
    good: dict[str, Any] = {"channel": 2, "layers": [1, 1], "kernel_size": 3, "in_planes": 1, "out_length": 2}
    if value is generated:
        value = generated()
    before = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)) as error:
        EncoderNet3d(**{**good, argument: value})
    assert argument in str(error.value)
    assert came in str(error.value)
    assert torch.equal(torch.get_rng_state(), before), "drew parameters before it refused"


@pytest.mark.parametrize("value", [2.0, "2", [2], None])
def test_wrong_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        EncoderNet3d(value, [1, 1])
    if value is not None:
        with pytest.raises(TypeError):
            EncoderNet3d(2, [1, 1], out_length=value)


def test_kernel_size_of_the_wrong_order_says_how_many_it_needs() -> None:
    with pytest.raises(ValueError, match=r"kernel_size.*2"):
        EncoderNet2d(2, [1, 1], kernel_size=(3, 3, 3))
    with pytest.raises(ValueError, match=r"kernel_size.*1"):
        EncoderNet1d(2, [1, 1], kernel_size=(3, 3))
