"""Biases of convolutions that an InstanceNorm cancels: left out, with gradients of zeros, if nothing reads them.

"fused" is "auto" as it is on a GPU, the kernels interpreted.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_near
from support.small_models import twins
from test_custom_ops import Compiled
from test_third_party import BIASES, BROKEN
from test_third_party import twins as network_twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastenc.fusion import convolutions

NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "1-D": lambda: [nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), nn.PReLU()],
    "2-D": lambda: [nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True)],
    "3-D": lambda: [nn.Conv3d(2, 4, 3, padding=1, dilation=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1)],
    "one tap": lambda: [nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1)],
    "transposed": lambda: [nn.ConvTranspose3d(2, 4, 2, 2), nn.InstanceNorm3d(4, affine=True), nn.PReLU(4)],
    "a norm alone": lambda: [nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Sigmoid()],
    "Identity, dropout": lambda: [nn.Conv3d(2, 4, 3), nn.Identity(), nn.Dropout(0.0), nn.InstanceNorm3d(4), nn.PReLU()],
}


def pair(name: str = "3-D", bias: float = 0.5) -> tuple[Any, Any, Tensor]:
    net = nn.Sequential(*NETS[name]())
    with torch.no_grad():
        net[0].bias.fill_(bias)
    return *twins(net), torch.randn(2, 2, *(9, 8, 7)[: net[0].weight.dim() - 2])


def biased_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each convolution that runs from now on gets a bias."""
    calls: list[bool] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
            calls.append(bias is not None)
            return function(x, weight, bias, *options)

        return call

    kinds = {kind: (counted(function), names) for kind, (function, names) in convolutions._FUNCTIONS.items()}
    monkeypatch.setattr(convolutions, "_FUNCTIONS", kinds)
    for kind, (function, _) in kinds.items():
        name = {"ConvTranspose": "conv_transpose", "Conv": "conv"}[kind.__name__[:-2]] + kind.__name__[-2:]
        monkeypatch.setattr(nn.functional, name, function)
    return calls


def outcome(net: nn.Module, x: Tensor) -> list[Tensor]:
    """y and every gradient."""
    y = net(x)
    y.square().sum().backward()
    found = [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
    net.zero_grad()
    return found


def assert_same(net: nn.Module, untouched: nn.Module, x: Tensor) -> None:
    """Output and gradients, of the biases too, which are zeros but for rounding where a norm cancels them."""
    found, expected = outcome(net, x), outcome(copy.deepcopy(untouched).double(), x.double())
    largest = max(value.norm() for value in expected)
    for mine, truth in zip(found, expected, strict=True):
        assert (mine.double() - truth).norm() <= 1e-4 * truth.norm() + 1e-5 * largest


@pytest.mark.parametrize("name", NETS)
def test_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, untouched, x = pair(name)
    (norm,) = net.accelerated
    assert norm.biases == net.accelerated.biases == ("0",)
    assert "0 runs without its bias" in str(net.accelerated)
    assert "1 biases left out" in str(net.accelerated)
    with taken("fused"):
        assert_same(net, untouched, x)
        calls = biased_calls(monkeypatch)
        net(x).sum().backward()
        assert calls == [False]
        assert net[0].bias.grad.tolist() == [0.0] * 4
        assert net[0].weight.grad.any()
        with torch.no_grad():
            assert_near(net(x), untouched(x).double())
        assert calls == [False, False, True]
        torch.optim.SGD(net.parameters(), 0.1).step()
    assert torch.equal(net[0].bias, untouched[0].bias)
    assert list(net.state_dict()) == list(untouched.state_dict())


@pytest.mark.parametrize("name", NETS)
def test_left_out_of_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm alone is torch's own there, and runs on the same output."""
    net, untouched, x = pair(name)
    with taken("fused"):
        calls = biased_calls(monkeypatch)
        compiled = Compiled(net)
        compiled(x).sum().backward()
        assert net[0].bias.grad.tolist() == [0.0] * 4
        assert calls == [False]
        net.zero_grad()
        assert_near(compiled(x), untouched(x).double())
        program = torch.export.export(net, (x,))
        assert_near(program.module()(x), untouched(x).double())


def test_the_eager_route_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, untouched, x = pair()
    calls = biased_calls(monkeypatch)
    assert torch.equal(net(x), untouched(x))
    assert calls == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [0.5, 100.0])
def test_no_farther_from_float64(bias: float, dtype: torch.dtype) -> None:
    """With a large bias nearer: the sum with it loses digits of the output that the norm spreads."""
    net, untouched, x = pair(bias=bias)
    net, untouched, x = net.to(dtype), untouched.to(dtype), x.to(dtype)
    truth = copy.deepcopy(untouched).double()(x.double())
    with taken("fused"), torch.no_grad():
        ours, torchs = ((model(x).double() - truth).norm() for model in (net, untouched))
    assert ours <= (0.5 if bias == 100.0 else 1.0) * torchs + torch.finfo(dtype).eps * truth.norm()
    assert bias != 100.0 or ours < 0.5 * torchs


@pytest.mark.parametrize("name", BIASES)
def test_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bias that a norm cancels reaches a convolution, in eager mode and compiled."""
    net, untouched, x = network_twins(name)
    assert len(net.accelerated.biases) == BIASES[name]
    calls = biased_calls(monkeypatch)
    with torch.no_grad():
        expected = untouched(x)
        counts = [sum(calls)]
        for model in net, Compiled(net, fullgraph=name not in BROKEN):
            calls.clear()
            with launches_replaced():
                assert_near(model(x), expected.double())
            counts.append(sum(calls))
    assert counts == [counts[0], *2 * [counts[0] - BIASES[name]]]


def passes_for_biases(y: Tensor) -> tuple[int, int]:
    """Passes over tensors that biases of convolutions cost on cuDNN, forward and backward, by y's autograd graph.

    Forward the output is read and written once more, to add the bias. Backward its gradient is read once more.
    """
    biased, pending, seen = 0, [y.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(parent for parent, _ in node.next_functions)
        biased += node.name() == "ConvolutionBackward0" and node._saved_bias_sym_sizes_opt != (0,)
    return 2 * biased, biased


@pytest.mark.parametrize("name", ["PlainConvUNet", "UNet"])
def test_passes(name: str) -> None:
    """Two fewer forward and one fewer backward for each unit. Three biases have no norm behind them."""
    net, untouched, x = network_twins(name)
    with launches_replaced():
        assert passes_for_biases(untouched(x)) == (2 * (3 + BIASES[name]), 3 + BIASES[name])
        assert passes_for_biases(net(x)) == (6, 3)


# Where it stays.


class Deep(nn.Module):
    """A convolution and its norm in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv3d(2, 4, 3))
        self.tail = nn.Sequential(nn.Dropout(0.5), nn.InstanceNorm3d(4, affine=True), nn.PReLU())
        self.use: Callable[[Any, Tensor], Any] = lambda net, h: None
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        used = self.use(self, h)
        y = self.tail(h)
        return y if used is None else y + used


def hooked(path: str, before: bool) -> Callable[[Any], None]:
    def hook(net: Any) -> None:
        module = net.get_submodule(path)
        if before:
            module.register_forward_pre_hook(lambda module, args: (args[0] + 0.5 * args[0].amax(),))
        else:
            module.register_forward_hook(lambda module, args, y: y + 0.5 * args[0].amax() + 0.1 * y * y)

    return hook


def replaced(path: str) -> Callable[[Any], None]:
    def replace(net: Any) -> None:
        module = net.get_submodule(path)
        module.forward = MethodType(lambda self, x: type(self).forward(self, x).square(), module)

    return replace


KEEPS = {
    **{f"a hook on {path}": hooked(path, False) for path in ("head", "head.0", "tail", "tail.0", "tail.1")},
    **{f"a hook before {path}": hooked(path, True) for path in ("head.0", "tail", "tail.0", "tail.1")},
    **{f"{path} replaced": replaced(path) for path in ("head.0", "tail.1")},
}


@pytest.mark.parametrize("keep", KEEPS)
def test_kept_where_something_could_see_it(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, untouched = twins(Deep().eval())
    for model in net, untouched:
        KEEPS[keep](model)
    x = torch.randn(2, 2, 5, 6, 7)
    with taken("fused"):
        assert_same(net, untouched, x)
        calls = biased_calls(monkeypatch)
        with torch.no_grad():
            net(x)
        assert calls == [True]
        calls.clear()
        compiled = Compiled(net)
        assert_near(compiled(x), untouched(x).double())
        assert calls == [True, True]


class Two(nn.Module):
    """Several users of the output, one user that is no norm, or running statistics."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.act, self.what = nn.Conv3d(2, 4, 3), nn.PReLU(), what
        self.norm = nn.InstanceNorm3d(4, track_running_stats=what == "statistics", affine=True)
        self.other = nn.InstanceNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.what == "twice":
            return self.act(self.norm(h)) + self.other(h)
        if self.what == "another call":
            return self.act(self.norm(h)) + self.conv(x)
        if self.what == "kept":
            self.kept = h
        return self.act(self.norm(h)) + self.other(x.mean(1, keepdim=True).expand(-1, 4, -1, -1, -1)).mean()


@pytest.mark.parametrize("what", ["twice", "another call", "kept", "statistics"])
def test_kept_where_the_search_sees_another_use(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, untouched = twins(Two(what))
    assert net.accelerated.biases == ()
    x = torch.randn(2, 2, 5, 6, 7)
    with taken("fused"):
        assert_same(net, copy.deepcopy(untouched), x)
        calls = biased_calls(monkeypatch)
        net(x)
    assert calls[0]
    if what == "statistics":
        for _ in range(2):
            untouched(x)
        assert_near(net.norm.running_mean, untouched.norm.running_mean.double())


# Where the search could not know: the output is what it was.

USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": lambda net, h: h.mean(), "a slice": lambda net, h: h[:, :1].exp(), "sum": lambda net, h: 2 * h + h,
    "cat": lambda net, h: torch.cat([h, h], 2).sum(), "in place": lambda net, h: h.mul_(2.0).mean(),
    "view in place": lambda net, h: h[:, :, :2].mul_(3.0).mean(), "shape": lambda net, h: float(h.shape[1] * h.dim()),
    "detach": lambda net, h: h.detach().square(), "another convolution": lambda net, h: net.head[0](h[:, :2]).mean(),
    "no_grad": lambda net, h: torch.no_grad()(lambda: h * 1)(), "numpy": lambda net, h: float(h.detach().numpy().sum()),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_any_other_use_gets_the_bias(use: str) -> None:
    net, untouched = twins(Deep().eval())
    assert len(net.accelerated.biases) == 1
    for model in net, untouched:
        model.use = USES[use]
    with taken("fused"):
        assert_same(net, untouched, torch.randn(2, 2, 5, 6, 7))


class Crossing(nn.Module):
    """Two pairs. `cross` gets a norm's output and a convolution's, which the search saw in their own pairs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(*NETS["one tap"]()) for _ in range(2))
        self.cross: Any = None

    def forward(self, x: Tensor) -> Tensor:
        z, h = self.first[1](self.first[0](x)), self.second[0](x)
        return self.first[2](z) + self.second[2](self.second[1](h)) if self.cross is None else self.cross(z, h)


@pytest.mark.parametrize(
    "cross",
    [lambda z, h: z + h, lambda z, h: h - z, lambda z, h: torch.cat([z, h]), lambda z, h: torch.cat([h, z]),
     lambda z, h: z.add_(h), lambda z, h: torch.where(z > 0, z, h)],
    ids=["z + h", "h - z", "cat z, h", "cat h, z", "add_", "where"],
)  # fmt: skip
def test_a_norms_output_with_an_output_that_lacks_its_bias(cross: Any) -> None:
    net, untouched = twins(Crossing())
    assert len(net.accelerated.biases) == 2
    net.cross = untouched.cross = cross
    x = torch.randn(2, 2, 3, 4, 5)
    with launches_replaced():
        assert_same(net, untouched, x)
        with torch.no_grad():
            assert_near(net(x), copy.deepcopy(untouched).double()(x.double()))


@pytest.mark.parametrize("use", [name for name in USES if name not in ("numpy", "view in place", "in place")])
def test_any_other_use_gets_the_bias_when_compiled(use: str) -> None:
    net, untouched = twins(Deep().eval())
    for model in net, untouched:
        model.use = USES[use]
    x = torch.randn(2, 2, 5, 6, 7)
    with taken("fused"):
        assert_near(Compiled(net, fullgraph=False)(x), untouched(x).double())


def test_active_dropout_between() -> None:
    """What a dropout drops is the output with its bias; the same seed drops the same elements in one dimension."""
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Dropout(0.5), nn.InstanceNorm1d(4, affine=True), nn.PReLU())
    net, untouched = twins(net)
    x = torch.randn(2, 2, 40)
    with taken("fused"):
        torch.manual_seed(3)
        found = outcome(net, x)
    torch.manual_seed(3)
    expected = outcome(untouched.double(), x.double())
    for mine, truth in zip(found, expected, strict=True):
        assert (mine.double() - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("part", ["removed", "replaced", "sliced", "by hand"])
def test_surgery(part: str, compiled: bool) -> None:
    net, untouched, x = pair()

    def cut(model: Any) -> nn.Module:
        if part == "removed":
            del model[1:]
        elif part == "replaced":
            model[1] = nn.Identity()
        return {"sliced": lambda: model[:1], "by hand": lambda: nn.Sequential(model[0])}.get(part, lambda: model)()

    net, untouched = cut(net), cut(untouched)
    with taken("fused"):
        y = (Compiled(net) if compiled else net)(x)
        assert type(y) is Tensor
        assert_near(y, untouched(x).double())
        if not compiled:
            assert_same(net, untouched, x)


@pytest.mark.parametrize("kept", [lambda h: h, lambda h: [h], lambda h: lambda: h], ids=["itself", "list", "closure"])
def test_an_output_that_outlives_the_forward(kept: Callable[[Any], Any]) -> None:
    """Read after the bias has changed."""
    net, untouched = twins(Deep().eval())
    features = []
    x = torch.randn(2, 2, 5, 6, 7)
    for model in net, untouched:
        model.use = lambda net, h: setattr(net, "kept", kept(h))
        with taken("fused"), torch.no_grad():
            model(x)
            model.head[0].bias.add_(1.0)
        value: Any = model.kept
        features.append((value[0] if type(value) is list else value() if callable(value) else value) * 1)
    assert_near(features[0], features[1].double())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    net, untouched = (Checkpointed(model) for model in pair()[:2])
    with taken("fused"):
        assert_same(net, untouched, torch.randn(2, 2, 5, 6, 7, requires_grad=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointed", ["both", "first", "second"])
def test_checkpoints_that_end_between_the_modules(checkpointed: str, at: int, use_reentrant: bool) -> None:
    """Before the convolution, the norm and the activation, and behind all three."""

    class Split(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def part(self, x: Tensor, first: int, end: int) -> Tensor:
            for i in range(first, end):
                x = self.block[i](x)
            return x

        def forward(self, x: Tensor) -> Tensor:
            for name, first, end in (("first", 0, at), ("second", at, 3)):
                if checkpointed in ("both", name):
                    x = checkpoint(self.part, x, first, end, use_reentrant=use_reentrant)
                else:
                    x = self.part(x, first, end)
            return x

    net, untouched = twins(Split(nn.Sequential(*NETS["3-D"]())))
    assert net.accelerated.count("fused") == len(net.accelerated.biases) == 1
    x = torch.randn(2, 2, 5, 6, 7)
    results = []
    with launches_replaced():
        for model, given in (net, x), (untouched.double(), x.double()):
            given.requires_grad_()
            results.append([*outcome(model, given), given.grad])
    for mine, truth in zip(*results, strict=True):
        assert (mine.double() - truth).norm() <= 1e-4 * truth.norm() + 1e-4


def test_double_backward() -> None:
    net, untouched, x = pair()
    results = []
    with taken("fused"):
        for model in net, untouched.double():
            dweight, dbias = torch.autograd.grad(
                model(x.to(model[0].weight.dtype)).square().sum(), [model[0].weight, model[0].bias], create_graph=True
            )
            results.append(torch.autograd.grad(dweight.square().sum() + dbias.sum(), model[0].weight)[0])
    assert_near(results[0], results[1])
