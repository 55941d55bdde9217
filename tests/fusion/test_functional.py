"""Activations that a forward calls as functions or methods: they complete a norm as modules do."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.backends import eager_norms, taken
from support.plain import assert_near
from support.small_models import assert_like_untouched, small_input, twins
from test_custom_ops import Compiled, fused_nodes
from torch import Tensor, nn
from torch.nn import functional as F

from fastenc.fusion import deferred


class Calls(nn.Module):
    """A norm, and an activation that the forward calls by `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)
        self.slope = nn.Parameter(torch.full((4,), 0.2)) if "prelu" in name else None
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        if self.name.startswith("z + r, "):
            z = z + self.conv(x)
        return CALLS[self.name](self, z)


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.leaky_relu": lambda net, z: F.leaky_relu(z), "F.leaky_relu(0.3)": lambda net, z: F.leaky_relu(z, 0.3),
    "F.leaky_relu, in place": lambda net, z: F.leaky_relu(z, negative_slope=0.3, inplace=True) + z.mean(),
    "F.leaky_relu_": lambda net, z: F.leaky_relu_(z, 0.3), "F.relu": lambda net, z: F.relu(z),
    "F.relu, in place": lambda net, z: F.relu(z, True), "F.relu(input=)": lambda net, z: F.relu(input=z),
    "torch.relu": lambda net, z: torch.relu(z), "torch.relu_": lambda net, z: torch.relu_(z),
    "relu": lambda net, z: z.relu(), "relu_": lambda net, z: z.relu_(),
    "F.prelu": lambda net, z: F.prelu(z, net.slope), "F.prelu(weight=)": lambda net, z: F.prelu(z, weight=net.slope),
    "torch.prelu": lambda net, z: torch.prelu(z, net.slope), "prelu": lambda net, z: z.prelu(net.slope),
    "relu_, read": lambda net, z: z.relu_() + z.mean(),
    "z + r, F.relu": lambda net, z: F.relu(z), "z + r, relu_": lambda net, z: z.relu_(),
}  # fmt: skip
UNTRACEABLE = {"F.leaky_relu_", "torch.relu_"}  # torch.compile takes them of tensors alone
UNFUSED = {"F.leaky_relu, in place", "relu_, read"}


@pytest.mark.parametrize("name", CALLS)
def test_fuses(name: str) -> None:
    net, untouched = twins(Calls(name))
    (norm,) = net.accelerated
    assert (norm.outcome == "fused") == (name not in UNFUSED)
    x = small_input()
    with taken("fused"):
        assert_like_untouched(net, untouched, x)
        if name in UNFUSED:
            return
        assert "(a function)" in norm.detail
        with mock.patch.object(deferred, "fused", wraps=deferred.fused) as pairs, eager_norms() as norms:
            net(x)
        assert (pairs.call_count, norms.call_count) == (1, 0)
        compiled = Compiled(net)
        assert_like_untouched(compiled, untouched, x)  # type: ignore[arg-type]
        count = 0 if name in UNTRACEABLE else 1
        assert compiled.graphs == [count, count]
        assert fused_nodes(torch.export.export(net, (x,)).graph) == count


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [*sorted(UNFUSED), "F.relu"])
def test_another_call_than_the_search_saw(name: str, compiled: bool) -> None:
    """In place the norm's output is what the activation made of it; a slope of another length is torch's own error."""
    net, untouched = twins(Calls("F.relu"))
    for model in net, untouched:
        model.name = name
    x = small_input()
    with taken("fused"):
        run = Compiled(net) if compiled else net
        if name in UNFUSED and not compiled:
            with pytest.raises(RuntimeError, match="after its in-place activation"):
                run(x)
            with torch.no_grad():
                assert_near(run(x), untouched(x).double())
            return
        assert_near(run(x), untouched(x).double())
        for model in net, untouched:
            model.name, model.slope = "F.prelu", nn.Parameter(torch.zeros(3))
        for model in Compiled(net) if compiled else net, untouched:
            with pytest.raises(Exception, match="channel size"):
                model(x)


def test_unfused_when_hooked_or_read_before() -> None:
    net, untouched = twins(Calls("F.relu"))
    x = small_input()
    with taken("fused"):
        for model in net, untouched:
            model.norm.register_forward_hook(lambda module, args, z: 2 * z)
        assert_like_untouched(net, untouched, x)
        assert_near(Compiled(net)(x), untouched(x).double())
