"""A frozen model gives the model's numbers, sees new weights when told to, and shares nothing with the model."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from support.backends import either_route, taken
from support.plain import assert_near, small_input, small_twins
from torch import Tensor, nn

import fastenc
from fastenc import freeze


@either_route
def test_bitwise_the_models_numbers(route: str) -> None:
    with taken(route), torch.no_grad():
        net, plain = small_twins(torch.float32)
        x = small_input(dtype=torch.float32)
        y = freeze(net)(x)
        assert torch.equal(y, net(x))
        assert not y.requires_grad
        assert_near(y, plain(x))


@either_route
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_dtype_it_is_the_model_under_autocast(dtype: torch.dtype, route: str) -> None:
    with taken(route), torch.no_grad():
        net, _ = small_twins(torch.float32)
        x = small_input(dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            expected = net(x)
        frozen = freeze(net, dtype)
        y = frozen(x)
    assert y.dtype == expected.dtype == dtype
    assert torch.equal(y, expected)
    for module in frozen._copy.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            assert module.weight.dtype == dtype
        elif isinstance(module, (nn.InstanceNorm3d, nn.PReLU)):
            assert module.weight.dtype == torch.float32


@either_route
def test_refresh_takes_new_weights_and_nothing_else_does(route: str) -> None:
    with taken(route), torch.no_grad():
        net, plain = small_twins(torch.float32)
        x = small_input(dtype=torch.float32)
        frozen = freeze(net)
        before = frozen(x)
        memory = {name: p.data_ptr() for name, p in frozen._copy.named_parameters()}
        for network in (net, plain):
            for parameter in network.parameters():
                parameter.data.mul_(0.7)
        assert torch.equal(frozen(x), before)
        assert frozen.refresh()
        assert torch.equal(frozen(x), net(x))
        assert_near(frozen(x), plain(x))
        assert memory == {name: p.data_ptr() for name, p in frozen._copy.named_parameters()}


def test_a_model_that_changed_its_dtype_or_shape_is_copied_again() -> None:
    net, _ = small_twins(torch.float32)
    frozen = freeze(net)
    net.fc = nn.Linear(4, 7)
    assert not frozen.refresh()
    x = small_input(dtype=torch.float32)
    assert torch.equal(frozen(x), net(x).detach())
    net.double()
    assert not frozen.refresh()
    assert torch.equal(frozen(x.double()), net(x.double()).detach())


def big_enough() -> tuple[nn.Module, Tensor]:
    """A network with a 2³ map that is strided and a 1³ map at its end, and weights from which a product pays."""
    torch.manual_seed(3)
    return fastenc.EncoderNet3d(64, [1, 1]).eval(), torch.randn(1, 1, 4, 4, 4)


@either_route
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_live_taps_are_cut_once(dtype: torch.dtype | None, route: str) -> None:
    net, x = big_enough()
    with taken(route), torch.no_grad():
        frozen = freeze(net, dtype)
        first = frozen(x)
        cuts = [m.__dict__["cuts"] for m in frozen._copy.modules() if "cuts" in m.__dict__]
        made = [matrix for cut in cuts for matrix in cut.values()]
        assert sorted(matrix.shape[1] for matrix in made) == [128, 64 * 8]  # 1 of 27 taps of 128 planes, 8 of 64
        assert torch.equal(frozen(x), first)
        assert [id(m) for m in made] == [id(matrix) for cut in cuts for matrix in cut.values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            expected = net(x)
        torch.testing.assert_close(
            first, expected, rtol=0, atol=(2**-6 if dtype else 1e-5) * expected.abs().max().item()
        )
        for parameter in net.parameters():
            parameter.mul_(1.5)
        frozen.refresh()
        assert torch.equal(frozen(x), freeze(net, dtype)(x))


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))])
def test_a_copy_is_frozen_from_a_copy_of_the_model(travel: Any) -> None:
    net, x = big_enough()
    frozen = freeze(net, torch.bfloat16)
    y = frozen(x)
    assert len(pickle.dumps(frozen)) < 1.1 * len(pickle.dumps(net))  # the frozen copies do not travel
    twin = travel(frozen)
    assert all(torch.equal(a, b) for a, b in zip(twin.model.parameters(), net.parameters(), strict=True))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    frozen.refresh()
    assert torch.equal(twin(x), y)
    assert not torch.equal(frozen(x), y)


def test_training_continues_after_freezing() -> None:
    net, _ = small_twins(torch.float32)
    frozen = freeze(net.train())
    x = small_input(dtype=torch.float32)
    y = frozen(x)
    net(x).square().sum().backward()
    assert net.training
    assert all(p.grad is not None for p in net.parameters())
    assert torch.equal(frozen(x), y)
    assert all(p.grad is None and not p.requires_grad for p in frozen._copy.parameters())


def test_any_module_and_tied_weights() -> None:
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.BatchNorm1d(3), nn.Dropout(0.5), linear)
    frozen = freeze(model)
    x = torch.randn(5, 3)
    assert torch.equal(frozen(x), model.eval()(x).detach())
    assert frozen._copy[0] is frozen._copy[3]
    assert repr(frozen) == "Frozen(Sequential, dtype=None)"


@pytest.mark.parametrize(("before", "after"), [((), ("01",)), (("01",), ()), (("02",), ("12",))])
def test_refresh_where_other_modules_share_a_weight(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).eval()

    def share(pairs: tuple[str, ...]) -> None:
        for layer in model:
            layer.weight = nn.Parameter(torch.randn(3, 3))
        for first, second in pairs:
            model[int(second)].weight = model[int(first)].weight

    share(before)
    frozen, x = freeze(model), torch.randn(2, 3)
    share(after)
    assert not frozen.refresh()
    assert torch.equal(frozen(x), model(x))


@pytest.mark.parametrize("model", [None, lambda x: x, torch.nn.Conv3d])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="model"):
        freeze(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model.*script"):
        freeze(torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bf16"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype") as error:
        freeze(nn.Linear(2, 2), dtype)
    assert str(dtype) in str(error.value)


# Inference mode, and what refresh takes


@either_route
@pytest.mark.parametrize("called", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("built_in", [torch.enable_grad, torch.inference_mode])
def test_refresh_after_inference_mode(built_in: Any, frozen_in: Any, called: Any, route: str) -> None:
    """Wherever the model was built, frozen and called; refreshed outside inference mode and inside it."""
    with built_in():
        net, x = big_enough()
    with taken(route):
        with frozen_in():
            frozen = freeze(net)
        for refreshed_in in (torch.no_grad, torch.inference_mode):
            with called():
                frozen(x)
            with torch.inference_mode(built_in is torch.inference_mode), torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.1)
            with refreshed_in():
                assert frozen.refresh()
            with torch.no_grad():
                assert torch.equal(frozen(x), freeze(net)(x))
                torch.testing.assert_close(frozen(x), net(x), rtol=0, atol=1e-4 * net(x).abs().max().item())


def test_buffers_of_a_model_frozen_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm1d(3)).eval()
        frozen = freeze(model)
        frozen(torch.randn(2, 3))
        model[0].running_mean.add_(1)
    assert frozen.refresh()
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(frozen(x), model(x))


class Scaled(nn.Module):
    """A model with its own options: a number, a list and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 2, 3, padding=1)
        self.norm, self.activation = nn.InstanceNorm3d(2), nn.LeakyReLU(0.1)
        self.factor, self.factors, self.last = 2.0, [1, 2], torch.sin

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.convolution(x))) * self.factor * self.factors[1])


CHANGES: dict[str, Any] = {
    "stride": lambda model: setattr(model.convolution, "stride", (2, 2, 2)),
    "padding": lambda model: setattr(model.convolution, "padding", [0, 1, 0]),
    "dilation": lambda model: setattr(model.convolution, "dilation", 2),
    "eps": lambda model: setattr(model.norm, "eps", 0.5),
    "slope": lambda model: setattr(model.activation, "negative_slope", 0.7),
    "activation": lambda model: setattr(model, "activation", nn.Tanh()),
    "number": lambda model: setattr(model, "factor", 3.0),
    "list": lambda model: model.factors.__setitem__(1, 5),
    "function": lambda model: setattr(model, "last", torch.cos),
    "hook": lambda model: model.norm.register_forward_hook(lambda module, args, y: y + 1),
    "forward": lambda model: setattr(model.norm, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refresh_takes_changed_options(name: str) -> None:
    model, x = Scaled().eval(), torch.randn(2, 1, 5, 6, 7)
    frozen = freeze(model)
    before = frozen(x)
    CHANGES[name](model)
    assert torch.equal(frozen(x), before)
    assert not frozen.refresh()
    assert torch.equal(frozen(x), model(x).detach())
    assert frozen.refresh()


def test_training_is_no_option() -> None:
    model = Scaled().eval()
    frozen = freeze(model)
    model.train()
    assert frozen.refresh()
    assert not frozen._copy.training


class Shares(nn.Module):
    """A linear layer whose weight is an embedding's too: a language model's first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.linear.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.linear(self.embedding(index))


def test_an_embedding_that_shares_a_weight_keeps_its_dtype() -> None:
    model, index = Shares().eval(), torch.tensor([[0, 4, 2]])
    frozen = freeze(model, torch.bfloat16)
    assert frozen._copy.embedding.weight is frozen._copy.linear.weight
    assert frozen._copy.embedding(index).dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(index), model(index))


@either_route
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_float64_model_stays_float64(dtype: torch.dtype | None, route: str) -> None:
    """Autocast leaves float64 alone, and so does freezing."""
    net, plain = small_twins(torch.float64)
    x = small_input()
    with taken(route), torch.no_grad():
        frozen = freeze(net, dtype)
        assert {p.dtype for p in frozen._copy.parameters()} == {torch.float64}
        assert_near(frozen(x), plain(x))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("to", "refresh()"), ("cuda", "refresh()"), ("half", "refresh()"), ("eval", "in eval mode"),
        ("train", "in eval mode"), ("training", ".model.training"), ("state_dict", ".model.state_dict"),
        ("parameters", ".model.parameters"), ("load_state_dict", "refresh()"), ("register_forward_hook", ".model."),
    ],
)  # fmt: skip
def test_what_a_module_has_and_a_frozen_model_lacks(name: str, remedy: str) -> None:
    frozen = fastenc.freeze(nn.Linear(2, 3))
    with pytest.raises(AttributeError, match=f"a Frozen is no nn.Module and has no '{name}'.*{re.escape(remedy)}"):
        getattr(frozen, name)
    assert not hasattr(frozen, "nothing_of_this_name")


def test_a_weight_that_a_hook_computes_keeps_its_dtype() -> None:
    layer = nn.utils.spectral_norm(nn.Conv3d(1, 2, 3)).eval()
    x = torch.randn(1, 1, 4, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    assert torch.equal(freeze(layer, torch.bfloat16)(x), expected)


def test_a_train_that_returns_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(x)

        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    assert torch.equal(freeze(Model())(torch.ones(9)), torch.ones(9))
