"""accelerate, on small networks of plain torch: the numbers and the structure of the untouched model, whatever happens.

"auto" is the eager route, where equal means to the bit; "fused" is the Triton route as on a GPU, interpreted.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from plain import assert_all_near, assert_near, gradients
from routes import eager_norms, taken
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fastenc
from fastenc import deferred

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "shared PReLU": nn.PReLU,
    "PReLU": lambda: nn.PReLU(4, 0.1),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
}
SIZE = {1: (40,), 2: (6, 7), 3: (4, 5, 6)}


def stack(activation: nn.Module, *between: nn.Module, order: int = 3, affine: bool = True) -> nn.Sequential:
    """A convolution, norm, what is between, activation, a convolution; no parameter at its initial constant."""
    norm = NORM[order](4, affine=affine)
    net = nn.Sequential(CONVOLUTION[order](2, 4, 3), norm, *between, activation, CONVOLUTION[order](4, 2, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def volume(order: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 2, *SIZE[order], dtype=dtype)


def twins(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """net accelerated, and an untouched copy."""
    untouched = copy.deepcopy(net)
    return fastenc.accelerate(net), untouched


def assert_like_untouched(net: nn.Module, untouched: nn.Module, x: Tensor) -> None:
    """Output and all gradients, float32, near the untouched model's in float64."""
    found = gradients(net, x)
    with fastenc.backend("eager"):
        expected = gradients(copy.deepcopy(untouched).double(), x.double())
    assert_all_near(found, expected)


@contextmanager
def fused_calls() -> Iterator[mock.Mock]:
    """The calls of the fused operation for pairs; no norm and no activation may run by itself."""
    functions = "leaky_relu", "prelu", "relu"
    with (
        mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs,
        mock.patch.multiple(nn.functional, **{name: mock.Mock(side_effect=AssertionError(name)) for name in functions}),
        eager_norms() as norms,
    ):
        yield pairs
    assert norms.call_count == 0


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eager_route_to_the_bit(activation: str, order: int) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation](), order=order))
    x = volume(order)
    for found, expected in zip(gradients(net, x), gradients(untouched, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused(activation: str, order: int) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation](), nn.Identity(), order=order))
    with taken("fused"):
        with fused_calls() as pairs:
            gradients(net, volume(order))
        assert pairs.call_count == 1
        assert_like_untouched(net, untouched, volume(order))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [nn.Dropout(0.4), nn.Dropout1d(0.4), nn.Dropout(0.4, True), nn.Dropout(0.0)])
def test_dropout_commutes(dropout: nn.Module, training: bool) -> None:
    """The same seed drops the same elements; in 1-D, where the layout in which torch draws them stays."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1), dropout, order=1).train(training))
    x = volume(1)
    with taken("fused"):
        if not (training and dropout.inplace):
            with fused_calls() as pairs:
                gradients(net, x)
            assert pairs.call_count == 1
        torch.manual_seed(3)
        found = gradients(net, x)
    torch.manual_seed(3)
    assert_all_near(found, gradients(untouched, x))


def test_dropped_and_then_not_activated() -> None:
    """A dropout whose activation was taken away still drops what it drops, in the gradients too."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1), nn.Dropout(0.5), order=1))
    net[3], untouched[3] = nn.Tanh(), nn.Tanh()
    x = volume(1)
    torch.manual_seed(3)
    with taken("fused"):
        found = gradients(net, x)
    torch.manual_seed(3)
    assert_all_near(found, gradients(untouched, x))


class Shared(nn.Module):
    """One activation after two norms, and after a plain convolution; a norm that leads nowhere; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.act = nn.PReLU()
        self.norm1, self.norm2, self.norm3 = (nn.InstanceNorm3d(4, affine=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(x)))
        return self.act(self.conv3(y)) + self.norm3(x)


def test_shared_activation_and_a_norm_alone() -> None:
    net, untouched = twins(Shared())
    assert [(norm.name, norm.outcome) for norm in net.accelerated] == [
        ("norm1", "fused"), ("norm2", "fused"), ("norm3", "alone"),
    ]  # fmt: skip
    with (
        taken("fused"),
        eager_norms() as norms,
        mock.patch.object(nn.functional, "prelu", wraps=nn.functional.prelu) as p,
    ):
        assert_like_untouched(net, untouched, volume())
    assert p.call_count == 1 + 3, "one after the convolution, and the untouched model's three"
    assert norms.call_count == 3, "the untouched model's"


def test_aliased_modules() -> None:
    """nnU-Net registers its layers twice."""
    inner = stack(nn.LeakyReLU(inplace=True))
    net = nn.ModuleDict({"norm": inner[1], "all": inner, "act": inner[2]})
    fastenc.accelerate(net["all"])
    assert type(net["norm"]) is type(net["all"][1])
    assert net["norm"] is net["all"][1]
    assert net["act"] is net["all"][2]


# What happens to a network after acceleration. Each takes the accelerated and the untouched one alike.


def tap(net: nn.Sequential) -> nn.Module:
    return net[:2]


def tap_by_hand(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], net[1])


def norm_replaced(net: nn.Sequential) -> nn.Module:
    net[1] = nn.Identity()
    return net


def norm_replaced_by_a_fresh_one(net: nn.Sequential) -> nn.Module:
    net[1] = nn.InstanceNorm3d(4, eps=0.1)
    return net


def activation_replaced(net: nn.Sequential) -> nn.Module:
    net[2] = nn.Tanh()
    return net


def activation_removed(net: nn.Sequential) -> nn.Module:
    del net[2]
    return net


def activation_copied_out(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], copy.deepcopy(net[2]), net[3])


def activation_twice(net: nn.Sequential) -> nn.Module:
    net.insert(3, net[2])
    return net


def norm_copied_out(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], copy.copy(net[1]), net[3])


def norm_twice(net: nn.Sequential) -> nn.Module:
    net.insert(2, net[1])
    return net


def tap_of_the_middle(net: nn.Sequential) -> nn.Module:
    return nn.Sequential(net[0], net[1:3])


def hook(net: nn.Sequential) -> nn.Module:
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    return net


def pre_hook(net: nn.Sequential) -> nn.Module:
    net[1].register_forward_pre_hook(lambda module, args: (args[0].flip(2),))
    return net


def backward_hook(net: nn.Sequential) -> nn.Module:
    net[1].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    return net


def activation_hook(net: nn.Sequential) -> nn.Module:
    net[2].register_forward_hook(lambda module, args, output: output + args[0])
    return net


def activation_pre_hook(net: nn.Sequential) -> nn.Module:
    net[2].register_forward_pre_hook(lambda module, args: (args[0].neg(),))
    return net


def activation_pre_hook_in_place(net: nn.Sequential) -> nn.Module:
    net[2].register_forward_pre_hook(lambda module, args: (args[0].add_(1.0),))
    return net


def activation_backward_hook(net: nn.Sequential) -> nn.Module:
    net[2].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    return net


def activation_backward_pre_hook(net: nn.Sequential) -> nn.Module:
    net[2].register_full_backward_pre_hook(lambda module, dy: (3 * dy[0],))
    return net


SURGERY = [
    tap, tap_by_hand, norm_replaced, norm_replaced_by_a_fresh_one, activation_replaced, activation_removed,
    activation_copied_out, activation_twice, norm_copied_out, norm_twice, tap_of_the_middle,
    hook, pre_hook, backward_hook,
    activation_hook, activation_pre_hook, activation_pre_hook_in_place, activation_backward_hook,
    activation_backward_pre_hook,
]  # fmt: skip


@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery(surgery: Callable[[nn.Sequential], nn.Module]) -> None:
    net, untouched = twins(stack(nn.LeakyReLU(0.1)))
    net, untouched = surgery(net), surgery(untouched)
    with taken("fused"):
        assert type(net(volume())) is Tensor, "nothing deferred gets out"
        assert_like_untouched(net, untouched, volume())
        with torch.no_grad():
            x = volume()
            assert_near(net(x), untouched(x).double())


def test_hook_on_an_activation_in_place() -> None:
    """By the time a forward hook runs, the activation's input is its output."""
    net, untouched = twins(stack(nn.LeakyReLU(0.1, inplace=True)))
    with taken("fused"):
        assert_like_untouched(activation_hook(net), activation_hook(untouched), volume())


@pytest.mark.parametrize("inplace", [True, False])
def test_hook_that_keeps_the_norms_output(inplace: bool) -> None:
    """A hook on a parent unfuses nothing; what it keeps outlives the forward, and even a step of the optimizer."""
    net = nn.Sequential(nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)), nn.ReLU(inplace=inplace))
    net, untouched = twins(net)
    kept: list[Tensor] = []
    for model in net, untouched:
        model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    x = volume()
    with taken("fused"):
        net(x), untouched(x)
        if inplace:
            with pytest.raises(RuntimeError, match="after its in-place activation"):
                kept[0].sum()
            kept.clear()
            with torch.no_grad():
                net(x), untouched(x)
        assert_near(kept[0] * 1, kept[1].double())
        net(x)
        with torch.no_grad():
            net[0][1].weight.add_(1.0)
        if not inplace:
            with pytest.raises(RuntimeError, match="changed in place"):
                kept[-1].sum()


class Changes(nn.Module):
    """A forward that becomes another one: `then` says what happens between norm and activation."""

    def __init__(self, then: str = "") -> None:
        super().__init__()
        self.norm, self.act = nn.InstanceNorm3d(2, affine=True), nn.ReLU()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        z = self.norm(x)
        ahead: Tensor | float = 0.0
        if self.then == "look":
            ahead = z.square().mean((2, 3, 4), keepdim=True) + z.view(z.shape).sin()
        elif self.then == "change":
            z.mul_(3.0)
        elif self.then == "change a part":
            z[:, 1:].add_(1.0)
        elif self.then == "overwrite the input":
            x.mul_(3.0)
        return ahead + self.act(z)


@pytest.mark.parametrize("then", ["look", "change", "change a part"])
def test_a_forward_that_becomes_another_one(then: str) -> None:
    net, untouched = twins(Changes())
    net.then = untouched.then = then
    with taken("fused"):
        assert_like_untouched(net, untouched, volume())
        with torch.no_grad():
            x = volume()
            assert_near(net(x), untouched(x).double())


@torch.no_grad()
def test_input_overwritten_before_the_activation() -> None:
    net, untouched = twins(Changes("overwrite the input"))
    assert [norm.detail for norm in net.accelerated] == ["its input is used again before the activation"]
    x = volume()
    with taken("fused"):
        assert_near(net(x), untouched(x).double())
        net = fastenc.accelerate(Changes())
        net.then = "overwrite the input"
        with pytest.raises(RuntimeError, match="changed in place"):
            net(x)


def test_gradient_modes_that_change_in_between() -> None:
    """z without gradients, activated with; and the other way round."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.PReLU()

        def forward(self, x: Tensor, first: bool = True) -> Tensor:
            with torch.set_grad_enabled(first):
                z = self.norm(self.conv(x))
            with torch.set_grad_enabled(not first):
                return self.act(z)

    net, untouched = twins(Modes())
    x = volume()
    with taken("fused"):
        assert not net(x).requires_grad
        for model in net, untouched:
            model(x, first=False).sum().backward()
    assert net.conv.weight.grad is net.norm.weight.grad is None
    assert_near(net.act.weight.grad, untouched.act.weight.grad)


# Structure.


def test_structure_stays() -> None:
    net = stack(nn.PReLU(4))
    before = str(net), list(net.state_dict()), [*net.parameters()], [*net.modules()]
    accelerated = fastenc.accelerate(net)
    assert accelerated is net
    after = str(net), list(net.state_dict()), [*net.parameters()], [*net.modules()]
    assert before[:2] == after[:2]
    assert all(
        a is b for one, other in zip(before[2:], after[2:], strict=True) for a, b in zip(one, other, strict=True)
    )
    assert isinstance(net, nn.Sequential)
    assert isinstance(net[1], nn.InstanceNorm3d)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    untouched = stack(nn.PReLU(4))
    untouched.load_state_dict(net.state_dict())
    net.load_state_dict(untouched.state_dict())


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved])
def test_copies_are_accelerated(copied: Callable[[nn.Module], nn.Module]) -> None:
    net, untouched = twins(stack(nn.PReLU(4), nn.Dropout(0.5)).eval())
    other = copied(net)
    assert [type(a) is type(b) for a, b in zip(net.modules(), other.modules(), strict=True)] == [True] * 6
    with torch.no_grad():
        net[1].weight.zero_()  # the copy's own
    with taken("fused"):
        with fused_calls():
            gradients(other, volume())
        assert_like_untouched(other, untouched, volume())
    assert str(other.accelerated) == str(net.accelerated)
    assert [type(module) for module in fastenc.accelerate(other, undo=True).modules()] == [
        type(module) for module in untouched.modules()
    ]


def test_undo_and_repeat() -> None:
    net = stack(nn.PReLU(4), nn.Dropout(0.5))
    classes = [type(module) for module in net.modules()]
    attributes = [set(vars(module)) for module in net.modules()]
    fastenc.accelerate(net)
    once = [type(module) for module in net.modules()]
    summary = net.accelerated
    assert [type(module) for module in fastenc.accelerate(net).modules()] == once
    assert net.accelerated == summary
    assert once != classes
    for _ in range(2):
        fastenc.accelerate(net, undo=True)
        assert [type(module) for module in net.modules()] == classes
        assert [set(vars(module)) for module in net.modules()] == attributes


def test_a_part_then_the_whole() -> None:
    net = nn.Sequential(stack(nn.ReLU()), nn.InstanceNorm3d(2), nn.ReLU())
    untouched = copy.deepcopy(net)
    fastenc.accelerate(net[0])
    with taken("fused"):
        assert_like_untouched(net, untouched, volume())
        fastenc.accelerate(net)
        assert net.accelerated.count("fused") == 2
        assert_like_untouched(net, untouched, volume())
        fastenc.accelerate(net[0], undo=True)
        assert_like_untouched(net, untouched, volume())


# Finding.


class Untraceable(nn.Module):
    """Branches on values, and registers the activation first."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1)
        self.norm = nn.InstanceNorm3d(4)
        self.inner = stack(nn.ReLU())[1:3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


def test_untraceable_module() -> None:
    net, untouched = twins(nn.Sequential(nn.Conv3d(2, 4, 1), Untraceable(), *stack(nn.ReLU())[1:]))
    assert [norm.outcome for norm in net.accelerated] == ["fused"] * 3
    assert "Untraceable cannot be traced" in net.accelerated.norms[0].detail
    with taken("fused"):
        with fused_calls() as pairs:
            net(volume())
        assert pairs.call_count == 3
        assert_like_untouched(net, untouched, volume())


class Box(nn.Module):
    """Uses its input, and then cannot be traced any further."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if (2 * x).sum() > 0 else x


def test_reasons_against_pairing() -> None:
    net = nn.Sequential(nn.Sequential(nn.InstanceNorm3d(2), Box()), Changes("look"), Changes("change"))
    inner = nn.Sequential(nn.Conv3d(2, 2, 1), nn.InstanceNorm3d(2))
    outer = Untraceable()
    outer.inner = inner
    found = {norm.name: norm.detail for norm in fastenc.accelerate(nn.Sequential(net, outer)).accelerated}
    assert found == {
        "0.0.0": "its output goes to Box, not to a PReLU, LeakyReLU or ReLU module",
        "0.1.norm": "its output is used 3 times: square, view, ReLU",
        "0.2.norm": "its output is used 2 times: mul_, ReLU",
        "1.norm": "with 1.act (LeakyReLU); if they meet: the forward of Untraceable cannot be traced",
        "1.inner.1": "its output leaves a Sequential, and what calls that cannot be traced",
    }


def test_only_one_mode_pairs() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.InstanceNorm3d(2), nn.ReLU()

        def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
            x = self.norm(x)
            x = self.act(x) if self.training else x
            return x if scale is None else scale * x

    net, untouched = twins(Modes())
    assert net.accelerated.norms[0].detail == "with act (ReLU); its output is the model's"
    with taken("fused"):
        for training in True, False:
            assert_like_untouched(net.train(training), untouched.train(training), volume())


def test_the_search_leaves_no_trace() -> None:
    """Neither in what a forward keeps, nor through hooks."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack(nn.ReLU())
            self.kept: list[Tensor] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.net(x)
            self.kept.append(self.last)
            return self.last

    net = Keeps()
    net.net.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastenc.accelerate(net)
    assert net.kept == []
    assert net.last is None
    assert net.training
    assert net.accelerated.count("fused") == 1


class OwnNorm(nn.InstanceNorm3d):
    """Somebody's own."""


def test_norms_that_are_left() -> None:
    net = nn.Sequential(
        nn.InstanceNorm3d(2, track_running_stats=True), nn.ReLU(), OwnNorm(2), nn.ReLU(),
        nn.InstanceNorm3d(2), nn.GELU(), nn.InstanceNorm3d(2), fastenc.ConvModern3d(2, 2),
    )  # fmt: skip
    net, untouched = twins(net)
    assert [norm.outcome for norm in net.accelerated] == ["left", "left", "alone", "alone", "left"]
    details = [norm.detail for norm in net.accelerated]
    for detail, word in zip(
        details, ["running statistics", "OwnNorm", "GELU", "InstanceNorm3d", "own units"], strict=True
    ):
        assert word in detail
    text = str(net.accelerated)
    assert "5 instance norms: 0 fused, 2 alone, 3 left" in text
    with taken("fused"):
        assert_like_untouched(net, untouched, volume())
    assert net[0].running_mean.any()


def test_running_statistics_asked_for_later() -> None:
    net, untouched = twins(stack(nn.ReLU()))
    for model in net, untouched:
        model[1].register_buffer("running_mean", torch.zeros(4))
        model[1].register_buffer("running_var", torch.ones(4))
        model[1].track_running_stats = True
    with taken("fused"):
        net(volume())
        (row,) = fastenc.explain(net, volume())
    assert row.reason == "it keeps running statistics"
    assert net[1].running_mean.any()


@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), nn.ReLU(), nn.Sequential()]
)
def test_nothing_to_do(net: nn.Module) -> None:
    classes = [type(module) for module in net.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastenc.accelerate(net) is net
    assert [type(module) for module in net.modules()] == classes
    assert "nothing to accelerate" in str(net.accelerated)
    assert len(net.accelerated) == 0


def test_a_norm_as_the_model() -> None:
    net, untouched = twins(nn.InstanceNorm3d(2, affine=True))
    with taken("fused"), eager_norms() as norms:
        net(volume())
        assert norms.call_count == 0
        assert_like_untouched(net, untouched, volume())


# Bad input.


def test_bad_models() -> None:
    net = stack(nn.ReLU())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        fastenc.accelerate(lambda x: x)  # type: ignore[type-var]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net)
    with pytest.raises(TypeError, match="ScriptModule"):
        fastenc.accelerate(scripted)
    with torch.device("meta"), pytest.raises(ValueError, match=r"model\.0\.weight is on the meta device"):
        fastenc.accelerate(stack(nn.ReLU()))
    with pytest.raises(ValueError, match="model is compiled already"):
        fastenc.accelerate(torch.compile(net))
    with pytest.raises(ValueError, match=r"model\.1 is compiled already"):
        fastenc.accelerate(nn.Sequential(net, torch.compile(stack(nn.ReLU()))))
    net.compile()
    with pytest.raises(ValueError, match="model is compiled already"):
        fastenc.accelerate(net)


def test_jit_script_says_what_to_do() -> None:
    net = fastenc.accelerate(stack(nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="undo=True"):
            torch.jit.script(net)
        torch.jit.script(fastenc.accelerate(net, undo=True))


def misfit_channels(net: nn.Module) -> Tensor:
    return torch.randn(2, 3, 4, 5, 6)


def misfit_axes(net: nn.Module) -> Tensor:
    return torch.randn(2, 4, 5, 6, 7, 8)


def one_position(net: nn.Module) -> Tensor:
    return torch.randn(2, 4, 1, 1, 1)


def integers(net: nn.Module) -> Tensor:
    return torch.ones(2, 4, 3, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize("misfit", [misfit_channels, misfit_axes, one_position, integers])
def test_errors_are_torchs_own(misfit: Callable[[nn.Module], Tensor]) -> None:
    net, untouched = twins(stack(nn.PReLU(4))[1:3])
    x = misfit(net)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        untouched(x)
    with taken("fused"), pytest.raises(type(expected.value)) as found:
        net(x)
    assert str(found.value) == str(expected.value)


def test_prelu_of_a_wrong_length() -> None:
    net, untouched = twins(stack(nn.PReLU(3)))
    with pytest.raises(RuntimeError) as expected:
        untouched(volume())
    with taken("fused"), pytest.raises(RuntimeError) as found:
        net(volume())
    assert str(found.value) == str(expected.value)


def test_unbatched() -> None:
    net, untouched = twins(stack(nn.ReLU()))
    x = volume()[0]
    with taken("fused"):
        assert torch.equal(net(x), untouched(x))


# Training and tracing.


def test_double_backward() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))

    def penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *model.parameters()], allow_unused=True))[:-1]

    x = volume()
    with taken("fused"):
        found = penalty(net, x)
    assert_all_near(found, penalty(untouched.double(), x.double()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant: bool) -> None:
    """The recomputation fuses the same pairs, though it runs the blocks by themselves."""
    net, untouched = twins(nn.Sequential(stack(nn.PReLU(4), order=1), stack(nn.ReLU(), nn.Dropout(0.5), order=1)))

    class Checkpointed(nn.Module):
        def __init__(self, blocks: nn.Module) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    x = volume(1).requires_grad_()
    with taken("fused"), fused_calls() as pairs:
        torch.manual_seed(3)
        found = Checkpointed(net)
        found(x).square().sum().backward()
    assert pairs.call_count == 4
    torch.manual_seed(3)
    expected = Checkpointed(untouched)
    expected(x).square().sum().backward()
    assert_all_near([p.grad for p in found.parameters()], [p.grad for p in expected.parameters()])


@pytest.mark.parametrize("activation", ["PReLU", "LeakyReLU"])
def test_autocast(activation: str) -> None:
    net, untouched = twins(stack(ACTIVATIONS[activation]()))
    x = volume()
    with torch.autocast("cpu", torch.bfloat16):
        with taken("fused"):
            found = gradients(net, x)
        expected = gradients(untouched, x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 2**-5 * b.float().norm() + 1e-2 * expected[-1].norm()


def test_inference_mode() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    with taken("fused"), torch.inference_mode():
        x = volume()
        with fused_calls() as pairs:
            y = net(x)
        assert pairs.call_count == 1
        assert_near(y, untouched(x).double())
        assert_near(tap(net)(x), tap(untouched)(x).double())


def compiled(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    return torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)


def exported(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    program = torch.export.export(net, (x,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.instance_norm.default in targets
    return program.module()


def symbolic(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    graph = fx.symbolic_trace(net)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 4
    return graph


def jitted(net: nn.Module, x: Tensor) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, x)


@pytest.mark.parametrize("tracer", [compiled, exported, symbolic, jitted])
@pytest.mark.parametrize("route", ["auto", "fused"])
def test_tracers_see_the_plain_modules(tracer: Callable[..., Any], route: str) -> None:
    torch.compiler.reset()
    net, untouched = twins(stack(nn.PReLU(4)).eval())
    x = volume()
    with taken(route):
        assert_near(tracer(net, x)(x), untouched(x).double())


def test_functional_transforms() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    x = volume()
    with taken("fused"):
        found, expected = (torch.func.vmap(model)(x[:, None]) for model in (net, untouched))
        assert torch.equal(found, expected)


# The layout.


def test_volumes_go_channels_last() -> None:
    net = fastenc.accelerate(stack(nn.PReLU(4))[:3])
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    x = volume()
    with taken("fused"):
        y = net(x)
        assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in seen)
        assert y.is_contiguous()
        assert torch.equal(net(x.contiguous(memory_format=torch.channels_last_3d)), y)
    assert all(parameter.is_contiguous() for parameter in net.parameters())
    seen.clear()
    net(x)
    assert seen[0] is x, "the eager route touches nothing"


def test_arguments_of_any_kind() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack(nn.ReLU())

        def forward(self, x: Tensor, scale: float = 1.0, *, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
            y = scale * self.net(x)
            return {"y": y if extra is None else y + extra["shift"], "scale": scale, "all": [y, y.sum()]}

    net, untouched = twins(Many())
    x, shift = volume(), torch.randn(2, 2, 2, 3, 4)
    with taken("fused"):
        for arguments, keywords in (((x,), {}), ((x, 2.0), {"extra": {"shift": shift}}), ((), {"x": x})):
            found, expected = net(*arguments, **keywords), untouched(*arguments, **keywords)
            assert found["scale"] == expected["scale"]
            assert_all_near([found["y"], *found["all"]], [expected["y"], *expected["all"]])
            assert found["y"].stride() == expected["y"].stride()


class Annotated(Tensor):
    """A tensor that carries a note along, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        notes = [argument.note for argument in args if isinstance(argument, Annotated) and hasattr(argument, "note")]
        if isinstance(result, Annotated) and notes:
            result.note = notes[0]
        return result


def test_annotated_tensors() -> None:
    net, untouched = twins(stack(nn.PReLU(4)))
    x = volume().as_subclass(Annotated)
    x.note = "kept"
    with taken("fused"):
        with fused_calls() as pairs:
            y = net(x)
        assert pairs.call_count == 1
    assert type(y) is Annotated
    assert y.note == "kept"
    assert_near(y.as_subclass(Tensor), untouched(volume().as_subclass(Annotated).copy_(x)).as_subclass(Tensor).double())
    assert torch.equal(net(x), untouched(x))


# Saying it.


def test_explain() -> None:
    net = fastenc.accelerate(Shared())
    rows = list(fastenc.explain(net, volume()))
    assert [row.name for row in rows] == ["norm1", "norm2", "norm3"]
    assert {row.route for row in rows} == {"eager"}
    net.norm2.register_forward_hook(lambda *_: None)
    with taken("fused"):
        rows = list(fastenc.explain(net, volume()))
    assert [row.route for row in rows] == ["triton", "eager", "triton"]
    assert rows[1].reason == "a hook is registered on InstanceNorm3d"
    assert not net.norm1._forward_pre_hooks


def test_triton_by_name_says_why_not() -> None:
    net = fastenc.accelerate(stack(nn.ReLU()))
    net[1].register_forward_hook(lambda *_: None)
    with taken("triton"), pytest.raises(RuntimeError, match="a hook is registered on InstanceNorm3d"):
        net(volume())
