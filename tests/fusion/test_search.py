"""What accelerate finds, what it says of it, and that the network is otherwise as it was."""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import gradients
from support.small_models import Changes, Shared, assert_like_untouched, fused_calls, small_input, stack, twins
from torch import Tensor, nn

import fastenc

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
            gradients(other, small_input())
        assert_like_untouched(other, untouched, small_input())
    assert str(other.accelerated) == str(net.accelerated)
    assert [type(module) for module in fastenc.accelerate(other, undo=True).modules()] == [
        type(module) for module in untouched.modules()
    ]


def test_undo_and_repeat() -> None:
    net = stack(nn.PReLU(4), nn.Dropout(0.5))
    classes = [type(module) for module in net.modules()]
    attributes = [set(vars(module)) for module in net.modules()]
    fastenc.accelerate(net)
    once = [type(vars(module).get("forward")) for module in net.modules()]
    summary = net.accelerated
    assert [type(vars(module).get("forward")) for module in fastenc.accelerate(net).modules()] == once
    assert net.accelerated == summary
    assert type(None) not in once, "the convolutions too"
    assert [type(module) for module in net.modules()] == classes
    for _ in range(2):
        fastenc.accelerate(net, undo=True)
        assert [type(module) for module in net.modules()] == classes
        assert [set(vars(module)) for module in net.modules()] == attributes


def test_a_part_then_the_whole() -> None:
    net = nn.Sequential(stack(nn.ReLU()), nn.InstanceNorm3d(2), nn.ReLU())
    untouched = copy.deepcopy(net)
    fastenc.accelerate(net[0])
    with taken("fused"):
        assert_like_untouched(net, untouched, small_input())
        fastenc.accelerate(net)
        assert net.accelerated.count("fused") == 2
        assert_like_untouched(net, untouched, small_input())
        fastenc.accelerate(net[0], undo=True)
        assert_like_untouched(net, untouched, small_input())


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
            net(small_input())
        assert pairs.call_count == 3
        assert_like_untouched(net, untouched, small_input())


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
        "0.0.0": "its output goes to Box, not to PReLU, LeakyReLU or ReLU",
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
            assert_like_untouched(net.train(training), untouched.train(training), small_input())


def test_the_search_leaves_no_trace() -> None:
    """Neither in what a forward keeps, counts or draws, nor through hooks."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack(nn.ReLU())
            self.kept: list[Tensor] = []
            self.last: Tensor | None = None
            self.register_buffer("calls", torch.zeros(()))
            self.counted = {"calls": [0]}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.counted["calls"][0] += 1
            x = x + torch.rand(()) + random.random()
            self.last = self.net(x)
            self.kept.append(self.last)
            return self.last

    net = Keeps()
    net.net.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    drawn = random.getstate(), torch.get_rng_state().tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastenc.accelerate(net)
    assert net.kept == []
    assert net.last is None
    assert net.calls == net.counted["calls"][0] == 0
    assert (random.getstate(), torch.get_rng_state().tolist()) == drawn
    assert net.training
    assert net.accelerated.count("fused") == 1


def test_an_activation_that_is_not_registered() -> None:
    """One that the forward makes or finds elsewhere does not complete the norm."""
    elsewhere = nn.ReLU()

    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm3d(2)

        def forward(self, x: Tensor) -> Tensor:
            return elsewhere(self.norm(x))

    net, untouched = twins(Finds())
    (norm,) = net.accelerated
    assert (norm.outcome, norm.detail) == ("alone", "its output goes to a ReLU that is not registered in the model")
    assert "forward" not in vars(elsewhere)
    with taken("fused"):
        assert_like_untouched(net, untouched, small_input())


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
        assert_like_untouched(net, untouched, small_input())
    assert net[0].running_mean.any()


@pytest.mark.parametrize("tracks", [True, False])
def test_running_statistics_asked_for_later(tracks: bool) -> None:
    """torch updates them in training even where they are not to be tracked."""
    net, untouched = twins(stack(nn.ReLU()))
    for model in net, untouched:
        model[1].register_buffer("running_mean", torch.zeros(4))
        model[1].register_buffer("running_var", torch.ones(4))
        model[1].track_running_stats = tracks
    with taken("fused"):
        net(small_input())
        (row,) = fastenc.explain(net, small_input())
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
        net(small_input())
        assert norms.call_count == 0
        assert_like_untouched(net, untouched, small_input())


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
        untouched(small_input())
    with taken("fused"), pytest.raises(RuntimeError) as found:
        net(small_input())
    assert str(found.value) == str(expected.value)


def test_unbatched() -> None:
    net, untouched = twins(stack(nn.ReLU()))
    x = small_input()[0]
    with taken("fused"):
        assert torch.equal(net(x), untouched(x))


# Saying it.


def test_explain() -> None:
    net = fastenc.accelerate(Shared())
    rows = list(fastenc.explain(net, small_input()))
    assert [row.name for row in rows] == ["norm1", "norm2", "norm3"]
    assert {row.route for row in rows} == {"eager"}
    net.norm2.register_forward_hook(lambda *_: None)
    with taken("fused"):
        rows = list(fastenc.explain(net, small_input()))
    assert [row.route for row in rows] == ["triton", "eager", "triton"]
    assert rows[1].reason == "a hook is registered on InstanceNorm3d"
    assert not net.norm1._forward_pre_hooks


def test_triton_by_name_says_why_not() -> None:
    net = fastenc.accelerate(stack(nn.ReLU()))
    net[1].register_forward_hook(lambda *_: None)
    with taken("triton"), pytest.raises(RuntimeError, match="a hook is registered on InstanceNorm3d"):
        net(small_input())
