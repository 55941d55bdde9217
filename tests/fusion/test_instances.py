"""accelerate replaces forwards on instances: classes, attributes, copies and memory are as torch has them."""

import copy
import ctypes
import io
import pickle
import subprocess
import sys
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_all_near, assert_near, gradients
from support.small_models import assert_like_untouched, fused_calls, small_input, stack, twins
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastenc
from fastenc.fusion import SUMMARY

T = TypeVar("T")


class Net(nn.Module):
    """A pair in a forward; `look` is called with the norm's output, before the activation."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 1, bias=False), nn.InstanceNorm3d(4, affine=True)
        self.drop, self.act = nn.Dropout(0.0), activation or nn.LeakyReLU(0.1)
        self.look: Callable[[Tensor], Any] = id

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        self.look(z)
        return self.act(z)


class Plain(ABC):  # noqa: B024
    """No metaclass conflict, another layout."""


class Slots:
    __slots__ = ()


class AbcNet(Plain, Net):
    pass


class GenericNet(Generic[T], Net):
    pass


class SlotsNet(Slots, Net):
    pass


class Tagged(Net):
    registry: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        assert cls.__name__ not in cls.registry
        cls.registry[cls.__name__] = cls


class TaggedNet(Tagged, tag="u"):
    pass


@pytest.mark.parametrize("kind", [AbcNet, GenericNet, SlotsNet, TaggedNet])
def test_classes_of_every_layout(kind: type[Net]) -> None:
    net, untouched = twins(kind())
    assert [type(module) for module in net.modules()] == [type(module) for module in untouched.modules()]
    assert net.accelerated.count("fused") == 1
    with taken("fused"):
        with fused_calls() as search:
            net(small_input())
        assert search.call_count == 1
        assert_like_untouched(net, untouched, small_input())
    assert set(vars(fastenc.accelerate(net, undo=True))) == set(vars(untouched))


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.drop(input=self.norm(input=self.conv(input=x))))


def test_calls_by_keyword() -> None:
    net, untouched = twins(ByKeyword())
    with taken("fused"):
        with fused_calls() as search:
            net(x=small_input())
        assert search.call_count == 1
        assert_like_untouched(net, untouched, small_input())
    assert_near(net(x=(x := small_input())), untouched(x).double())


def test_the_search_sees_operands_by_keyword() -> None:
    class Used(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            z = self.norm(input=h)
            h.mul_(2.0)
            return self.act(z) + h

    (norm,) = fastenc.accelerate(Used()).accelerated
    assert norm.detail == "its input is used again before the activation"


def test_an_attribute_called_accelerated() -> None:
    class Scales(Net):
        def __init__(self, accelerated: Any) -> None:
            super().__init__()
            self.accelerated = accelerated

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.accelerated(y) if isinstance(self.accelerated, nn.Module) else self.accelerated * y

    for own in (3.0, nn.Conv3d(4, 4, 1), nn.Parameter(torch.ones(4, 1, 1, 1))):
        net, untouched = twins(Scales(own))
        assert type(net.accelerated) is type(own)
        assert vars(net)[SUMMARY].count("fused") == 1
        assert_like_untouched(net, untouched, small_input())
        fastenc.accelerate(nn.Sequential(net), undo=True)
        assert set(vars(net)) == set(vars(untouched))
        assert_like_untouched(net, untouched, small_input())


def test_undo_of_parametrized_modules() -> None:
    class Absolute(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.abs()

    net, untouched = twins(stack(nn.PReLU(4, -0.2)))
    for model in net, untouched:
        parametrize.register_parametrization(model[2], "weight", Absolute())
        parametrize.register_parametrization(model[1], "weight", Absolute())
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
    fastenc.accelerate(net, undo=True)
    for at in (1, 2):
        parametrize.remove_parametrizations(net[at], "weight")
    assert [type(module) for module in net] == [nn.Conv3d, nn.InstanceNorm3d, nn.PReLU, nn.Conv3d]
    assert all("forward" not in vars(module) for module in net.modules())


def test_a_forward_that_the_user_had_set() -> None:
    """On the model it runs as before; a norm or an activation that has one is left."""
    net, untouched = twins(nn.Sequential(Net()))
    for model in net, untouched:
        model[0].forward = lambda x, net=model[0]: 2 * Net.forward(net, x)
    own = vars(net[0])["forward"]
    fastenc.accelerate(net)
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
    fastenc.accelerate(net, undo=True)
    assert vars(net[0])["forward"] is own
    for part, detail in (("norm", "its forward was replaced"), ("act", "goes to a LeakyReLU whose forward was repl")):
        net, untouched = Net(), Net()
        untouched.load_state_dict(net.state_dict())
        for model in net, untouched:
            module = model.get_submodule(part)
            module.forward = lambda x, module=module: type(module).forward(module, x).square()
        (norm,) = fastenc.accelerate(net).accelerated
        assert detail in norm.detail
        with taken("fused"), torch.no_grad():
            assert_near(net(x), untouched(x).double())


@pytest.mark.parametrize("part", ["norm", "act", ""])
def test_a_forward_that_the_user_wraps_later(part: str) -> None:
    net, untouched = twins(Net())
    for model in net, untouched:
        module = model.get_submodule(part)
        module.forward = lambda x, forward=module.forward: forward(x) + 1
    with taken("fused"), torch.no_grad():
        for _ in range(2):
            assert_near(net(x := small_input()), untouched(x).double())
            fastenc.accelerate(net, undo=True)


def test_a_class_that_the_user_gives_later() -> None:
    class Squared(nn.LeakyReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    class Halved(nn.InstanceNorm3d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    net, untouched = twins(Net())
    for model in net, untouched:
        model.act.__class__ = Squared
    with taken("fused"), torch.no_grad():
        assert_near(net(x := small_input()), untouched(x).double())
        for model in net, untouched:
            model.norm.__class__ = Halved
        assert_near(net(x), untouched(x).double())


def test_all_or_nothing() -> None:
    """An error at any point leaves the model as it was, untouched or accelerated."""
    from fastenc.fusion import modules, search

    x = small_input()
    for net in (Net(), fastenc.accelerate(Net())):
        before = [dict(vars(module)) for module in net.modules()]
        for where, name in ((search, "find"), (modules.Activation, "install"), (modules.FusionScope, "install")):
            with mock.patch.object(where, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                fastenc.accelerate(net)
        assert [dict(vars(module)) for module in net.modules()] == before
        net(x)


# Copies.


def replica(net: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them."""
    twins = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = twins[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return twins[net]


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def shallow(net: nn.Module) -> nn.Module:
    twin = copy.copy(net)
    twin._modules = {name: copy.copy(child) for name, child in net._modules.items()}
    for child in twin.children():
        child._parameters = {n: None if p is None else p.detach().clone() for n, p in child._parameters.items()}
    return twin


@pytest.mark.parametrize(
    "copied", [replica, shallow, copy.deepcopy, saved, lambda net: pickle.loads(pickle.dumps(net))]
)
def test_copies_run_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    """On the copy's parameters, which are not the original's any more; undo of one does not reach the other."""
    net, untouched = twins(stack(nn.PReLU(4), nn.Dropout(0.0)))
    other = copied(net)
    assert type(other) is nn.Sequential
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        x = small_input()
        expected = untouched(x).double()
        with taken("fused"):
            for _ in range(2):
                with fused_calls() as search:
                    assert_near(other(x), expected)
                assert search.call_count == 1
                fastenc.accelerate(net, undo=True)
    assert "forward" not in vars(fastenc.accelerate(other, undo=True)[1])


def test_loads_in_a_new_process(tmp_path: Path) -> None:
    net = fastenc.accelerate(stack(nn.PReLU(4)))
    torch.save(net, tmp_path / "net.pt")
    code = (
        "import torch; net = torch.load('net.pt', weights_only=False); print(net.accelerated.count('fused')); "
        "assert net[1].forward.module is net[1]; net(torch.randn(2, 2, 4, 5, 6))"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


def test_loads_weights_only() -> None:
    """What torch lists as unsafe, allow-listed by name, is enough."""
    net = fastenc.accelerate(stack(nn.PReLU(4), nn.Dropout(0.1)).eval())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    names = [name.rpartition(".") for name in torch.serialization.get_unsafe_globals_in_checkpoint(buffer)]
    buffer.seek(0)
    with torch.serialization.safe_globals([getattr(sys.modules[module], name) for module, _, name in names]):
        other = torch.load(buffer, weights_only=True)
    with taken("fused"), fused_calls() as search, torch.no_grad():
        assert torch.equal(other(x := small_input()), net(x))
    assert search.call_count == 2


# Tools that go by the type of a module.


def test_hooks_by_type() -> None:
    """As DeepLift, thop and ptflops put them: on every module whose type is torch's own."""
    net, untouched = twins(stack(nn.ReLU(), nn.Dropout(0.0)))
    kinds = {nn.Conv3d: 1.0, nn.InstanceNorm3d: 2.0, nn.ReLU: 3.0, nn.Dropout: 4.0}
    results = []
    for model in net, untouched:
        seen: list[Any] = []
        for module in model.modules():
            if type(module) in kinds:
                module.register_forward_hook(
                    lambda module, args, y, seen=seen: seen.append(
                        (type(module), kinds[type(module)] * args[0].numel())
                    )
                )
            if type(module) is nn.ReLU:
                module.register_full_backward_hook(lambda module, dx, dy: (0.5 * dy[0],))
        x = torch.linspace(-1, 1, 240).view(2, 2, 3, 4, 5)
        with taken("fused"):
            results.append((gradients(model, x), seen))
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) == 5
    assert_all_near(results[0][0], [gradient.double() for gradient in results[1][0]])


# What a norm's output gives away.

EXPORTS: dict[str, Callable[[Tensor], Any]] = {
    "from_dlpack": lambda z: torch.from_dlpack(z).clone(),
    "numpy": lambda z: torch.from_numpy(z.numpy().copy()),
    "numpy, forced": lambda z: torch.from_numpy(z.numpy(force=True).copy()),
    "array": lambda z: torch.from_numpy(np.array(z)),
    "asarray of float64": lambda z: torch.from_numpy(np.asarray(z, dtype=np.float64)).float(),
    "numpy's from_dlpack": lambda z: torch.from_numpy(np.from_dlpack(z).copy()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "items": lambda z: torch.tensor([each.item() for each in z.flatten()]).view(z.shape),
    "storage": lambda z: torch.tensor(z.storage().tolist()).as_strided(z.shape, z.stride()),
    "untyped_storage": lambda z: torch.empty(0).set_(z.untyped_storage(), 0, z.shape, z.stride()).clone(),
    "data_ptr": lambda z: torch.frombuffer(
        ctypes.string_at(z.data_ptr(), 4 * z.numel()), dtype=torch.float32
    ).as_strided(z.shape, z.stride()).clone(),
    "share_memory_": lambda z: z.share_memory_().clone() if not z.is_shared() else None,
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "data": lambda z: z.data.clone(),
    "detach": lambda z: z.detach().clone(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", EXPORTS)
def test_exports(export: str) -> None:
    net, untouched = twins(Net())
    found: list[Tensor] = []
    for model in net, untouched:
        model.look = lambda z: found.append(EXPORTS[export](z))
    with taken("fused"), torch.no_grad():
        y = net(x := small_input())
        assert_near(y, untouched(x).double())
    assert_near(found[0], found[1].double())


def test_exports_that_require_a_gradient() -> None:
    """torch's own errors."""
    net, untouched = twins(Net())
    for export in ("numpy", "from_dlpack"):
        errors = []
        for model in net, untouched:
            model.look = EXPORTS[export]
            with taken("fused"), pytest.raises((RuntimeError, BufferError)) as error:
                model(small_input())
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_an_address_asked_for_in_c() -> None:
    """An error, where a null pointer would end the process."""
    net, _ = twins(Net())
    net.look = torch.utils.dlpack.to_dlpack
    with taken("fused"), torch.no_grad(), pytest.raises(RuntimeError, match="Cannot access data pointer"):
        net(small_input())


# What outlives the forward.


class Keeper:
    """Nothing that pytree knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Keeps(Net):
    """Keeps the norm's output in many ways."""

    how = "attribute"

    def forward(self, x: Tensor) -> Any:
        z = self.norm(self.conv(x))
        y = self.act(z)
        if self.how == "leaves":
            return y, Keeper(z)
        kept = {"attribute": z, "list": [z], "dict": {"z": z}, "closure": lambda: z}[self.how]
        self.kept = kept
        return y

    def feature(self, result: Any) -> Tensor:
        if self.how == "leaves":
            return result[1].value
        kept: Any = self.kept
        return {"attribute": lambda: kept, "list": lambda: kept[0], "dict": lambda: kept["z"], "closure": kept}[
            self.how
        ]()


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU(inplace=True), nn.PReLU(4)], ids=str)
@pytest.mark.parametrize("how", ["attribute", "list", "dict", "closure", "leaves"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_norms_output_that_outlives_the_forward(wrapped: bool, how: str, activation: nn.Module) -> None:
    """Read after a step of the optimizer; and a loss of it, whose gradient takes the way that torch's takes."""
    net, untouched = twins(nn.Sequential(Keeps(activation)) if wrapped else Keeps(activation))
    given = small_input()
    features, grads = [], []
    for model, x in ((net, given), (untouched.double(), given.double())):
        keeps: Any = model[0] if wrapped else model
        keeps.how = how
        with taken("fused"):
            result = model(x)
            feature = keeps.feature(result)
            feature.sin().sum().backward()
            grads.append([p.grad for p in (keeps.conv.weight, keeps.norm.weight, keeps.norm.bias)])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            features.append((feature * 1).detach())
            assert feature.requires_grad
            assert torch.equal(feature.detach(), torch.from_numpy(feature.detach().numpy()))
    assert_near(features[0], features[1].double())
    assert_all_near(grads[0], [gradient.double() for gradient in grads[1]])


@pytest.mark.parametrize("gradient", [True, False])
def test_a_norms_output_kept_before_an_addition_in_place(gradient: bool) -> None:
    class Adds(Keeps):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            z = self.kept = self.norm(h)
            z += h
            return self.act(z)

    net, untouched = twins(Adds(nn.LeakyReLU(0.1, inplace=True)))
    with taken("fused"), torch.set_grad_enabled(gradient):
        x = small_input()
        assert_near(net(x), untouched(x).double())
        net.norm.weight.data.zero_()
        assert_near(net.kept * 1, untouched.kept.double())


def test_nothing_is_computed_that_is_not_kept() -> None:
    net, _ = twins(nn.Sequential(Net(), Net(nn.ReLU(inplace=True))).append(nn.Identity()))
    net[1].conv = nn.Conv3d(4, 4, 1)
    for gradient in (True, False):
        with taken("fused"), torch.set_grad_enabled(gradient), fused_calls() as search:
            net(small_input())
        assert search.call_count == 2


# Inference mode.


class Writes(nn.Module):
    """Changes something in place between norm and activation, once `what` is set."""

    what = ""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv3d(4, 4, 1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.what == "given" else self.conv(x)
        z = self.norm(h)
        if self.what in ("input", "given"):
            h += 1
        elif self.what == "part":
            h[:, 1:].zero_()
        elif self.what == "weight":
            self.norm.weight.mul_(2)
        elif self.what == "buffer":
            self.seen += 1
        elif self.what == "residual":
            r = h + 0
            z = z + r
            r.zero_()
        return self.act(z) + h


@pytest.mark.parametrize("what", ["", "input", "given", "part", "weight", "buffer", "residual"])
@pytest.mark.parametrize("part", [True, False])
@pytest.mark.parametrize("made", ["outside", "inside"])
def test_changes_in_place_in_inference_mode(what: str, part: bool, made: str) -> None:
    """The untouched model's numbers, or the error of no_grad; also where the model's tensors were made in the mode."""
    with torch.inference_mode(made == "inside"):
        net, untouched = twins(nn.Sequential(Writes()).eval())
        if made == "inside":
            for model in net, untouched:
                model._apply(torch.clone)
    net[0].what = untouched[0].what = what
    run, expected = (net[0], untouched[0]) if part else (net, untouched)
    with taken("fused"), torch.inference_mode():
        for x in (torch.randn(2, 4, 3, 4, 5), torch.randn(2, 4, 3, 4, 5).to(memory_format=torch.channels_last_3d)):
            truth = expected(x.clone())
            try:
                assert_near(run(x.clone()), truth.double())
            except RuntimeError as error:
                assert "in place" in str(error)  # noqa: PT017
                assert what not in ("", "buffer") or made == "inside"
                assert_near(run(x.clone()), expected(x.clone()).double()) if "next calls" in str(error) else None


def test_pairs_fuse_in_inference_mode() -> None:
    net, untouched = twins(nn.Sequential(Net()).eval())
    for model, expected in ((net, untouched), (net[0], untouched[0])):
        with taken("fused"), torch.inference_mode():
            with fused_calls() as search:
                y = model(x := small_input())
            assert search.call_count == 1
            assert_near(y, expected(x).double())
            assert torch.is_inference_mode_enabled()


# Modules between norm and scope.


class Outside(nn.Module):
    """A block that ends in a norm, and one that begins with the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True))
        self.rest = nn.Sequential(nn.LeakyReLU(0.1), nn.Conv3d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.block(x))


@pytest.mark.parametrize("part", ["block", "rest", "", None])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_on_modules_between(part: str | None, before: bool) -> None:
    """A hook that frees the weight, as FSDP2 has it; outside of the scope it is no obstacle."""
    net, untouched = twins(nn.Sequential(Outside()))
    seen: list[Any] = []
    if before:
        fastenc.accelerate(net, undo=True)
    if part is not None:
        net[0].get_submodule(part).register_forward_hook(lambda module, args, y: seen.append((type(args[0]), type(y))))
    if before:
        fastenc.accelerate(net)
    with taken("fused"):
        assert_like_untouched(net, untouched, small_input())
        if part in ("", None):
            with fused_calls() as search:
                net(small_input())
            assert search.call_count == 1
    assert set(seen) <= {(Tensor, Tensor)}


def test_a_freed_weight_is_an_error() -> None:
    net, _ = twins(Net())
    storage = net.norm.weight.untyped_storage()
    net.look = lambda z: storage.resize_(0)
    with taken("fused"), torch.no_grad(), pytest.raises(RuntimeError, match="was freed before its output was used"):
        net(small_input())


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp2(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for order in ("accelerate, shard", "shard, accelerate", "shard, accelerate, undo"):
        net = Outside()
        untouched = copy.deepcopy(net)
        for step in order.split(", "):
            if step == "shard":
                for module in (net.block, net):
                    fully_shard(module, mesh=mesh)
            else:
                fastenc.accelerate(net, undo=step == "undo")
        x = small_input()
        with launches_replaced():
            found = net(x)
            found.square().sum().backward()
        expected = untouched(x)
        expected.square().sum().backward()
        grads = [parameter.grad.full_tensor() for parameter in net.parameters()]
        assert_all_near([found, *grads], [expected.double(), *(p.grad.double() for p in untouched.parameters())])
        assert ("forward" in vars(net)) == ("undo" not in order)
        fastenc.accelerate(net, undo=True)
        assert type(net).__name__ == "FSDPOutside"
