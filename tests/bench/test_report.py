"""README's figures come only from records, the most important first, with every picture that can be drawn."""

import dataclasses
from itertools import product
from pathlib import Path

import pytest

from fastenc.bench.__main__ import main
from fastenc.bench.baselines.registry import suite_of
from fastenc.bench.commands import plots, report, third_party
from fastenc.bench.engine import table
from fastenc.bench.engine.floor import seconds as floor_of
from fastenc.bench.engine.record import (
    GpuTests,
    Machine,
    MatmulRate,
    Network,
    Record,
    Result,
    Settings,
    Workload,
    write,
)
from fastenc.bench.engine.summary import Ratio, Summary

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"eager": 4.0, "eager channels_last_3d": 3.0, "fastenc": 1.0, "torch.compile": 2.0, "fastenc graphed": 0.5}
NETWORK = Network(4, (2, 1), 3, 5)
README = f"before\n{report.BEGIN}\nold figures\n{report.END}\nafter\n"


def measured(workload: Workload, machine: Machine, noise: float = 1.01) -> Workload:
    """A workload in which every baseline takes SECONDS."""
    cost = suite_of(workload).cost(workload)
    assert cost is not None
    workload = dataclasses.replace(workload, flops=cost.flops, least_bytes=cost.bytes, noise=noise)
    results = []
    for baseline, seconds in SECONDS.items():
        over_eager = None if baseline == "eager" else Ratio.of([SECONDS["eager"]] * 9, [seconds] * 9)
        over_fastenc = None if baseline == "fastenc" else Ratio.of([seconds] * 9, [SECONDS["fastenc"]] * 9)
        summary, memory = Summary.of([seconds] * 9), int(1e9 * seconds)
        results.append(Result(baseline, "ok", summary, over_eager, over_fastenc, 0.0, 1e-5, 3.0, memory))
    return dataclasses.replace(workload, floor=floor_of(workload, machine), results=tuple(results))


def written(folder: Path, name: str, device: str = "cuda", date: str = "2026-01-02", noise: float = 1.01) -> Record:
    """A record of networks at two batches and of two operations, in `folder`."""
    folder.mkdir(exist_ok=True)
    rates = (MatmulRate("float32", 1e6), MatmulRate("bfloat16", 1e7))
    machine = Machine(device, name, None, None, "3", "2.11", None, None, None, 1e6, rates)
    shapes = [(batch, 3, 8, 7, 6) for batch in (2, 1)]
    asked = [
        Workload("network", mode, "float32", s, network=NETWORK)
        for s, mode in product(shapes, ("forward", "training step"))
    ]
    asked += [
        Workload("instance_norm_prelu", mode, "float32", (2, C, 5, 4, 3), layout)
        for C, mode, layout in product((4, 8), ("forward", "backward"), ("contiguous", "channels_last"))
    ]
    asked.append(Workload("instance_norm_add_prelu", "forward", "float32", (2, 4, 5, 4, 3)))
    asked.append(third_party.workload("UNet", "train", "bf16", (2, 1, 8, 8, 8), (4, 8)))
    settings, workloads = Settings(True, False, True, 2), tuple(measured(each, machine, noise) for each in asked)
    command, at = f"python -m fastenc bench gpu --on {name}", f"{date}T00:00:00+00:00"
    record = Record(command, at, "c" * 40, False, "0", machine, settings, GpuTests("passed"), workloads, True)
    write(record, folder / f"{name}-{date}.json".replace(" ", "-"))
    return record


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, because their content is not tested."""
    monkeypatch.setattr(plots, "DPI", 30)


def run(tmp_path: Path) -> int:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    folders = ["--records", str(tmp_path / "records"), "--plots", str(tmp_path / "plots"), "--readme", str(readme)]
    return main(["report", *folders])


def test_figures_pictures_and_sources_of_every_machine(tmp_path: Path) -> None:
    written(tmp_path / "records", "A CPU", "cpu", "2026-03-01")
    written(tmp_path / "records", "A GPU")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "holiday.png").write_bytes(b"mine")
    assert run(tmp_path) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.BEGIN}\n**GPU, A GPU**")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old figures" not in text
    assert "No GPU record" not in text
    assert text.index("**GPU, A GPU**") < text.index("**CPU, A CPU**, 2 threads, torch 2.11")
    assert "`python -m fastenc bench gpu --on A GPU` on 2026-01-02 at ccccccccc" in text
    row = "| channel 4, layers 2 1, 3×8×7×6, batch 2, float32, forward | 4000 | 2000 | 1000 | 4.00 (4.00–4.00) | 2.00"
    assert row in text
    assert "| 0.25 | fastenc graphed, 500.0 ms |" in text
    assert "| 2×8×5×4×3 channels_last, float32, backward | 4000 |" in text
    row = "| MONAI UNet, 1×8×8×8, batch 2, bfloat16 autocast, training step | 4000 | 3000 | 2000 | 1000 | 3.00 (3.00"
    assert row in text, "against the faster of the two untouched layouts"
    assert "2×1×8×8×8" not in text, "in its own table"
    added = "2×4×5×4×3 contiguous, float32, forward, with a residual |"
    assert text.count("2×4×5×4×3") == text.count(added) > 0, "of operations the largest only"
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    names = product(("a-gpu", "a-cpu"), plots.PICTURES, plots.THEMES)
    assert (tmp_path / "plots" / "holiday.png").read_bytes() == b"mine", "a third-party file"
    assert pictures - {"holiday.png"} == {f"{machine}-{picture}-{theme}.png" for machine, picture, theme in names}
    assert all(f'"plots/{name}"' in text for name in pictures - {"holiday.png"})
    assert text.count('; CPU, A CPU"></picture>') == text.count('; GPU, A GPU"></picture>') == len(plots.PICTURES)


def test_brief_has_one_line_per_workload(tmp_path: Path) -> None:
    record = written(tmp_path / "records", "A GPU")
    lines = table.brief(record).splitlines()
    assert len(lines) == len(record.workloads)
    share = 100 * (record.workloads[0].floor or 0.0)
    assert lines[0] == (
        f"{record.workloads[0]}: fastenc 1000 ms, 3.00 (3.00–3.00) × eager channels_last_3d, "
        f"2.00 (2.00–2.00) × torch.compile, fastest fastenc graphed 500.0 ms, {share:.0f} % of the floor"
    )


def test_the_newest_measurement_of_a_workload_counts_and_noise_is_called_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "draw", lambda *arguments: [])
    written(tmp_path / "records", "A CPU", "cpu", "2026-03-01", noise=9.0)
    written(tmp_path / "records", "A CPU", "cpu", "2026-02-01")
    (tmp_path / "records" / "A-CPU-2026-02-01.json").rename(tmp_path / "records" / "Z.json")
    assert run(tmp_path) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "≈ 1: 4.00 (4.00–4.00)" in text
    assert "2026-03-01" in text
    assert "2026-02-01" not in text
    assert "No GPU record exists yet" in text
    assert "python3 -m fastenc bench gpu" in text


@pytest.mark.parametrize("present", ["nothing", "another schema", "no time"])
def test_without_a_record_nothing_is_written(tmp_path: Path, present: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    records.mkdir()
    if present == "another schema":
        (records / "old.json").write_text('{"schema": "fastenc-record-1"}')
    elif present == "no time":
        record = written(records, "A CPU", "cpu")
        bare = tuple(dataclasses.replace(each, results=()) for each in record.workloads)
        write(dataclasses.replace(record, workloads=bare), records / "A-CPU-2026-01-02.json")
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        "fastenc-record-1" if present == "another schema" else "without a record there is nothing to report"
    ) in error
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert not (tmp_path / "plots").exists()


def test_a_readme_without_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "records", "A CPU", "cpu")
    (tmp_path / "other.md").write_text("no markers")
    arguments = ["--plots", str(tmp_path / "plots"), "--readme", str(tmp_path / "other.md")]
    assert main(["report", "--records", str(tmp_path / "records"), *arguments]) == 2
    assert "needs the markers" in capsys.readouterr().err


def test_readmes_figures_are_those_of_the_committed_records() -> None:
    """README contains no figure that is not in a record."""
    files = sorted((ROOT / "bench" / "records").glob("*.json"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = text.split(report.BEGIN)[1].split(report.END)[0]
    if not files:
        assert figures == f"\n{report.NO_GPU}"
        return
    assert figures == "\n" + report.figures(
        report.read(files), sorted((ROOT / "bench" / "figures").glob("*.png")), ROOT
    )
