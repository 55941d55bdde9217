"""The plan of `bench gpu`, replayed with assumed costs on a clock that only they move."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastenc.bench import __main__, console
from fastenc.bench import arguments as options
from fastenc.bench.baselines import third_party_networks
from fastenc.bench.baselines.registry import suite_of
from fastenc.bench.baselines.suite import Baseline, Runner, Suite
from fastenc.bench.commands import gpu, gpu_tests
from fastenc.bench.engine import deadline, machine, measure, record, session
from fastenc.bench.engine.record import GpuTests, Network, Record, Workload
from fastenc.bench.engine.timing import Work

CUDA = torch.device("cuda")
NETWORK, OPERATION, COMPILATION, CEILINGS, TESTS = 20.0, 2.0, 30.0, 3.0, 150.0  # seconds
FIRST = ("eager", "eager channels_last_3d", "fastenc", "torch.compile")


class Clock:
    """Time that passes by `spend` alone, and `time_limit` on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ends: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        end = min([self.now + seconds, *self._ends])
        stopped, self.now = end < self.now + seconds, end
        if stopped:
            raise deadline.OutOfTime

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        if seconds <= 0:
            raise deadline.OutOfTime
        self._ends.append(self.now + seconds)
        try:
            yield
        finally:
            self._ends.pop()


def assumed(workload: Workload, clock: Clock, operation_compilation: float) -> Suite:
    """The real suite of a workload, whose baselines do nothing but take time."""
    suite, network = suite_of(workload), workload.kind in ("network", "client")
    seconds = NETWORK if network else OPERATION
    compilation = COMPILATION if network else operation_compilation

    def fake(name: str, baseline: Baseline) -> Baseline:
        def make(inputs: object) -> Runner:
            if baseline.compiles:
                clock.spend(compilation)
            warming_up = seconds / 4 if name == "eager" else 0.0
            return Runner(lambda: {"output": torch.ones(1)}, Work(lambda: clock.spend(warming_up)), list)

        absent = baseline.absent
        if name == "fastenc recompute":  # it asks a CUDA tensor
            absent = lambda asked, device: "inference" if asked.mode == "forward" else None  # noqa: E731
        return dataclasses.replace(baseline, make=make, absent=absent)

    return Suite(
        inputs=lambda asked, device: clock.spend(seconds * 3 / 4),
        baselines={name: fake(name, baseline) for name, baseline in suite.baselines.items()},
        exact=lambda inputs: Runner(lambda: {"output": torch.ones(1)}, Work(lambda: None), list),
        cost=lambda asked: None,
    )


class Replay:
    """`bench gpu` on a GPU that is not here. An attribute set before `run` changes the machine or the costs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.name, self.operation_compilation, self.tests_status = "NVIDIA H100", COMPILATION, "passed"
        self.sample, self.tests_ran = 0.01, 0
        self._set = monkeypatch.setattr

    def run(self, minutes: float = 8) -> Record:
        """Run the command for these minutes and return the newest record."""
        clock = Clock()
        cpu = machine.describe(torch.device("cpu"))
        described = dataclasses.replace(cpu, device="cuda", name=self.name)

        def tests(log: Path, seconds: float) -> GpuTests:
            self.tests_ran += 1
            clock.spend(min(TESTS, seconds))
            return GpuTests(self.tests_status if seconds >= TESTS else "stopped: no time left", passed=100)  # type: ignore[arg-type]

        set_ = self._set
        set_(options, "device_problem", lambda device: None)
        set_(options, "chosen_device", lambda device: CUDA)
        set_(gpu, "Deadline", partial(deadline.Deadline, clock=clock.monotonic))
        set_(gpu, "draw", lambda session: None)
        set_(gpu, "searches", lambda workloads: 0)
        set_(gpu_tests, "run", tests)
        set_(session, "suite_of", lambda workload: assumed(workload, clock, self.operation_compilation))
        set_(session, "describe", lambda device: described)
        set_(session, "condition", lambda device: None)
        set_(session, "copy_bandwidth", lambda device: clock.spend(CEILINGS) or 3e12)  # type: ignore[func-returns-value]
        set_(session, "matmul_rates", lambda dtypes, device: ())
        set_(measure.Measurement, "_reserved", lambda measurement: 0)
        for module in (session, measure):
            set_(module, "time_limit", clock.limit)
        for module in (console, measure):
            set_(module, "time", SimpleNamespace(monotonic=clock.monotonic))
        set_(measure, "calls_per_sample", lambda work, device: work.call() or 1)
        set_(measure, "sample", lambda work, calls, device: self.sample)
        set_(measure, "peak_bytes", lambda call, device: 1)
        set_(measure, "synchronize", lambda device: None)
        set_(measure, "MOST_ROUNDS", 8)  # samples take no time here, so no number of rounds fills the seconds
        set_(measure, "gc", SimpleNamespace(collect=lambda: 0))
        set_(torch.compiler, "reset", lambda: None)
        status = __main__.main(["gpu", "--minutes", str(minutes), "--out", str(self.folder)])
        assert status == (self.tests_status == "failed" and self.tests_ran > 0)
        assert clock.now <= minutes * 60, "nothing runs past its minutes"
        return max((record.load(path) for path in self.folder.glob("*.json")), key=lambda each: each.date)


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    monkeypatch.setattr(third_party_networks, "missing", lambda model: None)
    return Replay(tmp_path, monkeypatch)


def statuses(workload: Workload) -> dict[str, str]:
    return {result.peer: result.status for result in workload.results}


@pytest.mark.parametrize(
    ("packages", "operation_compilation"),
    # With both packages, 7 × (20 + 30) + 4 × (2 + 30) s would be more than 8 minutes.
    [(False, COMPILATION), (True, 25.0)],
    ids=["without MONAI and nnU-Net", "with them"],
)
def test_eight_minutes_reach_every_promised_workload(
    packages: bool, operation_compilation: float, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packages:
        monkeypatch.setattr(third_party_networks, "missing", lambda model: "not installed")
    replay.operation_compilation = operation_compilation
    promised = replay.run().workloads[: gpu.PROMISED]
    assert [workload.kind for workload in promised].count("network") == 5
    for workload in promised:
        found = {name: status for name, status in statuses(workload).items() if name in FIRST}
        expected = "not here" if workload.kind == "client" and not packages else "ok"
        assert set(found.values()) == {expected}, f"{workload}: {found}"
        assert "torch.compile" in found
        assert len(found) == (4 if workload.kind in ("network", "client") else 3)
    assert replay.tests_ran == 1


def test_max_autotune_comes_last_and_never_in_the_first_run(replay: Replay) -> None:
    for i in range(20):
        found = replay.run(minutes=40)
        results = [result for workload in found.workloads for result in workload.results]
        tuned = [result for result in results if "max-autotune" in result.peer]
        others = [result for result in results if "max-autotune" not in result.peer]
        if i == 0 or any(result.status == "left out" for result in others):
            assert {result.status for result in tuned} == {"left out"}
        if not any(workload.unfinished() for workload in found.workloads):
            break
    assert {result.status for result in results} <= {"ok", "not here"}
    assert replay.tests_ran <= 2, "tests that ended are not repeated"
    assert len(list(replay.folder.glob("*.json"))) == 1


def test_a_long_first_run_leaves_out_max_autotune_alone(replay: Replay) -> None:
    found = replay.run(minutes=240)
    left = {result.peer for workload in found.workloads for result in workload.results if result.status == "left out"}
    assert left == {"torch.compile max-autotune", "torch.compile max-autotune channels_last_3d"}
    assert found.complete


def test_a_second_run_keeps_finished_results_and_says_what_it_resumes_from(
    replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    replay.tests_status = "failed"
    first = replay.run(minutes=14)
    capsys.readouterr()
    replay.sample = 0.02
    second = replay.run(minutes=14)
    assert replay.tests_ran == 1, "failed tests are not repeated for the same source"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "resuming" in line]
    assert next(replay.folder.glob("*.json")).name in line
    assert f"of {len(gpu.plan(torch.device('cuda')))} workloads are finished" in line
    assert "tests/gpu failed" in line
    gained = 0
    for before, after in zip(first.workloads, second.workloads, strict=True):
        finished = [result for result in before.results if result.status != "left out"]
        assert [result for result in after.results if result.peer in {each.peer for each in finished}] == finished
        gained += sum(result.status == "ok" for result in after.results) - sum(
            result.status == "ok" for result in before.results
        )
    assert gained > 10


@pytest.mark.parametrize("field", ["name", "compute_capability", "driver", "torch", "cudnn"])
def test_records_of_different_gpus_are_not_mixed(field: str, replay: Replay) -> None:
    first = replay.run(minutes=1)
    described = dataclasses.replace(first.machine, copy_bandwidth=None)
    assert session.unfinished(replay.folder, dataclasses.replace(first, machine=described)) is not None
    other = dataclasses.replace(described, **{field: "another"})
    assert session.unfinished(replay.folder, dataclasses.replace(first, machine=other)) is None


def test_a_run_on_another_gpu_writes_its_own_record(replay: Replay) -> None:
    replay.run(minutes=4)
    replay.name = "NVIDIA H200"
    replay.run(minutes=4)
    names = sorted(record.load(path).machine.name for path in replay.folder.glob("*.json"))
    assert names == ["NVIDIA H100", "NVIDIA H200"]


def test_a_missing_package_reserves_no_time(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(third_party_networks, "missing", lambda model: "not installed")
    client = next(workload for workload in gpu.plan(CUDA) if workload.kind == "client")
    measurement = measure.Measurement(client, suite_of(client), CUDA)
    assert measurement.reserve(deadline.Deadline(480)) == measurement.total == 0


def test_rows_are_printed_as_they_are_measured(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(replay.run().workloads[0])
    (row,) = [line for line in capsys.readouterr().err.splitlines() if first in line and " ms" in line]
    assert row.endswith("eager 10.00 ms, eager channels_last_3d 10.00 ms, fastenc 10.00 ms, torch.compile 10.00 ms")


def test_searches_of_cudnn() -> None:
    """Two layouts: the forward, and in training the weight's gradient and, but for the stem, the input's."""
    tiny = Network(4, (1,), 3, 5)  # the stem, one convolution, and the last
    forward = Workload("network", "forward", "float32", (2, 3, 8, 7, 6), network=tiny)
    training = dataclasses.replace(forward, mode="training step")
    assert gpu.searches([forward]) == 2 * 3
    assert gpu.searches([forward, training, training]) == 2 * (3 + 3 + 2)
    assert gpu.searches([dataclasses.replace(forward, kind="stem")]) == 2
    assert gpu.searches([training, dataclasses.replace(training, precision="bfloat16")]) == 2 * 2 * (3 + 3 + 2)
    assert gpu.searches([Workload("instance_norm_prelu", "forward", "float32", (2, 4, 8, 7, 6))]) == 0
