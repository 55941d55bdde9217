"""The decision which route a call takes, "triton" or "eager", with the reason for eager.

Under "auto", the default, the decision is silent. `fastenc.explain` and the logger "fastenc" at level DEBUG tell the
reason. Under "triton" a call that cannot take that route raises RuntimeError with the reason.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from subprocess import CalledProcessError
from typing import Any, Literal, TypeVar, get_args
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Module, Parameter

from ._torch import (
    constant_in_graphs,
    context_decorator,
    dispatch_modes,
    forward_ad,
    has_global_hook,
    is_legacy_batchedtensor,
    transforms_active,
)

Backend = Literal["auto", "triton", "eager"]
Function = TypeVar("Function", bound=Callable[..., Any])

BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
OLDEST_ARCHITECTURE = (8, 0)  # the first with bfloat16, and the oldest for which the tests compile the kernels

TRANSFORM = "a torch.func transform (grad, vmap, jvp, …) is active"
FORWARD_MODE = "forward-mode differentiation is active"
NO_TRITON = "triton is not installed"

logger = logging.getLogger("fastenc")


def _checked(name: Any, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_faults: dict[torch.device, str] = {}
_warned: set[str] = set()
_lock = threading.Lock()

# The backend of the process is the one set last. A setting can be taken back while the object that made it lives.
_default = _checked(os.environ.get("FASTENC_BACKEND") or "auto", "environment variable FASTENC_BACKEND")
_settings: list[tuple[Backend, Callable[[], object]]] = [(_default, lambda: None)]
# The blocks of each thread, innermost last. No subclass of threading.local: torch.compile would not guard on one.
_thread = threading.local()
_thread.names = ()
# The backend of the innermost block of each thread; the block entered last is the last entry. The threads in which
# torch runs a backward use it. Python did not start those, and torch's thread-local objects can abort at exit.
_entered: dict[int, Backend] = {}


class Block:
    """The backend `name` inside a `with` block, for its thread and for the backwards called in it."""

    def __init__(self, name: Backend) -> None:
        self.name = name

    def __enter__(self) -> None:
        _put((*_names(), self.name))

    def __exit__(self, *exception: object) -> None:
        _put(_names()[:-1])


class backend(Block):
    """Choose the route of the calls that follow: "auto", "triton" or "eager".

    A call sets the backend of the process for all threads. Inside a block it sets the backend until the block ends.
    Used as a context manager or a decorator, it applies to that block, or to each call of that function, only::

        fastenc.backend("eager")            # from here on
        with fastenc.backend("triton"): ... # in this block
        @fastenc.backend("eager")           # in each call of this function
        def evaluate(net, x): ...

    A block applies to the thread that runs it. Other threads, for example those of nn.DataParallel, use the backend of
    the process. The threads in which torch runs a backward use the block that was entered last and is still active. One
    object may be entered any number of times, also nested and by several threads.

    Args:
        name: "auto" takes the Triton route if possible, "triton" raises if that is impossible, "eager" never takes it.

    Raises:
        ValueError: any other name.
        TypeError: a class or an async function is decorated. Decorate its methods, or enter a block inside it.
    """

    def __init__(self, name: Backend) -> None:
        global _default
        super().__init__(_checked(name, "backend"))
        self._before: Backend | None = None
        self._names = _names()
        if self._names:
            self._before, self._names = self._names[-1], (*self._names[:-1], self.name)
            _put(self._names)
        elif is_compiling():  # torch.compile can trace an assignment, but neither a lock nor a weak reference
            self._before, _default = _default, self.name
        else:
            with _lock:
                gone = max(i for i, (_, setter) in enumerate(_settings) if setter() is None)
                _settings[:] = [*_settings[gone:], (self.name, ref(self))]
                _default = self.name

    def __enter__(self) -> None:
        self._take_back()
        super().__enter__()

    def __call__(self, function: Function) -> Function:
        """Decorate `function`, a generator function included."""
        self._take_back()
        if inspect.isclass(function) or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"backend decorates functions and methods that are not async, got {function!r}")
        return context_decorator(partial(Block, self.name), function)

    def _take_back(self) -> None:
        """Undo what the call of `backend` set, the first time."""
        global _default
        if self._before is not None:
            if not self._names:
                _default = self._before
            elif _names() is self._names:
                _put((*self._names[:-1], self._before))
            self._before = None
        elif not is_compiling():
            with _lock:
                _settings[:] = [setting for setting in _settings if setting[1]() is not self]
                _default = _settings[-1][0]


def _names() -> tuple[Backend, ...]:
    """The blocks of this thread, innermost last."""
    return getattr(_thread, "names", ())


def _put(names: tuple[Backend, ...]) -> None:
    """Make `names` the blocks of this thread."""
    _thread.names = names
    if not is_compiling():
        with _lock:
            _entered.pop(threading.get_ident(), None)
            if names:
                _entered[threading.get_ident()] = names[-1]


def chosen() -> Backend:
    """The backend in force in this thread: "auto", "triton" or "eager"."""
    names = getattr(_thread, "names", None)
    if names:
        return names[-1]
    if is_dynamo_compiling() or _entered:  # in this order, so that no compiled code depends on the second
        return _inherited() or _default
    return _default


@constant_in_graphs
def _inherited() -> Backend | None:
    """The backend of the block entered last, if torch made this thread, which then runs a backward."""
    if isinstance(threading.current_thread(), threading._DummyThread):
        with _lock:
            return next(reversed(_entered.values()), None)
    return None


def use_eager(reason: str | None) -> bool:
    """Whether to take the eager route: True if there is a reason.

    Raises:
        RuntimeError: there is a reason and the backend is "triton".
    """
    if reason is None:
        return False
    if chosen() == "triton":
        raise RuntimeError(f'backend "triton" was asked for, but {reason}')
    if not is_compiling():
        logger.debug("eager route: %s", reason)
    return True


def tracing_reason(x: object) -> str | None:
    """Why a tracer, transform or dispatch mode must see plain PyTorch operations at this moment, or None."""
    if is_compiling():
        why = _traced_reason()
        if why is not None:
            return why
        # torch.export without Dynamo runs this code on fake tensors, which are a subclass.
        if is_dynamo_compiling() and type(x) is not Tensor and type(x) is not Parameter:
            return f"x is a {type(x).__name__}, not a plain torch.Tensor"
    elif type(x) is not Tensor and type(x) is not Parameter:
        return f"x is a {type(x).__name__}, not a plain torch.Tensor"
    elif torch.jit.is_tracing():
        return "torch.jit or the ONNX exporter is tracing"
    elif transforms_active():
        return TRANSFORM
    elif forward_ad._current_level >= 0:
        return FORWARD_MODE
    elif dispatch_modes():
        return "a TorchDispatchMode is active, which sees aten operations only"
    return None


def reason(x: Any) -> str | None:
    """Why an operation on x takes the eager route. None if it takes the Triton route.

    It depends on x and on what PyTorch is doing at this moment. It raises nothing.
    """
    if chosen() == "eager":
        return 'backend "eager" was asked for'
    found = tracing_reason(x)
    if found is not None:
        return found
    if x.dtype not in DTYPES:
        return f"x is {str(x.dtype).removeprefix('torch.')}; the kernels compute in float32, bfloat16 and float16"
    return device_reason(x)


@constant_in_graphs
def _traced_reason() -> str | None:
    """Why torch.compile or torch.export must trace plain PyTorch operations, or None."""
    if torch.onnx.is_in_onnx_export():
        return "the ONNX exporter is tracing"
    if transforms_active():
        return TRANSFORM
    return FORWARD_MODE if forward_ad._current_level >= 0 else None


def transformed(dy: Tensor) -> bool:
    """Whether dy is batched (`is_grads_batched`, torch.vmap) or has a tangent."""
    return transforms_active() or forward_ad._current_level >= 0 or is_legacy_batchedtensor(dy)


def device_reason(x: Tensor) -> str | None:
    """Why the kernels cannot run on x's device."""
    if x.is_cuda:
        return _cuda_reason(x.get_device())
    if not x.is_cpu:
        return f"x is on {x.device}; the kernels run on CUDA"
    if chosen() == "auto":
        return "x is on the CPU; the kernels run on CUDA"
    return _interpreter_reason()


class Accelerated:
    """The base class of the forwards that `accelerate` sets on modules. They compute what the modules' own compute."""


def hook_reason(*modules: Module) -> str | None:
    """Why `modules` must be called one by one: a hook, a replaced forward or Module.compile(). None if nothing is."""
    if has_global_hook():
        return "a global module hook is registered"
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"a hook is registered on {type(module).__name__}"
        if "forward" in own and not isinstance(own["forward"], Accelerated):
            return f"the forward of {type(module).__name__} was replaced"
        if own.get("_compiled_call_impl") is not None:
            return f"{type(module).__name__} was compiled by itself"
    return None


@constant_in_graphs
def _cuda_reason(index: int) -> str | None:
    """Why GPU number `index` cannot run the kernels."""
    return _lacking(index) or (fault(torch.device("cuda", index)) if _faults else None)


@lru_cache(maxsize=64)
def _lacking(index: int) -> str | None:
    """What GPU number `index` or this process lacks to run the kernels. Determined once."""
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, on which the kernels have not been run yet"
    architecture = torch.cuda.get_device_capability(index)
    if architecture < OLDEST_ARCHITECTURE:
        found, needed = ("sm_{}{}".format(*pair) for pair in (architecture, OLDEST_ARCHITECTURE))
        return f"GPU {index} is {found}; the kernels need {needed} or newer"
    if not has_triton():
        if chosen() == "auto":
            _warn_once(NO_TRITON, "fastenc takes the eager route", "install triton (on Linux: pip install triton)")
        return NO_TRITON
    return None


@constant_in_graphs
def _interpreter_reason() -> str | None:
    if not has_triton():
        return NO_TRITON
    try:
        from triton import knobs
    except Exception as error:
        return f"triton is installed but cannot be imported ({_cause(error)})"
    if knobs.runtime.interpret:
        return None
    return "x is on the CPU and the kernels are not interpreted (set TRITON_INTERPRET=1 before starting Python)"


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None: import blocked
        return False


def fault(device: torch.device) -> str | None:
    """Why an earlier launch on `device` failed. None under "triton", where every call tries and raises."""
    return None if chosen() == "triton" else _faults.get(device)


def fall_back(error: Exception, device: torch.device) -> None:
    """Decide what follows a launch on `device` that raised `error`: return to fall back to the eager route, or raise.

    It returns under "auto" if the machine lacks something: a C compiler, a writable cache folder, a driver that
    supports the kernels' code, shared memory. It warns once per process for each cause.

    Raises:
        Exception: `error` itself, under "triton", if memory is exhausted, or if every call to the GPU fails. CUDA
            reports an earlier asynchronous error at the next launch.
        torch.OutOfMemoryError: the driver itself is out of memory.
    """
    text = str(error)
    if text.startswith("Triton Error") and text.endswith("out of memory"):
        raise torch.OutOfMemoryError(
            f"{device} is out of memory: the driver has none left to load or launch a kernel ({text}). "
            "torch.cuda.empty_cache() hands back what torch holds in reserve; a smaller batch needs less."
        ) from error
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if chosen() == "triton" or memory or isinstance(error, torch.AcceleratorError) or _unusable(device):
        raise error
    cause = f"a kernel could not be compiled or launched ({_cause(error)})"
    _faults[device] = cause
    _warn_once(
        cause,
        f"fastenc takes the eager route on {device} from now on",
        f'{_remedy(error)}; fastenc.backend("triton") raises the whole error',
    )


def _unusable(device: torch.device) -> bool:
    """Whether every call to a GPU fails: after an illegal access, in a forked process, during a graph capture."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _remedy(error: Exception) -> str:
    """What the user can do about the error of a launch."""
    if isinstance(error, ImportError):
        return "reinstall triton until `python -c 'import triton.language'` succeeds"
    if isinstance(error, (CalledProcessError, FileNotFoundError)) or "C compiler" in str(error):
        return "install a C compiler that triton finds (gcc or clang on PATH, or CC) and Python's headers"
    if isinstance(error, OSError):
        return "let TRITON_CACHE_DIR name a folder that can be written and has room"
    return "bring torch, triton and the CUDA driver to versions that were made for each other and know this GPU"


def _warn_once(cause: str, what: str, remedy: str) -> None:
    """Warn about `cause`, once per process."""
    with _lock:
        if cause in _warned:
            return
        _warned.add(cause)
    warnings.warn(f"{what}: {cause}. Remedy: {remedy}.", RuntimeWarning, stacklevel=5)
