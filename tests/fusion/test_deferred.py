"""What an accelerated norm hands out in eager mode: exports, what outlives the forward, inference mode, hooks."""

import copy
import ctypes
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import launches_replaced, taken
from support.plain import assert_all_near, assert_near
from support.small_models import Net, assert_like_untouched, fused_calls, small_input, twins
from torch import Tensor, nn

import fastenc

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
