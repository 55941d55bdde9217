"""Run the kernels on CPU tensors, as strictly as on a GPU, and count the bytes that they move.

    interpreted()       inside the block kernels are interpreted; outside it they compile as usual
    Traffic()           counts the bytes that interpreted launches load and store
    sampled_programs()  runs only some programs of a grid that is too large to interpret

TRITON_INTERPRET=1 is no alternative: it must be set before triton is imported, and the process cannot compile then.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

import fastenc.kernels

from .ptx.operations import to_bfloat16, widened

# By id, because the hash of a kernel is its costly cache key. Kernels live as long as their module.
_interpreted: dict[int, InterpretedFunction] = {}


def kernel_modules() -> list[ModuleType]:
    """All modules of fastenc.kernels."""
    names = [name for _, name, _ in pkgutil.iter_modules(fastenc.kernels.__path__)]
    return [importlib.import_module(f"fastenc.kernels.{name}") for name in names]


@contextmanager
def replaced_kernels(modules: Iterable[ModuleType], replacement: Callable[[JITFunction], Any]) -> Iterator[None]:
    """Inside the block, each kernel of `modules` is its replacement."""
    with ExitStack() as stack:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, replacement(kernel)))
        yield


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Interpret every kernel of `modules` (by default all of fastenc.kernels) inside the block.

    The interpreter changes triton.language in place; the changes are undone after the block. The interpreter is
    `faithful`.
    """
    language = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, tl.core.tensor_descriptor]
    attributes = [(owner, dict(vars(owner))) for owner in language]
    kernels = replaced_kernels(
        [tl, tl.core, tl.standard, tl.random, *(modules or kernel_modules())],
        lambda kernel: _interpreted.setdefault(id(kernel), InterpretedFunction(kernel.fn)),
    )
    try:
        with kernels, knobs.runtime.scope(), faithful():
            knobs.runtime.interpret = True
            yield
    finally:
        for owner, saved in attributes:
            for name in set(vars(owner)) - set(saved):
                delattr(owner, name)
            for name, value in saved.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def faithful() -> Iterator[None]:
    """Correct the interpreter where it is wrong or more lenient than a GPU.

    bfloat16 is rounded to nearest, and arithmetic in it is refused. Masked lanes of a load without `other` are poisoned
    instead of 0. int32 overflow and device_assert raise. A sum is a tree instead of a chain. A loop's bound may be
    an array of one element, which triton 3.6 does not convert with numpy 2.4.
    """
    cast, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    load, patch_tensor = InterpreterBuilder.create_masked_load, interpreter._patch_lang_tensor

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(widened(src.data), target)
        return cast(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic in bfloat16: upcast to float32 first")
        return binary(self, lhs, rhs, op)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if other is None and not np.all(mask.data):
            element = ptrs.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            poison = np.nan if dtype.kind == "f" else 0x7FC0 if element == tl.bfloat16 else np.iinfo(dtype).max
            other = TensorHandle(np.full(ptrs.data.shape, poison, dtype=dtype), element)
        return load(self, ptrs, mask, other, *rest)

    def tree_reduce(self: Any, input: Any) -> Any:
        """Down one axis, by any function of tuples; whole columns at a time."""
        dtypes = [one.dtype for one in input]
        parts = [np.moveaxis(one.handle.data, self.axis, 0) for one in input]
        while (half := len(parts[0]) // 2) > 0:
            halves = [*(part[:half] for part in parts), *(part[half:] for part in parts)]
            joined = self.combine_fn.fn(*map(self.to_tensor, halves, 2 * dtypes))
            parts = [one.handle.data for one in (joined if isinstance(joined, tuple) else [joined])]
        return tuple(self.to_tensor(part[0], dtype) for part, dtype in zip(parts, dtypes, strict=True))

    def tree_sum(self: Any, input: Any) -> Any:
        return tree_reduce(self, (input,))[0]

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    builder = interpreter.interpreter_builder
    with (
        mock.patch.object(builder, "options", dataclasses.replace(builder.options, debug=True)),
        mock.patch.multiple(
            InterpreterBuilder, cast_impl=cast_impl, binary_op=binary_op, create_masked_load=create_masked_load
        ),
        mock.patch.multiple(interpreter.ReduceOps, sum=tree_sum, generic_reduce=tree_reduce),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_lang_tensor),
    ):
        yield


class Traffic(ExitStack):
    """Bytes that launches interpreted inside the block move, without masked lanes.

    loaded, stored: bytes of the accesses.
    loaded_sectors, stored_sectors: bytes of the 32-byte sectors that they touch. A sector counts once per access of a
        program, because memory moves in sectors.
    launches: kernels started.
    atomics: atomic operations.
    alike: the number of programs that each program counts as from now on; 1 at first.
    """

    def __enter__(self) -> Traffic:
        self.alike = 1
        self.loaded = self.stored = self.loaded_sectors = self.stored_sectors = self.launches = self.atomics = 0

        def counted(owner: Any, method: str, count: Callable[..., None]) -> None:
            original = getattr(owner, method)

            def call(this: Any, *arguments: Any, **keywords: Any) -> Any:
                count(*arguments)
                return original(this, *arguments, **keywords)

            self.enter_context(mock.patch.object(owner, method, call))

        counted(InterpreterBuilder, "create_masked_load", lambda ptrs, mask, *_: self._moved("loaded", ptrs, mask))
        counted(InterpreterBuilder, "create_masked_store", lambda ptrs, _, mask, *__: self._moved("stored", ptrs, mask))
        for method in ("create_atomic_rmw", "create_atomic_cas"):
            counted(InterpreterBuilder, method, lambda *_: self._add("atomics", 1))
        counted(interpreter.GridExecutor, "__call__", lambda *_: self._add("launches", 1))
        return self

    def _add(self, what: str, amount: int) -> None:
        setattr(self, what, getattr(self, what) + amount)

    def _moved(self, way: str, ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        address = ptrs.data if mask is None else ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]
        self._add(way, self.alike * address.size * size)
        self._add(f"{way}_sectors", self.alike * np.unique(address // 32).size * 32)

    @property
    def sectors(self) -> int:
        """Bytes of the sectors loaded and stored."""
        return self.loaded_sectors + self.stored_sectors


@contextmanager
def sampled_programs(choose: Callable[[str, tuple[int, int, int]], Iterable[tuple[int, int, int]]]) -> Iterator[None]:
    """Inside the block, launches run only the program ids that choose(kernel's name, grid) returns.

    This reaches the last programs of a tensor beyond 2³¹ elements, because torch.empty allocates its memory lazily.
    """

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(executor.fn).args
        scope = interpreter._patch_lang(executor.fn)
        try:
            bound = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
            grid = executor.grid(bound) if callable(executor.grid) else executor.grid
            grid = (*grid, 1, 1)[:3]
            bound = {k: v if k in executor.constexprs else interpreter._implicit_cvt(v) for k, v in bound.items()}
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for program in choose(executor.fn.__name__, grid):
                interpreter.interpreter_builder.set_grid_idx(*program)
                executor.fn(**bound)
        finally:
            scope.restore()

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch):
        yield
