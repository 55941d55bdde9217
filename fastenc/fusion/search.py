"""The search for the norms of a network that lead to an activation. It reads a trace of the forward, and no names.

The result decides where a norm waits for its activation, and what the summary says. It cannot make a result wrong: a
norm whose activation does not come gives its own output (`deferred.py`). Under torch.compile and torch.export nothing
counts changes in place, so there a norm waits only if every call of it was seen to lead to an activation, nothing is
changed in place in between, and nothing keeps its output (`pending.py`).
"""

from __future__ import annotations

import functools
import inspect
import operator
import random
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import route
from .._torch import tree_map
from ..pair import ACTIVATIONS, DROPOUTS, FUNCTIONS, INSTANCE_NORMS, UNTRACEABLE
from .convolutions import CONVOLUTIONS
from .modules import Forward, forward_of

WORDS = {operator.add: "an addition", operator.iadd: "an addition in place"}
_IN_PLACE = frozenset(getattr(operator, name) for name in dir(operator) if name.startswith("i"))
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """The way of a norm's output to an activation, or of a convolution's output to a norm that cancels its bias.

    end: a module or the name of a function. between: the modules on the way. calls: how both ends were called.
    """

    start: nn.Module
    between: tuple[nn.Module, ...]
    end: Any
    calls: tuple[tuple[_Call, ...], tuple[_Call, ...]]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules on the way, with both ends."""
        return [module for module in (self.start, *self.between, self.end) if isinstance(module, nn.Module)]

    def scope(self, scopes: Container[nn.Module] | None = None) -> tuple[nn.Module, list[nn.Module]]:
        """The innermost module, of scopes, whose forward makes both calls, and the modules inside it that make them."""
        first, second = self.calls
        shared = [a.module for a, b in zip(first, second, strict=False) if a is b]
        scope = next((module for module in reversed(shared) if scopes is None or module in scopes), shared[0])
        depth = shared.index(scope) + 1
        return scope, [call.module for chain in self.calls for call in chain[depth:]]


@dataclass
class Found:
    """The result of a search.

    ways: of norms to their activations. why: the reasons against a pair at some call of a norm. boxes: the module that
    calls a norm and could not be traced. cancelled: the ways of convolutions with a bias to the norms that cancel it.
    kept: the convolutions whose output has another use. unproven: the norms and convolutions that may do otherwise than
    their ways say.
    """

    ways: list[Way] = field(default_factory=list)
    why: dict[nn.Module, list[str]] = field(default_factory=dict)
    boxes: dict[nn.Module, nn.Module] = field(default_factory=dict)
    cancelled: list[Way] = field(default_factory=list)
    kept: set[nn.Module] = field(default_factory=set)
    unproven: set[nn.Module] = field(default_factory=set)


def find(model: nn.Module, norms: set[nn.Module]) -> Found:
    """Follow the output of each of `norms`, in training and in evaluation, through model's forward.

    A module whose forward cannot be traced is a black box to its parents. Its children are then searched one by one,
    and the norms that it may call itself are taken to meet any of the activations that it may call.
    """
    found = Found()
    registered = set(model.modules())
    searched: set[nn.Module] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if module in searched or not norms.intersection(module.modules()):
            continue
        searched.add(module)
        for training in (True, False):
            tracer = _Tracer()
            graph = tracer.graph_of(module, training)
            if graph is not None:
                end = "its output is the model's"
                if module is not model:
                    end = f"its output leaves a {type(module).__name__}, and what calls that cannot be traced"
                _read(graph, norms, registered, end, tracer.kept(), found)
            for box in tracer.boxes:
                _guess(box, norms, found)
                pending.extend(box.children())
    found.unproven.update(found.why, found.boxes)
    return found


def _read(
    graph: fx.Graph, norms: set[nn.Module], registered: set[nn.Module], end: str, kept: set[fx.Node], found: Found
) -> None:
    """Add to found. end: what it means to reach the graph's end. kept: the nodes whose output outlives the graph."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        convolution = node.meta.get("module")
        if type(convolution) not in CONVOLUTIONS or convolution.bias is None:
            continue
        steps = _to_norm(node, norms, registered)
        if steps is None or not kept.isdisjoint((node, *steps[:-1])) or convolution not in registered:
            found.kept.add(convolution)
            continue
        *passed, norm = (step.meta["module"] for step in steps)
        calls = node.meta["callers"], steps[-1].meta["callers"]
        found.cancelled.append(Way(convolution, tuple(passed), norm, calls))
        if any(map(_may_change, nodes[order[node] + 1 : order[steps[-1]]])):
            found.unproven.add(convolution)
    for node in nodes:
        norm = node.meta.get("module")
        if norm not in norms:
            continue
        way = _follow(node, order, registered, end)
        if isinstance(way, str):
            found.why.setdefault(norm, []).append(way)
        else:
            between = tuple(step.meta["module"] for step in way[:-1] if "module" in step.meta)
            activation = way[-1].meta.get("module") or _called(way[-1])
            found.ways.append(Way(norm, between, activation, (node.meta["callers"], way[-1].meta["callers"])))
            meanwhile = nodes[order[node] + 1 : order[way[-1]]]
            changes = any(_may_change(between) for between in meanwhile if between not in way)
            if changes or not kept.isdisjoint((node, *way[:-1])) or way[-1].target in UNTRACEABLE:
                found.unproven.add(norm)


def _to_norm(node: fx.Node, norms: set[nn.Module], registered: set[nn.Module]) -> list[fx.Node] | None:
    """The calls that the output of node, a convolution, goes through up to a norm. None if it has another use."""
    steps: list[fx.Node] = []
    while not steps or steps[-1].meta["module"] not in norms:
        users = [user for user in (steps or [node])[-1].users if not _only_asks(user)]
        if len(users) != 1:
            return None
        module = users[0].meta.get("module")
        passes = type(module) in (*DROPOUTS, nn.Identity) and module in registered and not own_forward(module)
        if module not in norms and not passes:
            return None
        steps += users
    return steps


def _guess(box: nn.Module, norms: set[nn.Module], found: Found) -> None:
    """Pair the norms and activations that box may call itself."""
    children, call = list(box.children()), _Call(box)
    for norm in norms.intersection(children):
        for activation in children:
            if type(activation) in ACTIVATIONS and not own_forward(activation):
                found.ways.append(Way(norm, tuple(children), activation, ((call,), (call,))))
                found.boxes[norm] = box


def _follow(node: fx.Node, order: dict[fx.Node, int], registered: set[nn.Module], end: str) -> list[fx.Node] | str:
    """The calls that node's output goes through up to its activation, or the reason why it does not get there."""
    way = _way(node, registered, end)
    if isinstance(way, str):
        return way
    for step in (node, *(step for step in way if step.target in WORDS)):
        for operand in step.all_input_nodes:
            if any(order[step] < order[u] < order[way[-1]] for u in operand.users):
                what = "its input" if step is node else "what it is added to"
                return f"{what} is used again before the activation"
    return way


def _way(node: fx.Node, registered: set[nn.Module], end: str) -> list[fx.Node] | str:
    """As `_follow`, without a check of the operands. One addition of a residual may be on the way."""
    way: list[fx.Node] = []
    here = node
    while here is node or not _activates(here):
        users = [user for user in here.users if not _only_asks(user)]
        if not users:
            return "its output is not used"
        if len(users) > 1:
            return f"its output is used {len(users)} times: {', '.join(map(_called, users))}"
        last, (here,) = here, users
        module = here.meta.get("module")
        if here.op == "output":
            return end
        if _adds(here, last) and node.target not in WORDS and not _has_dropout(way):
            rest = _way(here, registered, end)
            if isinstance(rest, list) and not _has_dropout(rest):
                return [*way, here, *rest]
        if _activates(here) and module is None and here.args and here.args[0] is last:
            return [*way, here]
        if type(module) not in (*ACTIVATIONS, *DROPOUTS, nn.Identity):
            return f"its output goes to {_called(here)}, not to PReLU, LeakyReLU or ReLU"
        if module not in registered:
            return f"its output goes to a {_called(here)} that is not registered in the model"
        if own_forward(module):
            return f"its output goes to a {_called(here)} whose forward was replaced"
        way.append(here)
    return way


def _activates(node: fx.Node) -> bool:
    """Whether node is a PReLU, LeakyReLU or ReLU, module or function."""
    if node.op == "call_method":
        return node.target in ("relu", "relu_", "prelu")
    return node.target in FUNCTIONS if node.op == "call_function" else type(node.meta.get("module")) in ACTIVATIONS


def own_forward(module: Any) -> bool:
    """Whether code other than accelerate replaced the forward of module."""
    return "forward" in vars(module) and not isinstance(vars(module)["forward"], route.Accelerated)


def _adds(node: fx.Node, z: fx.Node) -> bool:
    """Whether node adds a tensor to z, which is the one that waits where two norms meet."""
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    if node.target not in WORDS or len(operands) != 2:
        return False
    first, other = operands
    return first is z or (
        other is z and node.target is operator.add and type(first.meta.get("module")) not in INSTANCE_NORMS
    )


def _has_dropout(way: list[fx.Node]) -> bool:
    return any(type(step.meta.get("module")) in DROPOUTS for step in way)


def _may_change(node: fx.Node) -> bool:
    """Whether node may change a tensor in place."""
    module = node.meta.get("module")
    if module is not None:
        return bool(getattr(module, "inplace", False)) or not type(module).__module__.startswith("torch.nn.")
    name = _called(node)
    return (
        (name.endswith("_") and not name.endswith("__")) or name == "setitem" or node.target in _IN_PLACE
        or any(value is True for value in node.args) or bool({"out", "inplace"}.intersection(node.kwargs))
    )  # fmt: skip


def _only_asks(node: fx.Node) -> bool:
    """Whether node asks for a property that a tensor has before it is computed."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _called(node: fx.Node) -> str:
    """The name of the function or module that node calls."""
    module = node.meta.get("module")
    if module is not None:
        return type(module).__name__
    target: Any = node.target
    return WORDS.get(target) or str(getattr(target, "__name__", target))


class _Call:
    """One call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class _Proxy(fx.Proxy):
    """Distinguishes x += r from x = x + r."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces a forward. A module that cannot be traced is a black box. Nodes know their module and its callers."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[nn.Module] = []
        self.originals: dict[nn.Module, nn.Module] = {}
        self.callers: list[_Call] = []
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def graph_of(self, module: nn.Module, training: bool) -> fx.Graph | None:
        """The graph of module's forward. None if it cannot be traced."""
        self.callers = [_Call(module)]
        with warnings.catch_warnings(), _same_random_numbers_after():
            warnings.simplefilter("ignore")
            try:
                twin = self._twin(module, training, {})
                return self.trace(twin, _defaults(twin.forward))
            except Exception:
                self.boxes.append(module)
                return None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        module = self.originals.get(m, m)
        if self.is_leaf_module(m, "") or isinstance(m, torch.jit.ScriptModule):
            return self._leaf(module, args, kwargs)
        last = self.graph._root._prev
        self.callers.append(_Call(module))
        try:
            return forward(*args, **kwargs)
        except Exception:
            while self.graph._root._prev is not last:  # the newest node first
                self.graph.erase_node(self.graph._root._prev)
            self.boxes.append(module)
            return self._leaf(module, args, kwargs)
        finally:
            self.callers.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["callers"] = tuple(self.callers)
        return node

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any) -> fx.Proxy:
        proxy = self.create_proxy("call_module", type(module).__name__, args, kwargs)
        proxy.node.meta["module"] = module
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def kept(self) -> set[fx.Node]:
        """The nodes whose output an attribute, a list or a closure still holds after the trace."""
        return {proxy.node for each in self.proxies if (proxy := each()) is not None}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val

    def _twin(self, module: nn.Module, training: bool, twins: dict[nn.Module, nn.Module]) -> nn.Module:
        """A copy without hooks that shares the Parameters, but nothing that a forward may change."""
        if module in twins or isinstance(module, torch.jit.ScriptModule):
            return twins.get(module, module)
        twin = twins[module] = object.__new__(type(module))
        self.originals[twin] = module
        forward = forward_of(module)
        own = {name: value for name, value in vars(module).items() if forward is None or name not in forward.ATTRIBUTES}
        if isinstance(own.get("forward"), Forward):
            own = {**own, **own.pop("forward").before}
        copied = tree_map(_copied, own)
        vars(twin).update(copied, training=training, **{hooks: OrderedDict() for hooks in HOOKS})
        twin._modules = {
            name: None if child is None else self._twin(child, training, twins)
            for name, child in module._modules.items()
        }
        if "forward" not in own:
            vars(twin)["forward"] = self._counted(twin, twin.forward)
        return twin

    def _counted(self, twin: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """twin's forward. `module.forward(x)`, which skips `__call__`, is traced as a call of the module too."""

        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.callers[-1].module is self.originals[twin]:
                return forward(*args, **kwargs)
            return self.call_module(twin, forward, args, kwargs)

        return called


def _copied(value: Any) -> Any:
    """The twin's copy of value, an attribute or an entry of its lists, dicts and tuples."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return value.copy() if type(value) is set else value


@contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    """Restore the random generators after the block, so that tracing a forward changes no later numbers."""
    state = random.getstate()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        yield
    random.setstate(state)


def _defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a caller may leave out, with their defaults."""
    parameters: Iterable[inspect.Parameter] = inspect.signature(forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
