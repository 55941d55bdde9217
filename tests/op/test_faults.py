"""What the machine lacks, and what breaks at a launch: the right numbers with one warning, or the error as it is."""

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.fake_gpu import GPU, fake_driver, taken_for_cuda
from support.plain import assert_near, small_input, small_twins
from torch import Tensor
from triton.runtime import build, cache

import fastenc
from fastenc import reference, route
from fastenc.bench.proofs.interpret import interpreted
from fastenc.functional import launchers


def arguments() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 4, 5), torch.ones(3), torch.zeros(3), torch.rand(3)


def results(*inputs: Tensor) -> list[Tensor]:
    """y of the operation, and the gradients of the sum of its squares."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = fastenc.instance_norm_prelu(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def eager(*inputs: Tensor) -> list[Tensor]:
    with fastenc.backend("eager"):
        return results(*inputs)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The texts of all warnings, every one of them."""
    texts: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with mock.patch("warnings.showwarning", lambda message, *_: texts.append(str(message))):
            yield texts


# What a machine lacks. Each is brought about where it would happen, so that the error is triton's or the system's own.


def no_compiler(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")
    patch.delenv("CC", raising=False)
    driver.launcher_cls = lambda source, metadata: build.compile_module_from_src("", "launcher")


def compiler_without_headers(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CC", "false")
    driver.launcher_cls = lambda source, metadata: build.compile_module_from_src("", "launcher")


def ptxas_fails(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    ptxas = folder / "ptxas"
    ptxas.write_text("#!/bin/sh\n[ $1 = --version ] && echo release 12.8 || { echo sm_90 is not known >&2; false; }")
    ptxas.chmod(0o755)
    patch.setenv("TRITON_PTXAS_PATH", str(ptxas))


def driver_too_old(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    driver.utils.load_binary = raising(RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))


def too_few_threads(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    driver.utils.load_binary = lambda *_: (object(), object(), 0, 0, 32)


def cache_read_only(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "makedirs", raising(OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))))


def cache_full(driver: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def open_full(path: str, mode: str = "r") -> Any:
        return open("/dev/full" if "w" in mode else path, mode)

    patch.setattr(cache, "open", open_full, raising=False)


LACKS: dict[Callable[[Any, Path, pytest.MonkeyPatch], None], tuple[str, str]] = {
    no_compiler: ("Failed to find C compiler", "install a C compiler"),
    compiler_without_headers: ("CalledProcessError: Command '['false'", "Python's headers"),
    ptxas_fails: ("sm_90 is not known", "CUDA driver"),
    driver_too_old: ("device kernel image is invalid", "CUDA driver"),
    too_few_threads: ("OutOfResources: out of resource: threads", "versions"),
    cache_read_only: ("Read-only file system", "TRITON_CACHE_DIR"),
    cache_full: ("No space left on device", "TRITON_CACHE_DIR"),
}


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize("lack", LACKS, ids=lambda lack: lack.__name__)
def test_what_a_machine_lacks(
    lack: Callable[[Any, Path, pytest.MonkeyPatch], None],
    warned: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eager result, one warning with the cause and a remedy; under "triton" the error, each time."""
    cause, remedy = LACKS[lack]
    inputs = arguments()
    expected = eager(*inputs)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with taken_for_cuda(), fake_driver() as driver:
        lack(driver, tmp_path, monkeypatch)
        for _ in range(2):
            for mine, theirs in zip(results(*inputs), expected, strict=True):
                torch.testing.assert_close(mine, theirs)
        assert len(warned) == 1
        assert cause in warned[0]
        assert remedy in warned[0]
        assert cause in str(route.reason(inputs[0]))
        for _ in range(2):
            with fastenc.backend("triton"), pytest.raises(Exception, match=r".") as caught:
                results(*inputs)
            assert cause in f"{caught.type.__name__}: {caught.value}"
            assert "was asked for" not in str(caught.value)  # the error itself, no word about one of before


def test_one_warning_for_a_cause_on_several_gpus(warned: list[str]) -> None:
    with taken_for_cuda():
        for device in range(3):
            route.fall_back(RuntimeError("Failed to find C compiler."), torch.device("cuda", device))
        route.fall_back(RuntimeError("another"), torch.device("cuda", 0))
    assert [text.count("cuda:0 from now on") for text in warned] == [1, 1]


# Errors that do not come from the environment: raised unchanged, not recorded, and the next launch is tried

MEMORY = "Triton Error [CUDA]: out of memory"
BROKEN = "CUDA error: an illegal memory access was encountered"
FORKED = "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn'"
CAPTURING = "CUDA error: operation not permitted when stream is capturing"
EARLIER = {
    "illegal access": (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), BROKEN),
    "forked process": (RuntimeError(FORKED), FORKED),
    "capture": (RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"), CAPTURING),
    "found by torch": (torch.AcceleratorError(BROKEN), None),
    "torch's memory": (torch.OutOfMemoryError("CUDA out of memory."), None),
    "the host's memory": (MemoryError(), None),
}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_earlier_work_is_not_the_kernels_fault(name: str, backend: str, warned: list[str]) -> None:
    """A launch reports what earlier work broke, and no eager operation is tried on what is broken."""
    error, unusable = EARLIER[name]
    x = torch.randn(2, 3, 4)
    synchronize = mock.patch("torch.cuda.synchronize", side_effect=None if unusable is None else RuntimeError(unusable))
    formula = mock.patch.object(reference, "forward")
    with taken_for_cuda(), fake_driver() as driver, fastenc.backend(backend):
        driver.launcher_cls = raising(error)
        with synchronize, formula as eager_calls, pytest.raises(type(error)) as caught:
            fastenc.instance_norm_prelu(x)
        assert caught.value is error
        assert not eager_calls.called
        assert route.reason(x) is None
    assert not warned


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_drivers_out_of_memory_is_torchs(backend: str, warned: list[str]) -> None:
    """So that who catches torch.OutOfMemoryError, to halve a batch, catches this one."""
    x = torch.randn(2, 3, 4)
    with taken_for_cuda(), fake_driver() as driver, fastenc.backend(backend):
        works, driver.utils.load_binary = driver.utils.load_binary, raising(RuntimeError(MEMORY))
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match=r"empty_cache\(\)") as caught:
                fastenc.instance_norm_prelu(x)
            assert MEMORY in str(caught.value.__cause__)
        driver.utils.load_binary = works
        fastenc.instance_norm_prelu(x)  # a kernel that could not be loaded is loaded later
        assert route.reason(x) is None
    assert not warned


# Triton itself, and GPUs that the kernels do not run on


def test_triton_not_installed_where_a_gpu_is(warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    x = torch.randn(2, 3, 4)
    with on_gpus_of((9, 0)):
        for _ in range(2):
            assert torch.equal(fastenc.instance_norm_prelu(x), reference.forward(x))
        with fastenc.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
            fastenc.instance_norm_prelu(x)
    assert len(warned) == 1
    assert "triton is not installed" in warned[0]
    assert "pip install triton" in warned[0]


@contextlib.contextmanager
def on_gpus_of(capability: tuple[int, int]) -> Iterator[None]:
    """CPU tensors count as tensors on `GPU` with this compute capability. Cached facts about it are dropped."""
    route._lacking.cache_clear()
    asked = mock.patch("torch.cuda.get_device_capability", return_value=capability)
    with taken_for_cuda(), asked, mock.patch.multiple(route, device_reason=lambda x: route._cuda_reason(0)):
        yield
    route._lacking.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "GPU 0 is sm_75; the kernels need sm_80 or newer"),
        ((9, 4), "6.4", "this is a ROCm build of torch"),
    ],
)
def test_a_gpu_that_is_not_covered_is_named(
    capability: tuple[int, int], hip: str | None, reason: str, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silently under "auto", as every reason that is no fault."""
    monkeypatch.setattr(torch.version, "hip", hip)
    net, plain = small_twins(torch.float32)
    x = small_input(dtype=torch.float32)
    with on_gpus_of(capability):
        assert_near(net(x), plain(x))
        assert all(row.route == "eager" and reason in row.reason for row in fastenc.explain(net, x))
        with fastenc.backend("triton"), pytest.raises(RuntimeError, match=reason):
            net(x)
    assert not warned


def test_the_oldest_gpu_covered() -> None:
    with on_gpus_of((8, 0)):
        assert route.reason(torch.randn(2, 3, 4)) is None


@pytest.mark.parametrize("eps", [np.float32(1e-5), np.float64(1e-5), torch.tensor(1e-5), 1])
def test_eps_of_any_number_type_is_no_fault(eps: Any) -> None:
    x = torch.randn(2, 3, 4)
    with taken_for_cuda(), fake_driver(), fastenc.backend("triton"):
        fastenc.instance_norm_prelu(x, eps=eps)


def test_triton_that_cannot_be_imported(tmp_path: Path) -> None:
    """In a separate process: on a GPU a warning and the eager result, on a CPU the reason under "triton"."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    code = """
import warnings, torch, fastenc
from fastenc import reference, route
warnings.showwarning = lambda message, *_: print("warned:", message)
x = torch.randn(2, 3, 4, 5)
with fastenc.backend("triton"):
    assert "ImportError: libtriton.so: undefined symbol" in route.reason(x)
route.device_reason = lambda x: route.fault(x.device)
for _ in range(2):
    assert torch.equal(fastenc.instance_norm_prelu(x), reference.forward(x))
with fastenc.backend("triton"):
    try:
        fastenc.instance_norm_prelu(x)
    except ImportError as error:
        print("raised:", error)
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second, *more = done.stdout.splitlines()
    assert first.startswith("warned:")
    assert "libtriton.so: undefined symbol" in first
    assert "reinstall triton" in first
    assert (second, more) == ("raised: libtriton.so: undefined symbol", [])


# Threads and processes


def test_two_threads_that_launch_the_same_kernel_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launches while the other is still loading what it compiled: no function is launched that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.randn(2, 3, 4, 5)
    errors: list[BaseException] = []
    second = threading.Thread(target=lambda: launch())

    def launch() -> None:
        try:
            launchers()[0](x, None, None, 0.1, 1e-5)
        except BaseException as error:
            errors.append(error)

    with fake_driver() as driver:
        loads = driver.utils.load_binary

        def load(*arguments: Any) -> Any:
            if second.ident is None:
                second.start()
                second.join()
            return loads(*arguments)

        driver.utils.load_binary = load
        launch()
    assert not second.is_alive()
    assert not errors


def test_faults_met_by_many_threads_are_warned_of_once(warned: list[str]) -> None:
    start = threading.Barrier(8)

    def fail() -> None:
        start.wait()
        route.fall_back(RuntimeError("Failed to find C compiler."), GPU)

    with taken_for_cuda():
        threads = [threading.Thread(target=fail) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(warned) == 1


def test_forked_after_use() -> None:
    """A process forked from one that has used both routes gets the same results on both."""
    inputs = arguments()

    def both() -> list[Tensor]:
        with interpreted(), fastenc.backend("triton"):
            fused = results(*inputs)
        return fused + eager(*inputs)

    def compare() -> None:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(both(), expected, strict=True))

    expected = both()
    child = multiprocessing.get_context("fork").Process(target=compare)
    child.start()
    child.join(60)
    assert child.exitcode == 0
