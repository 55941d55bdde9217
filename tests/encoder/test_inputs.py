"""What EncoderNet3d does with inputs good and bad, in every dtype, layout and route."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import eager_norms, either_route, taken
from support.plain import assert_near, gradients, twins
from torch import Tensor, nn

from fastenc import EncoderNet3d


@pytest.mark.parametrize("training", [True, False])
@either_route
def test_one_spatial_element(training: bool, route: str) -> None:
    net = EncoderNet3d(2, [1, 1]).train(training)
    message = "Expected more than 1 spatial element when training, got input size torch.Size([1, 2, 1, 1, 1])"
    with taken(route):
        with pytest.raises(ValueError, match=re.escape(message)):
            net(torch.randn(1, 1, 2, 2, 2))
        assert net(torch.randn(1, 1, 3, 3, 3)).shape == (1, 2)  # a last map of 1 x 1 x 1 meets no norm


@either_route
def test_empty_batch(route: str) -> None:
    with taken(route), pytest.raises(IndexError):
        EncoderNet3d(2, [1, 1])(torch.randn(0, 1, 8, 8, 8))


@pytest.mark.parametrize("size", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
def test_empty_axis(size: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        EncoderNet3d(2, [1, 1])(torch.randn(1, 1, *size))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 8, 8, 8), (1, 1, 1, 8, 8, 8)], ids=str)
def test_wrong_number_of_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        EncoderNet3d(2, [1, 1])(torch.randn(shape))


def test_unbatched_input_whose_depth_equals_the_channels() -> None:
    """torch's PReLU would take the depth for the channels here and answer with the wrong slopes."""
    with pytest.raises((RuntimeError, ValueError)):
        EncoderNet3d(2, [1, 1], kernel_size=(1, 3, 3), out_length=None)(torch.randn(1, 2, 8, 8))


def test_wrong_channel_count() -> None:
    with pytest.raises(RuntimeError):
        EncoderNet3d(2, [1, 1], in_planes=3)(torch.randn(1, 1, 8, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_dtype_mismatch(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError):
        EncoderNet3d(2, [1, 1])(torch.ones(1, 1, 8, 8, 8, dtype=dtype))


@pytest.mark.parametrize("x", [[[1.0]], 3.0, None, "x"])
def test_not_a_tensor(x: Any) -> None:
    with pytest.raises(TypeError):
        EncoderNet3d(2, [1, 1])(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("out_length", [2, None])
@either_route
def test_nan_and_inf_propagate_within_their_sample(value: float, out_length: int | None, route: str) -> None:
    with taken(route) as dtype:
        net, plain = twins(2, [2, 1], out_length=out_length, dtype=dtype)
        x = torch.randn(2, 1, 7, 6, 5, dtype=dtype)
        x[0, 0, 3, 2, 1] = value
        y = net(x)
        assert y[0].isnan().all()
        assert y[1].isfinite().all()
        assert_near(y, plain(x))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last_3d": lambda x: x.to(memory_format=torch.channels_last_3d),
    "permuted": lambda x: x.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
    "sliced": lambda x: x.repeat_interleave(2, 4)[..., ::2],
    "expanded over the batch": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "expanded over an axis": lambda x: x[:, :, :1].expand(-1, -1, 6, -1, -1),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("out_length", [2, None])
@either_route
def test_strides_of_the_input(name: str, out_length: int | None, route: str) -> None:
    with taken(route) as dtype:
        net, plain = twins(2, [2, 1], in_planes=3, out_length=out_length, dtype=dtype)
        x = STRIDED[name](torch.randn(2, 3, 6, 7, 5, dtype=dtype))
        before, version = x.clone(), x._version
        assert_near(net(x), plain(x.contiguous()))
        assert torch.equal(x, before)
        assert x._version == version, "the input was written to"


class Annotated(Tensor):
    """As MONAI's MetaTensor: a tensor that keeps its kind through every operation."""


@either_route
def test_tensor_of_a_subclass(route: str) -> None:
    with taken(route) as dtype:
        net, plain = twins(2, [2, 1], dtype=dtype)
        x = torch.randn(2, 1, 6, 7, 5, dtype=dtype)
        y = net(x.as_subclass(Annotated))
        assert type(y) is type(plain(x.as_subclass(Annotated))) is Annotated
        assert_near(y.as_subclass(Tensor), plain(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_map_comes_back_in_the_memory_format_of_the_input(memory_format: torch.memory_format) -> None:
    net = EncoderNet3d(2, [2, 1], in_planes=3, out_length=None)
    x = torch.randn(2, 3, 6, 7, 5).to(memory_format=memory_format)
    with taken("triton"):
        assert net(x).is_contiguous(memory_format=memory_format)


@either_route
@pytest.mark.parametrize("stem", [False, True])
def test_input_is_never_changed_in_inference(stem: bool, route: str) -> None:
    """In no-grad mode a fused norm may work in place, but on what a convolution made: never on the input."""
    net = EncoderNet3d(2, [1, 1], kernel_size=1, in_planes=2).eval()
    if not stem:
        net.netbody[0] = nn.Identity()  # the first norm's input is now the user's own tensor
    x = torch.randn(2, 2, 4, 4, 4)
    before = x.clone()
    with torch.no_grad(), taken(route):
        first = net(x)
        second = net(x)
    assert torch.equal(x, before)
    assert torch.equal(first, second)


def test_train_and_eval_are_equal() -> None:
    net = EncoderNet3d(2, [2, 1])
    x = torch.randn(2, 1, 7, 6, 5)
    assert torch.equal(net.train()(x), net.eval()(x))


def test_samples_are_independent() -> None:
    net, _ = twins(2, [2, 1])
    x = torch.randn(3, 1, 7, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), torch.cat([net(sample[None]) for sample in x]))


PARTS = (slice(0, 1), slice(1, 2), slice(2, None))


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_whole_network_in_one_dtype(dtype: torch.dtype) -> None:
    """The same aten operations in the same order: equal to the plain twin to the last bit or, in float64, near it."""
    net, plain = twins(2, [2, 1], dtype=dtype)
    x = torch.randn(2, 1, 9, 8, 10, dtype=dtype)
    for a, b in zip(gradients(net, x), gradients(plain, x), strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=16 * torch.finfo(dtype).eps * scale)


def errors(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Relative errors of the output, the input gradient, and all parameter gradients together."""
    parts = [(torch.cat([t.double().flatten() for t in tensors[part]]) for tensors in (found, truth)) for part in PARTS]
    return torch.stack([(a - b).norm() / b.norm() for a, b in parts])


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_fused(autocast: bool, dtype: torch.dtype) -> None:
    """From the float64 network no farther than twice the plain network in the same dtype, plus four ULP.

    Where one activation changes its sign, gradients jump by a tenth, on either side: so the medians of eight inputs.
    """
    parameters = torch.float32 if autocast else dtype
    net, plain = twins(2, [2, 1], dtype=parameters)
    truth = copy.deepcopy(plain).double()
    fused, low = [], []
    for _ in range(8):
        x = torch.randn(2, 1, 9, 8, 10, dtype=parameters)
        exact = gradients(truth, x.double())
        with torch.autocast("cpu", dtype, enabled=autocast):
            low.append(errors(gradients(plain, x), exact))
            with taken("fused"), eager_norms() as calls:
                found = gradients(net, x)
        fused.append(errors(found, exact))
        assert calls.call_count == 0
        assert found[0].dtype == dtype
        assert all(gradient.dtype == parameters for gradient in found[1:])
    allowed = 2 * torch.stack(low).median(0).values + 4 * torch.finfo(dtype).eps
    assert (torch.stack(fused).median(0).values <= allowed).all()


@pytest.mark.usefixtures("no_onednn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_autocast(dtype: torch.dtype) -> None:
    net, plain = twins(2, [2, 1], dtype=torch.float32)
    seen: dict[str, set[torch.dtype]] = {}
    hooks = [
        m.register_forward_hook(lambda m, args, y: seen.setdefault(type(m).__name__, set()).add(y.dtype))
        for m in net.modules()
    ]
    x = torch.randn(2, 1, 9, 8, 10, requires_grad=True)
    with torch.autocast("cpu", dtype):
        hooked, expected = net(x), plain(x)
    for hook in hooks:
        hook.remove()
    for name in ("Conv3d", "InstanceNorm3d", "PReLU", "_ConvModernNd", "_BlockConvStkNd", "Linear", "EncoderNet3d"):
        assert seen[name] == {dtype}, name
    assert seen["AdaptiveAvgPool3d"] == {torch.float32}

    with torch.autocast("cpu", dtype):
        y = net(x)
    assert y.dtype == dtype
    few_ulp = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(hooked, expected, rtol=0, atol=few_ulp)
    torch.testing.assert_close(y, expected, rtol=0, atol=few_ulp)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_autocast_map_mode() -> None:
    net, _ = twins(2, [1, 1], out_length=None, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(1, 1, 6, 6, 6)).dtype == torch.bfloat16
