"""The command for a GPU machine, as far as a machine without one can see it: its tests' imports, its record, its care.

Times are never asserted; that time runs out is, where none was given or a peer never ends.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastenc
from fastenc.bench import __main__, agreement, gpu, gpu_tests, measure, peers, record, table
from fastenc.bench.deadline import Deadline, OutOfTime, time_limit
from fastenc.bench.peers import Candidate, Peer
from fastenc.bench.record import Network, Record, Result, Summary, Workload
from fastenc.bench.timing import Work

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ABSENT = ("nibabel", "nilearn", "hypothesis", "rich", "torchsummary", "onnx", "matplotlib", "scipy", "safetensors")
TINY = Network(4, (2, 1), 3, 5)
NETWORK = Workload("network", "forward+backward", "float32", (2, 3, 8, 7, 6), network=TINY)
OP = Workload("instance_norm_prelu", "backward", "float32", (2, 4, 5, 4, 3), least_bytes=5760)
UNTIMED = "left out: no time left"

# ------------------------------------------------------------------------------------------------ tests/gpu


def collect(folder: Path) -> subprocess.CompletedProcess[str]:
    """Collect the tests of `folder` the way the command runs them, in a Python that lacks every package of ABSENT."""
    arguments = gpu_tests.command()[3:-1]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        f"import pytest; sys.exit(pytest.main([*{arguments!r}, '--collect-only', '-q', {str(folder)!r}]))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_gpu_tests_import_nothing_that_may_be_absent() -> None:
    done = collect(ROOT / "tests" / "gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert f"<Module {file.name}>" in done.stdout


def test_an_import_that_may_be_absent_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_volume.py").write_text("import nibabel\ndef test_nothing(): pass\n")
    done = collect(tmp_path)
    assert done.returncode == 2
    assert "nibabel" in done.stdout


VERBOSE = """\
tests/gpu/test_a.py::test_one[2x3] PASSED      [ 20%]
tests/gpu/test_a.py::test_two SKIPPED (needs two GPUs) [ 40%]
tests/gpu/test_a.py::test_three FAILED [ 60%]
tests/gpu/test_a.py::test_four ERROR [ 80%]
E   AssertionError: tests/gpu was PASSED over
"""


@pytest.mark.parametrize(
    ("log", "code", "status", "counts"),
    [
        (VERBOSE, 1, "failed", (1, 1, 1, 1)),
        (VERBOSE.splitlines()[0], 0, "passed", (1, 0, 0, 0)),
        (VERBOSE.splitlines()[0], None, "stopped: no time left", (1, 0, 0, 0)),
        (VERBOSE, None, "failed", (1, 1, 1, 1)),
        ("ERROR collecting tests/gpu/test_a.py", 2, "failed", (0, 0, 1, 0)),
        (VERBOSE.splitlines()[0] + "\nFatal Python error: Segmentation fault", -11, "failed", (1, 0, 1, 0)),
    ],
)
def test_outcome_of_the_gpu_tests(log: str, code: int | None, status: str, counts: tuple[int, ...]) -> None:
    found = gpu_tests.outcome(log, code, 3.0)
    assert (found.status, found.passed, found.failed, found.errors, found.skipped) == (status, *counts)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small workloads, no tests, and no more rounds than needed."""
    monkeypatch.setattr(gpu, "plan", lambda device: [NETWORK, OP])
    monkeypatch.setattr(gpu_tests, "run", lambda log, seconds: record.GpuTests("passed", passed=1))
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    monkeypatch.setitem(measure.COMPILE_GUESS, "cpu", math.inf)


def only_record(folder: Path) -> Record:
    (path,) = folder.glob("*.json")
    return record.load(path)


BENCH_WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
runpy.run_module("fastenc.bench", run_name="__main__", alter_sys=True)
"""


def test_whole_command_on_the_cpu(tmp_path: Path) -> None:
    """Without the packages that may be absent, and in too short a time to compile."""
    arguments = ["gpu", "--device", "cpu", "--minutes", "0.7", "--out", str(tmp_path / "a" / "folder")]
    command = [sys.executable, "-c", BENCH_WITHOUT, *arguments]
    environment = {**os.environ, "FASTENC_BACKEND": "auto", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = only_record(tmp_path / "a" / "folder")
    assert done.stdout.rstrip().endswith(table.table(written).rstrip())
    assert written.machine.torch == torch.__version__
    assert written.command == "python -m fastenc.bench gpu --device cpu --minutes 0.7"
    assert written.tests.passed == written.tests.failed == written.tests.errors == 0
    assert [str(workload) for workload in written.workloads] == [str(workload) for workload in gpu.plan(CPU)]
    first = {result.peer: result for result in written.workloads[0].results}
    assert first.keys() == peers.NETWORK_PEERS.keys()
    for name in ("eager", "eager channels_last_3d", "fastenc"):
        assert first[name].status == "ok", first[name]
        timed = first[name].time
        assert timed is not None
        assert timed.count >= measure.LEAST_ROUNDS
    assert "the kernels run on CUDA" in first["fastenc"].note
    assert {result.status for workload in written.workloads for result in workload.results} <= {"ok", UNTIMED}


@pytest.mark.usefixtures("quick")
def test_without_time_all_is_left_out_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = __main__.main(["gpu", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path)])
    written = only_record(tmp_path)
    assert status == 0
    assert not written.complete
    assert written.note == "stopped at its deadline"
    assert {result.status for workload in written.workloads for result in workload.results} == {UNTIMED}
    assert capsys.readouterr().out.count(UNTIMED) == len(peers.NETWORK_PEERS) + len(peers.OP_PEERS)


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = measure.Measurement.run

    def interrupted(self: measure.Measurement, *arguments: object) -> None:
        if self.workload().kind == OP.kind:
            raise KeyboardInterrupt
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(measure.Measurement, "run", interrupted)
    status = __main__.main(["gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)])
    first, second = only_record(tmp_path).workloads
    assert status == 130
    assert [r.status for r in first.results] == ["ok", "ok", "ok", UNTIMED]
    assert {r.status for r in second.results} == {UNTIMED}


@pytest.mark.usefixtures("quick")
def test_a_failed_test_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "run", lambda log, seconds: record.GpuTests("failed", failed=1))
    assert __main__.main(["gpu", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path)]) == 1


def test_no_gpu_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["gpu", "--out", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "no CUDA GPU" in printed.err
    assert "--device cpu" in printed.err
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "Session", None)
    (tmp_path / "file").write_text("")
    assert __main__.main(["gpu", "--device", "cpu", "--out", str(tmp_path / "file" / "folder")]) == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert str(tmp_path / "file" / "folder") in error


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_that_are_none(minutes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["gpu", "--device", "cpu", f"--minutes={minutes}", "--out", str(tmp_path)])
    assert f"--minutes: got {minutes}; a number" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- the peers


def run(
    workload: Workload, timed: dict[str, Peer], monkeypatch: pytest.MonkeyPatch, seconds: float = 600
) -> dict[str, Result]:
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    measurement = measure.Measurement(workload, timed, CPU)
    measurement.run(Deadline(seconds), 0.0, lambda step: None)
    return {result.peer: result for result in measurement.workload().results}


def broken(peer: Peer, change: Callable[[dict[str, Tensor]], object]) -> Peer:
    """`peer` with its numbers changed."""

    def make(workload: Workload, device: torch.device) -> Candidate:
        candidate = peer.make(workload, device)

        def numbers() -> dict[str, Tensor]:
            changed = {name: tensor.clone() for name, tensor in candidate.numbers().items()}
            change(changed)
            return changed

        return dataclasses.replace(candidate, numbers=numbers)

    return Peer(make)


@pytest.mark.parametrize(
    ("workload", "tensor"),
    [(NETWORK, "output"), (NETWORK, "netbody.1.conv_scale.mconv.1.weight"), (OP, "dslope"), (OP, "dx")],
)
@pytest.mark.parametrize("factor", [1.1, 0.0, math.nan])
def test_a_peer_that_disagrees_is_reported_and_not_timed(
    workload: Workload, tensor: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = peers.peers_of(workload)["eager"]
    results = run(workload, {"eager": eager, "broken": broken(eager, lambda n: n[tensor].mul_(factor))}, monkeypatch)
    assert results["eager"].status == "ok"
    assert results["broken"].status == "wrong"
    assert results["broken"].time is None
    assert tensor in results["broken"].note


def test_a_gradient_that_is_missing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = peers.NETWORK_PEERS["eager"]
    results = run(NETWORK, {"eager": eager, "broken": broken(eager, lambda n: n.pop("fc.bias"))}, monkeypatch)
    assert results["broken"].status == "wrong"
    assert "fc.bias" in results["broken"].note


@pytest.mark.parametrize("workload", gpu.plan(CPU), ids=str)
def test_every_peer_that_need_not_compile_agrees(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {name: peer for name, peer in peers.peers_of(workload).items() if not peer.compiles}
    assert {result.status for result in run(workload, timed, monkeypatch).values()} == {"ok"}


def raising(error: BaseException) -> Peer:
    def make(workload: Workload, device: torch.device) -> Candidate:
        raise error

    return Peer(make)


def test_a_peer_that_fails_or_runs_out_of_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {
        "eager": peers.OP_PEERS["eager"],
        "large": raising(torch.OutOfMemoryError("tried to allocate 1 TiB")),
        "faulty": raising(RuntimeError("no such kernel\nand a long story")),
        "fastenc": peers.OP_PEERS["fastenc"],
    }
    results = run(OP, timed, monkeypatch)
    assert {name: result.status for name, result in results.items()} == {
        "eager": "ok",
        "large": "out of memory",
        "faulty": "failed",
        "fastenc": "ok",
    }
    assert results["faulty"].note == "RuntimeError: no such kernel"


def test_without_eager_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"eager": raising(RuntimeError("no such kernel")), "fastenc": peers.OP_PEERS["fastenc"]}
    assert {result.status for result in run(OP, timed, monkeypatch).values()} == {"failed"}
    with pytest.raises(ValueError, match="'eager' is needed"):
        measure.Measurement(OP, {"fastenc": peers.OP_PEERS["fastenc"]}, CPU)


def test_an_exact_run_that_does_not_fit_in_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "exact", raising(torch.OutOfMemoryError("tried to allocate 1 TiB")).make)
    results = run(OP, peers.OP_PEERS, monkeypatch)
    assert [result.status for result in results.values()] == ["out of memory", "failed", "failed"]


def test_a_compilation_that_never_ends_is_stopped_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(workload: Workload, device: torch.device) -> Candidate:
        time.sleep(20)
        return peers.OP_PEERS["eager"].make(workload, device)

    monkeypatch.setitem(measure.COMPILE_GUESS, "cpu", 0.1)
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    timed = {"eager": peers.OP_PEERS["eager"], "endless": Peer(endless, compiles=True)}
    measurement = measure.Measurement(OP, timed, CPU)
    measurement.run(Deadline(60), reserve=59, say=lambda step: None)
    eager, stopped = measurement.workload().results
    assert eager.status == "ok"
    assert stopped.status == UNTIMED


def test_a_compilation_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {
        "eager": peers.OP_PEERS["eager"],
        "compiled": dataclasses.replace(raising(AssertionError()), compiles=True),
    }
    measurement = measure.Measurement(OP, timed, CPU)
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    measurement.run(Deadline(600), reserve=590, say=lambda step: None)
    assert [result.status for result in measurement.workload().results] == ["ok", UNTIMED]


def test_samples_taken_before_the_deadline_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower_and_slower(workload: Workload, device: torch.device) -> Candidate:
        candidate = peers.OP_PEERS["eager"].make(workload, device)
        calls = iter(range(10**9))

        def call(*arguments: Tensor) -> object:
            time.sleep(0.0 if next(calls) < 100 else 20)
            return candidate.work.call(*arguments)

        return dataclasses.replace(candidate, work=Work(call, candidate.work.prepare))

    measurement = measure.Measurement(OP, {"eager": Peer(slower_and_slower)}, CPU)
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 3600.0)
    with pytest.raises(OutOfTime):
        measurement.run(Deadline(3), 0.0, lambda step: None)
    (result,) = measurement.workload().results
    assert result.status == "ok"
    assert result.time is not None
    assert result.time.count > 0


@pytest.mark.parametrize("workload", [NETWORK, OP], ids=str)
def test_the_compiled_peer_agrees(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as by default, then run as it is: a machine without a C++ compiler can do that."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    timed = {name: peers.peers_of(workload)[name] for name in ("eager", "torch.compile")}
    results = run(workload, timed, monkeypatch)
    assert results["torch.compile"].status == "ok", results["torch.compile"]


def test_plain_encoder_has_the_parameters_of_the_network() -> None:
    ours = fastenc.EncoderNet3d(**dataclasses.asdict(TINY)).state_dict()
    plain = peers.plain_encoder(TINY).state_dict()
    assert [(k, v.shape) for k, v in plain.items()] == [(k, v.shape) for k, v in ours.items()]


def test_judge() -> None:
    eager = {"output": 0.0, "a": 0.1, "b": 0.3}
    assert agreement.judge(eager, eager).agrees
    assert agreement.judge({"output": 0.2, "a": 0.2, "b": 0.6}, eager).agrees
    assert agreement.judge({"output": 0.21, "a": 0.0, "b": 0.0}, eager) == agreement.Verdict("output", 0.21, 0.2 + 1e-5)
    assert agreement.judge({"output": 0.0, "a": 0.0, "b": 0.61}, eager).tensor == "b"
    assert not agreement.judge({"output": 0.0, "a": 0.0, "b": 0.61}, eager).agrees
    unusable = {"output": math.inf, "a": math.inf}
    assert not agreement.judge(unusable, unusable).agrees


# ------------------------------------------------------------------------------------------ time and record


def test_time_limit_leaves_the_enclosing_one_in_force() -> None:
    def two_inner_limits() -> None:
        with pytest.raises(OutOfTime), time_limit(0.05):
            time.sleep(20)
        with time_limit(3600):
            pass
        reached.append("after the inner limits")
        time.sleep(20)

    reached: list[str] = []
    with pytest.raises(OutOfTime), time_limit(0.5):
        two_inner_limits()
    assert reached
    with pytest.raises(OutOfTime), time_limit(0.05), time_limit(3600):
        time.sleep(20)
    with pytest.raises(OutOfTime), time_limit(-1):
        raise AssertionError("begun without time")


def test_deadline_counts_and_learns() -> None:
    now = [100.0]
    deadline = Deadline(60, clock=lambda: now[0])
    now[0] += 25
    assert (deadline.elapsed(), deadline.left()) == (25, 35)
    assert deadline.estimate("compile", 45) == 45
    deadline.note("compile", 20)
    deadline.note("compile", 10)
    assert deadline.estimate("compile", 45) == 20


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40))
def test_summary_is_numpys(samples: list[float]) -> None:
    summary = Summary.of(samples)
    assert summary.count == len(samples)
    expected = np.quantile(samples, [0.5, 0.2, 0.8])
    np.testing.assert_allclose([summary.median, summary.p20, summary.p80], expected, rtol=1e-12)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A record on disk, with every kind of field in it."""
    machine = record.Machine("cuda", "GPU", "9.0", None, "3.12.3", "2.11.0", "13.0", "91000", "3.6.0", 4.2e12, 7e14)
    results = (
        Result("eager", "ok", Summary(1.0, 0.9, 1.1, 7), 0.0, 1e-5, 2.0, 123),
        Result("fastenc", "out of memory", note="a note"),
    )
    workloads = (dataclasses.replace(NETWORK, results=results), OP)
    settings = record.Settings(True, False, True, 2)
    tests = record.GpuTests("passed", 3, 0, 0, 1, 12.5)
    path = tmp_path / "record.json"
    record.write(
        Record("gpu", "2026-01-01T00:00:00+00:00", None, None, machine, settings, tests, workloads, True), path
    )
    return path


def test_a_record_comes_back_as_it_was(sample: Path) -> None:
    first = record.load(sample)
    copy = sample.with_name("copy.json")
    record.write(first, copy)
    assert record.load(copy) == first
    assert first.workloads[0].network == TINY
    assert first.workloads[0].results[0].time == Summary(1.0, 0.9, 1.1, 7)
    assert "out of memory" in table.table(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema="fastenc-record-0"), "schema 'fastenc-record-0'"),
        (lambda raw: raw.pop("schema"), "schema None"),
        (lambda raw: raw.pop("machine"), "record: expected the fields"),
        (lambda raw: raw.update(extra=1), "record: expected the fields"),
        (lambda raw: raw["workloads"][0]["results"][0].update(status="fast"), r"workloads\[0\].results\[0\].status"),
        (lambda raw: raw["workloads"][0]["results"][0]["time"].update(median="1"), "time.median: expected float"),
        (lambda raw: raw["tests"].update(passed=1.5), "tests.passed: expected int"),
        (lambda raw: raw["machine"].update(name=None), "machine.name: expected str"),
        (lambda raw: raw.update(dirty=0), "dirty: expected bool"),
        (lambda raw: raw["workloads"][0].update(shape="2x3"), "shape"),
    ],
)
def test_a_record_of_another_schema_is_refused(sample: Path, change: Callable[[dict], object], message: str) -> None:
    raw = json.loads(sample.read_text())
    change(raw)
    sample.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        record.load(sample)
    assert str(sample) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_record_is_refused(sample: Path, text: str) -> None:
    sample.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json: (not a JSON file|a record of schema None)"):
        record.load(sample)


def test_a_record_that_cannot_be_written_leaves_the_old_one(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = sample.read_text()

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        record.write(dataclasses.replace(record.load(sample), complete=False), sample)
    assert sample.read_text() == old
    assert [path.name for path in sample.parent.iterdir()] == [sample.name]
