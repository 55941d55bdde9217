"""The command for a GPU machine, as far as it can be tested without a GPU: imports of tests/gpu, record, interruptions.

No duration is asserted, except that time runs out if none was given.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastenc.bench import __main__
from fastenc.bench.baselines import encoder, op
from fastenc.bench.commands import gpu, gpu_tests
from fastenc.bench.engine import measure, record, session, table
from fastenc.bench.engine.record import Network, Record, Workload

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ABSENT = (
    "nibabel", "nilearn", "hypothesis", "rich", "torchsummary", "onnx", "matplotlib", "scipy", "safetensors",
    "expecttest", "monai", "dynamic_network_architectures",
)  # fmt: skip
TINY = Network(4, (2, 1), 3, 5)
NETWORK = Workload("network", "training step", "float32", (2, 3, 8, 7, 6), network=TINY)
OP = Workload("instance_norm_prelu", "backward", "float32", (2, 4, 5, 4, 3))
BASELINES = len(encoder.SUITE.baselines) + len(op.SUITE.baselines)
ABSENT_BASELINES = [
    name
    for workload, suite in ((NETWORK, encoder.SUITE), (OP, op.SUITE))
    for name, baseline in suite.baselines.items()
    if baseline.absent(workload, CPU) is not None
]

# ------------------------------------------------------------------------------------------------ tests/gpu


def collect(folder: Path) -> subprocess.CompletedProcess[str]:
    """Collect the tests of `folder` as the command runs them, in a Python without the packages of ABSENT."""
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


def test_fixtures_of_the_gpu_tests_leave_no_trace(tmp_path: Path) -> None:
    """Skipped tests run no fixtures, so on a CPU the fixtures of tests/gpu run only here."""
    conftest = (ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(f"{conftest}\n\ndef _lacking():\n    return None\n", encoding="utf-8")
    state = "(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, fastenc.route.chosen())"
    (tmp_path / "test_fixtures.py").write_text(
        f"import fastenc, torch\n"
        f"before = {state}\n"
        f"def test_inside(deterministic):\n"
        f"    assert {state} == (False, False, 'triton')\n"
        f"    assert torch.are_deterministic_algorithms_enabled()\n"
        f"def teardown_module():\n"
        f"    assert {state} == before != (False, False, 'triton')\n"
        f"    assert not torch.are_deterministic_algorithms_enabled()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


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
    found = gpu_tests.outcome(log, code)
    assert (found.status, found.passed, found.failed, found.errors, found.skipped) == (status, *counts)


def test_the_worst_part_decides_the_outcome() -> None:
    passed, stopped = record.GpuTests("passed", 3, skipped=1), record.GpuTests("stopped: no time left", 2)
    failed = record.GpuTests("failed", 1, 2, 3)
    assert gpu_tests.total([passed, stopped], 4.0) == record.GpuTests(
        "stopped: no time left", 5, skipped=1, seconds=4.0
    )
    assert gpu_tests.total([passed, failed, stopped], 4.0) == record.GpuTests("failed", 6, 2, 3, 1, 4.0)


ALL_KINDS = """\
import os, pytest
@pytest.mark.parametrize("i", range(4))
def test_passes(i): assert "FASTENC_GPU_TESTS_PART" not in os.environ
def test_notes(record_property): record_property("kernels of cuDNN:", ["nchwToNhwc"])
def test_fails(): assert 2 == 3, "y is off\\nby far"
@pytest.fixture
def broken(): raise ValueError("no such layout")
def test_errs(broken): pass
"""


def stand_in(checkout: Path, monkeypatch: pytest.MonkeyPatch, tests: str, conftest: str = "") -> None:
    """Run these tests in place of tests/gpu, in three processes."""
    folder = checkout / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    (folder / "test_stand_in.py").write_text(tests, encoding="utf-8")
    monkeypatch.setattr(gpu_tests, "CHECKOUT", checkout)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_every_gpu_test_runs_once_and_failures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conftest = (ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    stand_in(tmp_path, monkeypatch, ALL_KINDS, f"{conftest}\n\ndef _lacking():\n    return None\n")
    log = tmp_path / "tests.log"
    found = gpu_tests.run(log, 300.0)
    assert (found.status, found.passed, found.failed, found.errors, found.skipped) == ("failed", 5, 1, 1, 0)
    *failed, note = gpu_tests.failures(log)
    assert sorted(failed) == [
        "FAILURE tests/gpu/test_stand_in.py::test_errs: no such layout",
        "FAILURE tests/gpu/test_stand_in.py::test_fails: y is off",
    ]
    assert note == "NOTE tests/gpu/test_stand_in.py::test_notes: kernels of cuDNN: ['nchwToNhwc']"


def test_gpu_tests_that_are_stopped_have_written_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = "import time\ndef test_fails(): assert 2 == 3\ndef test_never_ends(): time.sleep(600)\n"
    stand_in(tmp_path, monkeypatch, tests)  # without a conftest that deals them out: all in each process
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job, whose processes inherit it
    log = tmp_path / "tests.log"
    try:
        found = gpu_tests.run(log, 30.0)  # three processes start within this on a busy machine too
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (found.status, found.passed, found.failed) == ("failed", 0, 3)
    assert len(re.findall("^E +assert 2 == 3$", log.read_text(), re.MULTILINE)) == 3


def test_failures_are_few_and_short(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    assert gpu_tests.failures(log) == []
    crash = "Fatal Python error: Segmentation fault"
    log.write_text("\n".join([crash, *(f"FAILURE test_{i}: {'x' * 500}" for i in range(50)), crash]))
    found = gpu_tests.failures(log)
    assert (len(found), found[0], found[-1]) == (gpu_tests.SHOWN + 1, crash, "and 31 more")
    assert max(map(len, found)) == gpu_tests.WIDTH


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small workloads, no tests, no pictures, no ceilings, and no more rounds than needed."""
    monkeypatch.setattr(gpu, "plan", lambda device: [NETWORK, OP])
    monkeypatch.setattr(gpu, "draw", lambda session: None)
    monkeypatch.setattr(session, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(session, "matmul_rates", lambda dtypes, device: (record.MatmulRate("float32", 1e11),))
    monkeypatch.setattr(gpu_tests, "run", lambda log, seconds: record.GpuTests("passed", passed=1))
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    monkeypatch.setitem(measure.COMPILE_GUESS, "cpu", math.inf)


def only_record(folder: Path) -> Record:
    (path,) = folder.glob("*.json")
    return record.load(path)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lacks", ["pytest", "the checkout"])
def test_tests_that_cannot_run_are_reported_and_no_log_is_named(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_tests, "run", lambda log, seconds: record.GpuTests("not run"))
    if lacks == "pytest":
        monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(gpu_tests, "CHECKOUT", tmp_path)
    assert __main__.main(["gpu", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    why = "pytest is not installed" if lacks == "pytest" else "a checkout has"
    assert why in printed.err
    assert printed.out.rstrip().endswith(why)
    assert "tests.log" not in printed.out


BENCH_WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from fastenc.bench.engine import measure
measure.COMPILE_GUESS["cpu"] = float("inf")
runpy.run_module("fastenc.bench", run_name="__main__", alter_sys=True)
"""


def test_whole_command_on_the_cpu(tmp_path: Path) -> None:
    """Without the packages that may be absent, and without time to compile."""
    arguments = ["gpu", "--device", "cpu", "--minutes", "3", "--out", str(tmp_path / "a" / "folder")]
    command = [sys.executable, "-c", BENCH_WITHOUT, *arguments]
    environment = {**os.environ, "FASTENC_BACKEND": "auto", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = only_record(tmp_path / "a" / "folder")
    assert table.text(written) in done.stdout
    assert "matplotlib is not installed" in done.stdout
    assert done.stdout.endswith(f"log of the tests: {tmp_path / 'a' / 'folder' / 'tests.log'}\n")
    clients = [workload for workload in written.workloads if workload.kind == "client"]
    measured = [workload for workload in written.workloads if workload.kind != "client"]
    assert all(str(workload) in done.stderr for workload in measured), "a log, where there is no terminal"
    assert written.machine.torch == torch.__version__
    assert written.command == "python -m fastenc bench gpu --device cpu --minutes 3"
    assert written.tests.passed == written.tests.failed == written.tests.errors == 0
    assert [str(workload) for workload in written.workloads] == [str(workload) for workload in gpu.plan(CPU)]
    first = {result.peer: result for result in written.workloads[0].results}
    assert first.keys() == encoder.SUITE.baselines.keys()
    for name in ("eager", "eager channels_last_3d", "fastenc"):
        assert first[name].status == "ok", first[name]
        timed = first[name].time
        assert timed is not None
        assert timed.count >= measure.LEAST_ROUNDS
    assert "the kernels run on CUDA" in first["fastenc"].note
    assert {result.status for workload in written.workloads for result in workload.results} <= {
        "ok",
        "left out",
        "not here",
    }
    for client in clients:
        assert {result.status for result in client.results} == {"not here"}
        assert client.results[0].note.endswith(" is not installed: pip install " + client.results[0].note.split()[0])
    assert len(clients) == 3
    assert all(workload.floor for workload in measured)


@pytest.mark.usefixtures("quick")
def test_without_time_everything_is_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = __main__.main(["gpu", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path)])
    written = only_record(tmp_path)
    assert status == 0
    assert not written.complete
    assert written.note == "stopped at its deadline"
    statuses = [result.status for workload in written.workloads for result in workload.results]
    assert statuses.count("not here") == len(ABSENT_BASELINES)
    assert statuses.count("left out") == BASELINES - len(ABSENT_BASELINES)
    printed = capsys.readouterr().out
    assert "stopped at its deadline" in printed
    assert f"not reached: {NETWORK}; {OP}" in " ".join(printed.split())


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
    assert [r.status for r in first.results if r.peer in ("eager", "fastenc")] == ["ok", "ok"]
    assert {r.status for r in second.results if r.peer not in ABSENT_BASELINES} == {"left out"}


@pytest.mark.usefixtures("quick")
def test_a_second_run_in_the_same_folder_resumes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encoder, op):
        few = {name: module.SUITE.baselines[name] for name in ("eager", "fastenc")}
        monkeypatch.setattr(module, "SUITE", dataclasses.replace(module.SUITE, baselines=few))
    run, ran = measure.Measurement.run, []

    def noted(self: measure.Measurement, *arguments: object) -> None:
        ran.append(self.workload().kind)
        if ran == ["network", "instance_norm_prelu"]:
            raise KeyboardInterrupt
        run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(measure.Measurement, "run", noted)
    command = ["gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)]
    assert __main__.main(command) == 130
    first = only_record(tmp_path)
    assert __main__.main([*command[:4], "6", *command[5:]]) == 0
    second = only_record(tmp_path)
    assert ran == ["network", "instance_norm_prelu", "instance_norm_prelu"]
    assert second.complete
    assert second.date == first.date
    assert second.workloads[0].results == first.workloads[0].results
    assert {r.status for workload in second.workloads for r in workload.results} == {"ok"}
    assert __main__.main(command) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2, "a finished record is left alone"


@pytest.mark.usefixtures("quick")
def test_a_record_of_other_source_files_is_not_resumed(tmp_path: Path) -> None:
    command = ["gpu", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path)]
    assert __main__.main(command) == 0
    first = only_record(tmp_path)
    assert session.unfinished(tmp_path, first) is not None
    assert session.unfinished(tmp_path, dataclasses.replace(first, source="another")) is None


@pytest.mark.usefixtures("quick")
def test_a_lost_gpu_is_followed_by_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: measure.Measurement, *arguments: object) -> None:
        raise measure.DeviceLost("the GPU no longer responds")

    monkeypatch.setattr(measure.Measurement, "run", lost)
    assert __main__.main(["gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)]) == 1
    written = only_record(tmp_path)
    assert written.note == "stopped: the GPU no longer responds"
    assert written.tests == record.GpuTests("passed", passed=1)


@pytest.mark.usefixtures("quick")
def test_a_failed_test_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "plan", lambda device: [OP])
    monkeypatch.setattr(gpu_tests, "run", lambda log, seconds: record.GpuTests("failed", failed=1))
    assert __main__.main(["gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)]) == 1


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
def test_invalid_minutes(minutes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["gpu", "--device", "cpu", f"--minutes={minutes}", "--out", str(tmp_path)])
    assert f"--minutes: got {minutes}; a number" in capsys.readouterr().err
