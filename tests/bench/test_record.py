"""Records: the schema, the committed records, complete files at any time; summaries of samples."""

import dataclasses
import json
import math
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastenc.bench.engine import record, table
from fastenc.bench.engine.record import Network, Record, Result, ThirdPartyModel, Workload
from fastenc.bench.engine.summary import Ratio, Summary

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "bench" / "records").glob("*.json"))
TINY = Network(4, (2, 1), 3, 5)
NETWORK = Workload("network", "training step", "float32", (2, 3, 8, 7, 6), network=TINY)
OP = Workload("instance_norm_prelu", "backward", "float32", (2, 4, 5, 4, 3))


def test_every_committed_record_is_of_the_schema() -> None:
    for path in COMMITTED:
        loaded = record.load(path)
        assert loaded.complete, path
        assert loaded.dirty is False, path
        assert loaded.commit, path
        for workload in loaded.workloads:
            assert {result.status for result in workload.results} <= {"ok", "not here", "out of memory"}, path
            assert workload.floor is not None, path
        assert "/" not in loaded.command, f"{path}: a path of the machine in {loaded.command}"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A record on disk, with every kind of field in it."""
    rates = (record.MatmulRate("bfloat16", 7e14),)
    machine = record.Machine("cuda", "GPU", "9.0", None, "3.12.3", "2.11.0", "13.0", "91000", "3.6.0", 4.2e12, rates)
    ratio = Ratio(1.5, 1.4, 1.6, 1.3, 1.7, 7)
    results = (
        Result("eager", "ok", Summary(1.0, 0.9, 1.1, 7), None, ratio, 0.0, 1e-5, 2.0, 123),
        Result("fastenc", "out of memory", note="a note"),
    )
    client = Workload("client", "forward", "float32", (1, 1, 8, 8, 8), client=ThirdPartyModel("MONAI UNet", (4, 8)))
    timed = dataclasses.replace(NETWORK, results=results, flops=3, least_bytes=4, floor=0.5, noise=1.02)
    workloads = (timed, OP, client)
    settings = record.Settings(True, False, True, 2)
    tests = record.GpuTests("passed", 3, 0, 0, 1, 12.5)
    condition = record.Condition(45.0, 1980.0, None, 300.0)
    path = tmp_path / "record.json"
    written = Record(
        "gpu",
        "2026-01-01T00:00:00+00:00",
        None,
        None,
        "0" * 16,
        machine,
        settings,
        tests,
        workloads,
        True,
        9.5,
        condition,
    )
    record.write(written, path)
    return path


def test_a_record_comes_back_as_it_was(sample: Path) -> None:
    first = record.load(sample)
    copy = sample.with_name("copy.json")
    record.write(first, copy)
    assert record.load(copy) == first
    assert first.workloads[0].network == TINY
    assert first.workloads[0].results[0].time == Summary(1.0, 0.9, 1.1, 7)


def test_a_table_says_what_a_record_holds(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    loaded = record.load(sample)
    printed = table.text(loaded)
    for text in ("1000", "900.0–1100", "1.50 (1.40–1.60)", "50 %", "floor 500.0 ms", "noise ×1.02", "a note"):
        assert text in printed, text
    assert "out of memory" in printed
    assert table.brief(loaded) == f"{NETWORK}: fastest eager 1000 ms", "no other has a time"
    heading = table.heading(loaded)
    assert "copy 4.2e+03 GB/s, bfloat16 matrix product 700 TFLOP/s" in heading
    assert "before 45 °C, 1980 MHz" in heading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema="fastenc-record-1"), "schema 'fastenc-record-1'.*reads 'fastenc-record-3' only"),
        (lambda raw: raw.pop("schema"), "schema None"),
        (lambda raw: raw.pop("machine"), "record: expected the fields"),
        (lambda raw: raw.update(extra=1), "record: expected the fields"),
        (lambda raw: raw["workloads"][0]["results"][0].update(status="fast"), r"workloads\[0\].results\[0\].status"),
        (lambda raw: raw["workloads"][0]["results"][0]["time"].update(median="1"), "time.median: expected float"),
        (lambda raw: raw["tests"].update(passed=1.5), "tests.passed: expected int"),
        (lambda raw: raw["machine"].update(name=None), "machine.name: expected str"),
        (lambda raw: raw["machine"]["matmul_rates"][0].update(dtype="int8"), r"matmul_rates\[0\].dtype"),
        (lambda raw: raw.update(dirty=0), "dirty: expected bool"),
        (lambda raw: raw["workloads"][0].update(shape="2x3"), "shape"),
        (lambda raw: raw["workloads"][2]["client"].update(name="UNet"), r"workloads\[2\].client.name"),
    ],
)
def test_a_record_of_another_schema_is_refused(sample: Path, change: Callable[[dict], object], message: str) -> None:
    raw = json.loads(sample.read_text())
    change(raw)
    sample.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        record.load(sample)
    assert str(sample) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda raw: raw["workloads"][0].update(shape=[2, -3, 8, 7, 6]), r"workloads\[0\]\.shape\[1\]"),
        (lambda raw: raw["workloads"][0].update(shape=[]), r"workloads\[0\]\.shape"),
        (lambda raw: raw["workloads"][0].update(flops=10**400), r"workloads\[0\]\.flops"),
        (lambda raw: raw["workloads"][0].update(flops=True), r"workloads\[0\]\.flops"),
        (lambda raw: raw["workloads"][0].update(floor=-1.0), r"workloads\[0\]\.floor"),
        (lambda raw: raw["workloads"][0].update(network=None), r"workloads\[0\]\.network"),
        (lambda raw: raw["workloads"][0].update(kind=[]), r"workloads\[0\]\.kind"),
        (lambda raw: raw.update(seconds=10**400), "seconds"),
    ],
)
def test_impossible_values_are_refused(sample: Path, change: Callable[[dict], object], field: str) -> None:
    raw = json.loads(sample.read_text())
    change(raw)
    sample.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=field):
        record.load(sample)


@pytest.mark.parametrize("text", ["1e400", "NaN", "-Infinity", "[" * 100000, "9" * 5000, '1, "seconds": 2'])
def test_numbers_outside_json_are_refused(sample: Path, text: str) -> None:
    sample.write_text(sample.read_text().replace('"seconds": 9.5', f'"seconds": {text}'))
    with pytest.raises(ValueError, match=r"record\.json: "):
        record.load(sample)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_files_that_are_not_records_are_refused(sample: Path, text: str) -> None:
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


# ------------------------------------------------------------------------------------------------ samples


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40))
def test_summary_is_numpys(samples: list[float]) -> None:
    summary = Summary.of(samples)
    assert summary.count == len(samples)
    expected = np.quantile(samples, [0.5, 0.2, 0.8])
    np.testing.assert_allclose([summary.median, summary.p20, summary.p80], expected, rtol=1e-12)


@pytest.mark.parametrize("count", [5, 7, 20, 101])
def test_the_interval_of_a_ratio_holds_its_median_nine_times_in_ten(count: int) -> None:
    """The interval is as narrow as possible: with one sample less on each side, the probability would be too low."""
    inner = [sum(math.comb(count, i) for i in range(k + 1)) / 2**count for k in range(count // 2)]
    outside = max(k for k in range(count // 2) if inner[k] <= 0.05)
    values = random.Random(count).sample(range(1, 10 * count), count)
    found = Ratio.of([float(value) for value in values], [1.0] * count)
    assert (found.low, found.high) == (sorted(values)[outside], sorted(values)[count - 1 - outside])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_interval_of_few_rounds_is_their_range(count: int) -> None:
    found = Ratio.of([float(i + 1) for i in range(count)], [1.0] * count)
    assert (found.low, found.high) == (1.0, float(count))


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=1, max_size=30))
def test_a_ratio_is_ordered_and_its_inverse_too(rounds: list[tuple[float, float]]) -> None:
    above, below = ([pair[i] for pair in rounds] for i in (0, 1))
    ratio, inverse = Ratio.of(above, below), Ratio.of(below, above)
    assert all(a <= b for a, b in pairwise([ratio.low, ratio.median, ratio.high]))
    assert ratio.p20 <= ratio.median <= ratio.p80
    assert ratio.low == pytest.approx(1 / inverse.high)
    assert ratio.off_one >= 1
    assert Ratio.of([*above, 1.0], below) == ratio, "a round that only one has finished counts for none"


def test_within_noise() -> None:
    def ratio(low: float, high: float) -> Ratio:
        return Ratio(1.0, 1.0, 1.0, low, high, 9)

    quiet, loud = (dataclasses.replace(OP, noise=noise) for noise in (1.01, 1.2))
    assert not quiet.within_noise(ratio(1.05, 1.10))
    assert loud.within_noise(ratio(1.05, 1.10))
    assert quiet.within_noise(ratio(0.9, 1.1))
    assert not quiet.within_noise(ratio(0.9, 0.95))
    assert OP.within_noise(ratio(0.9, 1.0))
