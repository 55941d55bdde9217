"""Measurements of one workload: baselines that agree are timed, the others are reported, and time limits hold.

No duration is asserted, except that time runs out if none was given or a baseline never ends.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastenc
from fastenc.bench.baselines import encoder, op
from fastenc.bench.baselines.registry import suite_of
from fastenc.bench.baselines.suite import Baseline, Runner
from fastenc.bench.commands import gpu
from fastenc.bench.console import Progress
from fastenc.bench.engine import agreement, measure
from fastenc.bench.engine import deadline as deadline_module
from fastenc.bench.engine.deadline import Deadline, OutOfTime, time_limit
from fastenc.bench.engine.record import Network, Result, Workload
from fastenc.bench.engine.timing import Work

CPU = torch.device("cpu")
TINY = Network(4, (2, 1), 3, 5)
NETWORK = Workload("network", "training step", "float32", (2, 3, 8, 7, 6), network=TINY)
OP = Workload("instance_norm_prelu", "backward", "float32", (2, 4, 5, 4, 3))
NETWORKS, OPS = encoder.SUITE.baselines, op.SUITE.baselines

# ----------------------------------------------------------------------------------------------- the baselines


QUIET = Progress(1.0)


def measured(workload: Workload, timed: dict[str, Baseline]) -> measure.Measurement:
    """A measurement of these baselines."""
    return measure.Measurement(workload, dataclasses.replace(suite_of(workload), baselines=timed), CPU)


def run(
    workload: Workload, timed: dict[str, Baseline], monkeypatch: pytest.MonkeyPatch, seconds: float = 600
) -> dict[str, Result]:
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    measurement = measured(workload, timed)
    measurement.run(Deadline(seconds), 0.0, QUIET)
    return {result.peer: result for result in measurement.workload().results}


def broken(baseline: Baseline, change: Callable[[dict[str, Tensor]], object]) -> Baseline:
    """`baseline` with its numbers changed."""

    def make(inputs: Any) -> Runner:
        runner = baseline.make(inputs)

        def numbers() -> dict[str, Tensor]:
            changed = {name: tensor.clone() for name, tensor in runner.numbers().items()}
            change(changed)
            return changed

        return dataclasses.replace(runner, numbers=numbers)

    return Baseline(make)


@pytest.mark.parametrize(
    ("workload", "tensor"),
    [(NETWORK, "output"), (NETWORK, "netbody.1.conv_scale.mconv.1.weight"), (OP, "dslope"), (OP, "dx")],
)
@pytest.mark.parametrize("factor", [1.1, 0.0, math.nan])
def test_a_baseline_that_disagrees_is_reported_and_not_timed(
    workload: Workload, tensor: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = suite_of(workload).baselines["eager"]
    results = run(workload, {"eager": eager, "broken": broken(eager, lambda n: n[tensor].mul_(factor))}, monkeypatch)
    assert results["eager"].status == "ok"
    assert results["broken"].status == "wrong"
    assert results["broken"].time is None
    assert tensor in results["broken"].note


def test_a_missing_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = NETWORKS["eager"]
    results = run(NETWORK, {"eager": eager, "broken": broken(eager, lambda n: n.pop("fc.bias"))}, monkeypatch)
    assert results["broken"].status == "wrong"
    assert "fc.bias" in results["broken"].note


@pytest.mark.parametrize("workload", gpu.plan(CPU), ids=str)
def test_uncompiled_baselines_agree(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {name: baseline for name, baseline in suite_of(workload).baselines.items() if not baseline.compiles}
    results = run(workload, timed, monkeypatch)
    assert {result.status for result in results.values()} <= {"ok", "not here"}
    assert results["eager"].over_eager is None
    for name, result in results.items():
        if result.status == "ok":
            assert result.time is not None
            assert result.time.count >= measure.LEAST_ROUNDS
            assert result.peak_memory
            assert (result.over_eager is None) == (name == "eager")
            assert (result.over_fastenc is None) == (name == "fastenc" or "fastenc" not in results)


@pytest.mark.parametrize("precision", ["bfloat16 autocast", "float32"])
def test_a_cpu_compares_bfloat16_without_onednn(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is enabled again even if the baseline raises."""
    seen = []

    def make(inputs: Any) -> Runner:
        def numbers() -> Any:
            seen.append(bool(torch.backends.mkldnn.enabled))
            raise RuntimeError("a cause")

        return Runner(numbers, Work(lambda: None), list)

    run(dataclasses.replace(NETWORK, precision=precision), {"eager": Baseline(make)}, monkeypatch)
    assert seen == [precision == "float32"]
    assert torch.backends.mkldnn.enabled


def raising(error: BaseException) -> Baseline:
    def make(inputs: Any) -> Runner:
        raise error

    return Baseline(make)


def test_a_baseline_that_fails_or_runs_out_of_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {
        "eager": OPS["eager"],
        "large": raising(torch.OutOfMemoryError("tried to allocate 1 TiB")),
        "faulty": raising(RuntimeError("no such kernel\nand a long story")),
        "fastenc": OPS["fastenc"],
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
    timed = {"eager": raising(RuntimeError("no such kernel")), "fastenc": OPS["fastenc"]}
    assert {result.status for result in run(OP, timed, monkeypatch).values()} == {"failed"}
    with pytest.raises(ValueError, match="'eager' is needed"):
        measured(OP, {"fastenc": OPS["fastenc"]})


def test_an_exact_run_that_does_not_fit_in_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = raising(torch.OutOfMemoryError("tried to allocate 1 TiB")).make
    measurement = measure.Measurement(OP, dataclasses.replace(op.SUITE, exact=exact), CPU)
    measurement.run(Deadline(60), 0.0, QUIET)
    statuses = {result.peer: result.status for result in measurement.workload().results}
    absent = {name for name, baseline in OPS.items() if baseline.absent(OP, CPU) is not None}
    expected = {name: "not here" if name in absent else "failed" for name in OPS}
    assert statuses == {**expected, "eager": "out of memory"}


def test_a_compilation_that_never_ends_is_stopped_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(inputs: Any) -> Runner:
        time.sleep(20)
        return OPS["eager"].make(inputs)

    monkeypatch.setitem(measure.COMPILE_GUESS, "cpu", 0.1)
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    timed = {"eager": OPS["eager"], "endless": Baseline(endless, compiles=True)}
    measurement = measured(OP, timed)
    measurement.run(Deadline(60), reserve=55, progress=QUIET)  # about a second is left to compile
    eager, stopped = measurement.workload().results
    assert eager.status == "ok"
    assert (stopped.status, stopped.note) == ("left out", "no time left to compile")


def test_a_compilation_that_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {
        "eager": OPS["eager"],
        "compiled": dataclasses.replace(raising(AssertionError()), compiles=True),
    }
    measurement = measured(OP, timed)
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 0.0)
    measurement.run(Deadline(600), reserve=590, progress=QUIET)
    assert [result.status for result in measurement.workload().results] == ["ok", "left out"]


def test_samples_taken_before_the_deadline_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower_and_slower(inputs: Any) -> Runner:
        runner = OPS["eager"].make(inputs)
        calls = iter(range(10**9))

        def call(*arguments: Tensor) -> object:
            time.sleep(0.0 if next(calls) < 100 else 20)
            return runner.work.call(*arguments)

        return dataclasses.replace(runner, work=Work(call, runner.work.prepare))

    measurement = measured(OP, {"eager": Baseline(slower_and_slower)})
    monkeypatch.setitem(measure.ROUNDS_SECONDS, "cpu", 3600.0)
    with pytest.raises(OutOfTime):
        measurement.run(Deadline(3), 0.0, QUIET)
    (result,) = measurement.workload().results
    assert result.status == "ok"
    assert result.time is not None
    assert result.time.count > 0


@pytest.mark.parametrize("workload", [NETWORK, OP], ids=str)
def test_compiled_baselines_agree(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as by default, but without generated code, so that no C++ compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    baselines = suite_of(workload).baselines
    timed = {
        "eager": baselines["eager"],
        **{name: baseline for name, baseline in baselines.items() if baseline.compiles},
    }
    for name, result in run(workload, timed, monkeypatch).items():
        lacks = baselines[name].absent(workload, CPU) is not None
        assert result.status == ("not here" if lacks else "ok"), result


@pytest.mark.parametrize(
    "network", [TINY, Network(2, (1, 3, 2), 1, 0, (3, 1, 5)), Network(3, (2, 2), 2, 4, (4, 3, 2))], ids=str
)
def test_plain_encoder_has_the_parameters_of_the_network(network: Network) -> None:
    ours = fastenc.EncoderNet3d(**dataclasses.asdict(network)).state_dict()
    plain = encoder.plain_encoder(network).state_dict()
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
    with pytest.raises(OutOfTime), time_limit(0.3):
        two_inner_limits()
    assert reached
    with pytest.raises(OutOfTime), time_limit(0.05), time_limit(3600):
        time.sleep(20)
    with pytest.raises(OutOfTime), time_limit(-1):
        raise AssertionError("begun without time")


@pytest.mark.parametrize("swallowed", ["in a __del__", "by except"])
def test_a_swallowed_signal_is_repeated(swallowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __del__(self) -> None:
            time.sleep(0.4)

    def lose_one() -> None:
        if swallowed == "by except":
            with contextlib.suppress(OutOfTime):
                time.sleep(20)
        else:
            monkeypatch.setattr(sys, "unraisablehook", lambda lost: seen.append(lost.exc_type))
            Slow()
            assert seen == [OutOfTime], "the first signal was lost"
        seen.append("lost")
        time.sleep(20)

    seen: list[Any] = []
    begin = time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.1):
        lose_one()
    assert seen[-1] == "lost"
    assert time.monotonic() - begin < 10


def test_a_repeated_signal_does_not_interrupt_what_finally_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline_module, "REPEAT", 0.02)
    restored = []

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        try:
            yield
        finally:
            time.sleep(0.1)
            restored.append(True)

    with pytest.raises(OutOfTime), time_limit(0.05), setting():
        time.sleep(20)
    assert restored


def test_deadline_counts_and_learns() -> None:
    now = [100.0]
    deadline = Deadline(60, clock=lambda: now[0])
    now[0] += 25
    assert (deadline.elapsed(), deadline.left()) == (25, 35)
    assert deadline.estimate("compile", 45) == 45
    deadline.note("compile", 20)
    deadline.note("compile", 10)
    assert deadline.estimate("compile", 45) == 20


def test_deadline_estimates_by_size() -> None:
    """A step that did not end tells of larger ones alone."""
    deadline = Deadline(60)
    deadline.note("compile", 30, size=100)
    deadline.note("compile", math.inf, size=1000)
    assert [deadline.estimate("compile", 45, size) for size in (10, 100, 999, 1000, 5000)] == [
        30,
        30,
        30,
        math.inf,
        math.inf,
    ]
    assert deadline.estimate("another", 45, 1000) == 45
    deadline.note("another", math.inf, size=1000)
    assert deadline.estimate("another", 45, 999) == 45


# ------------------------------------------------------------------------------------------------ what baselines share


def test_baselines_share_parameters_and_an_optimizer_within_a_layout() -> None:
    inputs = encoder.Inputs(NETWORK, CPU)
    made = {name: NETWORKS[name].make(inputs) for name in ("eager", "fastenc", "eager channels_last_3d")}
    for runner in made.values():
        runner.work.call()
    held = {name: {tensor.data_ptr() for tensor in runner.held()} for name, runner in made.items()}
    assert held["eager"] == held["fastenc"]
    parameters = {p.data_ptr() for p in inputs.parameters.values()}
    assert parameters <= held["eager"]
    assert not parameters & held["eager channels_last_3d"]
    assert len(held["eager"]) > 3 * len(parameters), "parameters, both moments and x"


def test_a_training_step_moves_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = encoder.Inputs(NETWORK, CPU)
    runner = NETWORKS["fastenc"].make(inputs)
    monkeypatch.setattr(encoder, "LEARNING_RATE", 1e-2)
    before = {name: p.detach().clone() for name, p in inputs.parameters.items()}
    runner.work.call()
    assert all(not torch.equal(before[name], p) for name, p in inputs.parameters.items())
    assert all(p.grad is None for p in inputs.parameters.values())


def test_only_the_requested_baselines_run() -> None:
    measurement = measure.Measurement(NETWORK, encoder.SUITE, CPU, only=["fastenc"])
    assert [result.peer for result in measurement.workload().results] == ["eager", "fastenc"]


@pytest.mark.parametrize(
    ("mode", "baseline", "reason"),
    [
        ("training step", "fastenc recompute", "on the eager route it has no effect"),
        ("forward", "fastenc recompute", "it changes what training saves"),
        ("training step", "fastenc frozen", "for inference"),
        ("forward", "fastenc graphed", "a CUDA graph needs a CUDA GPU"),
        ("forward", "torch.compile reduce-overhead", "needs a CUDA GPU"),
        ("training step", "torch.compile max-autotune channels_last_3d", "needs a CUDA GPU"),
    ],
)
def test_a_baseline_missing_on_this_machine_is_a_row_with_the_reason(mode: Any, baseline: str, reason: str) -> None:
    workload = dataclasses.replace(NETWORK, mode=mode)
    results = {r.peer: r for r in measure.Measurement(workload, encoder.SUITE, CPU).workload().results}
    assert results[baseline].status == "not here"
    assert reason in results[baseline].note


def test_every_other_round_is_reversed_and_fastenc_is_sampled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str) -> Baseline:
        def make(inputs: Any) -> Runner:
            runner = OPS["eager"].make(inputs)
            begun = [False]

            def call(*arguments: Any) -> object:
                if begun[0]:
                    order.append(name)
                return runner.work.call(*arguments)

            made = dataclasses.replace(runner, work=Work(call, runner.work.prepare))
            starts.append(lambda: begun.__setitem__(0, True))
            return made

        return Baseline(make)

    starts: list[Callable[[], None]] = []
    rounds = measure.Measurement._rounds

    def begin(self: measure.Measurement, *arguments: Any) -> None:
        for start in starts:
            start()
        rounds(self, arguments[0], dict.fromkeys(arguments[1], 1), arguments[2])

    monkeypatch.setattr(measure.Measurement, "_rounds", begin)
    results = run(OP, {name: noted(name) for name in ("eager", "fastenc", "other")}, monkeypatch)
    there = ["fastenc", "eager", "other", "fastenc"]
    assert order == (there + there[::-1]) * 4
    assert {result.time.count for result in results.values() if result.time} == {measure.SURE_ROUNDS}
