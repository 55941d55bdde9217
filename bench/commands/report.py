"""`report`: write README's tables and pictures from records. Every figure there comes from a record."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from fastenc.commands.shell import write_whole

from .. import arguments as options
from ..baselines.suite import EAGER, FASTENC
from ..engine.machine import CHECKOUT
from ..engine.record import Record, Workload, load
from ..engine.session import latest
from ..engine.table import against, milliseconds, share

PURPOSE = "write README's tables and pictures from records"
MOST_ROWS = 8  # networks in a table; a record begins with the most important workloads
BENCH = CHECKOUT / "bench"
NO_GPU = """\
No GPU record exists yet: nothing here has been timed on a GPU, and this README claims no speed there. On a GPU machine,
from a checkout, this measures it (timings and tests; one JSON record, one table):

```sh
python3 -m fastenc bench gpu --out bench-out --minutes 8
```
"""
FASTEST = "fastest of fastenc"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
ALT = {
    "speedup": "Speed-up of EncoderNet3d over eager PyTorch, for every baseline",
    "clients": "Speed-up of nnU-Net's and MONAI's U-Nets over the unchanged networks, for every baseline",
    "roofline": "Fraction of copy bandwidth that the fused operation and its baselines reach, over the size of x",
    "memory": "Peak memory of EncoderNet3d, for every baseline",
    "batch": "Time of EncoderNet3d over batch size, for every baseline",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument(
        "--records", type=Path, nargs="+", metavar="PATH", default=[BENCH / "records"],
        help="records, or folders of them (default: the checkout's bench/records)",
    )  # fmt: skip
    parser.add_argument(
        "--plots", type=Path, default=BENCH / "figures", metavar="DIR", help="(default: the checkout's bench/figures)"
    )
    parser.add_argument(
        "--readme", type=Path, default=CHECKOUT / "README.md", metavar="FILE",
        help="write the tables between the markers of this file (default: the checkout's README.md)",
    )  # fmt: skip
    parser.epilog = (
        "exit status: 0 done; 2 no record, an unreadable record, no markers, or a folder that cannot be written"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        records = read(arguments.records)
        before = arguments.readme.read_text(encoding="utf-8")
        if before.count(BEGIN) != 1 or before.count(END) != 1:
            raise ValueError(f"{arguments.readme}: needs the markers {BEGIN} and {END} once each")
        from . import plots
    except (OSError, ValueError) as error:
        return options.refuse("report", str(error))
    except ImportError as error:
        return options.refuse("report", f"needs matplotlib: {error}")
    problem = options.folder_problem(arguments.plots, "--plots")
    if problem is not None:
        return options.refuse("report", problem)
    drawn: list[Path] = []
    for own in machines(records):
        drawn += plots.draw(own, arguments.plots, own[0].machine.slug, tuple(plots.THEMES))
    head, rest = before.split(BEGIN)
    text = f"{head}{BEGIN}\n{figures(records, drawn, arguments.readme.parent)}{END}{rest.split(END)[1]}"
    write_whole(arguments.readme, text)
    print(f"{arguments.readme}: figures of {len(records)} records; {len(drawn)} pictures in {arguments.plots}")
    return 0


def read(paths: Sequence[Path]) -> list[Record]:
    """The records at `paths`, which are files or folders. Raises ValueError if none of them has a time."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    records = [load(file) for file in files]
    if not any(each.measured for record in records for each in record.workloads):
        places = ", ".join(map(str, paths))
        raise ValueError(f"--records: no record with a time in {places}: without a record there is nothing to report")
    return records


def machines(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each machine, by its name. GPUs come first."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.machine.device == "cpu", record.date)):
        found.setdefault(record.machine.name, []).append(record)
    return list(found.values())


def figures(records: Sequence[Record], pictures: Sequence[Path], readme: Path) -> str:
    """The text between README's markers: a section for each machine, GPUs first.

    Args:
        records: of any machines.
        pictures: drawn from these records, and possibly others.
        readme: README's folder, to which links are relative.
    """
    parts = [section(own, pictures, readme) for own in machines(records)]
    if not any(record.machine.device == "cuda" for record in records):
        parts.append(NO_GPU)
    return "".join(parts)


def section(records: Sequence[Record], pictures: Sequence[Path], readme: Path) -> str:
    """The section of one machine: its name and software, its pictures and its tables. records: the newest is last."""
    machine, workloads = records[-1].machine, latest(records)
    text = [f"**{machine.label}**{_software(records[-1])}. {_sources(records, workloads)}\n"]
    for name, alt in ALT.items():
        for light in (path for path in pictures if path.name == f"{machine.slug}-{name}-light.png"):
            dark = light.with_name(light.name.replace("-light.png", "-dark.png"))
            here, there = (Path(os.path.relpath(path, readme)).as_posix() for path in (light, dark))
            text.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{there}">'
                f'<img src="{here}" alt="{alt}; {machine.label}"></picture>'
            )
    text += [""] if len(text) > 1 else []
    ops = [each for each in workloads if each.network is None and each.client is None]
    largest = {each.kind: prod(each.shape) for each in sorted(ops, key=lambda each: prod(each.shape))}
    tables = [
        _table("network", [each for each in workloads if each.kind == "network"][:MOST_ROWS]),
        _table("accelerated", [each for each in workloads if each.kind == "client"], (EAGER, "eager channels_last_3d")),
        # Each direction and layout of the largest tensor. The pictures show the others.
        _table("instance_norm_prelu", [each for each in ops if prod(each.shape) == largest[each.kind]]),
    ]
    return "\n".join([*text, *filter(None, tables)]) + "\n"


def _software(record: Record) -> str:
    machine = record.machine
    versions = {"torch": machine.torch, "triton": machine.triton, "cuDNN": machine.cudnn, "driver": machine.driver}
    if machine.device == "cpu":
        versions = {"torch": machine.torch}
    threads = f", {record.settings.threads} threads" if machine.device == "cpu" else ""
    return threads + "".join(f", {name} {version}" for name, version in versions.items() if version is not None)


def _sources(records: Sequence[Record], workloads: Sequence[Workload]) -> str:
    used = [
        record for record in records if any(each == measured for measured in workloads for each in record.workloads)
    ]
    commands = "; ".join(
        f"`{record.command}` on {record.date[:10]} at "
        + (f"{record.commit[:9]}{' with changes' if record.dirty else ''}" if record.commit else "an unknown commit")
        for record in used
    )
    return f"From {commands}."


def _table(first: str, workloads: Sequence[Workload], unchanged: Sequence[str] = (EAGER,)) -> str:
    """A Markdown table with a row for each workload, or nothing without workloads.

    first: the first heading. unchanged: the baselines with the faster of which fastenc is compared.
    """
    if not workloads:
        return ""
    times = [*(name.removeprefix("eager ") for name in unchanged), "best torch.compile", "fastenc"]
    headings = [first, *(f"{name} ms" for name in times)]
    headings += ["× eager" if len(unchanged) == 1 else "× best untouched", "× best torch.compile"]
    if first == "instance_norm_prelu":
        headings += ["of copy bandwidth"]
    else:
        headings += ["of the floor", "peak memory ÷ eager's", FASTEST]
    rule = ["---" if text in (first, FASTEST) else "---:" for text in headings]
    rows = [[_label(each), *_times(each, unchanged), *_memory_and_fastest(each)][: len(headings)] for each in workloads]
    return "".join(f"| {' | '.join(row)} |\n" for row in (headings, rule, *rows))


def _label(workload: Workload) -> str:
    """What runs, the shape of its input, and how it runs, as a cell."""
    how, size = f"{workload.precision}, {workload.mode}", "×".join(map(str, workload.shape[1:]))
    if workload.model:
        return f"{workload.model}, {size}, batch {workload.shape[0]}, {how}"
    residual = ", with a residual" if workload.kind == "instance_norm_add_prelu" else ""
    return f"{workload.shape[0]}×{size} {workload.layout}, {how}{residual}"


def _times(workload: Workload, unchanged: Sequence[str]) -> list[str]:
    """Cells: the times of `unchanged`, torch.compile and fastenc, fastenc's gains, and the floor over its time."""
    plain, fused = [workload.timed(name) for name in unchanged], workload.timed(FASTENC)
    compiled = workload.fastest("torch.compile")
    rivals = [plain[0] if len(plain) == 1 else workload.fastest(EAGER), compiled]
    cells = ["" if one is None else milliseconds(one.median) for one in (*plain, compiled, fused)]
    cells += ["" if one is None else against(workload, one.over_fastenc) for one in rivals]
    return [cell or "–" for cell in (*cells, "" if fused is None else share(workload, fused))]


def _memory_and_fastest(workload: Workload) -> list[str]:
    """Cells: fastenc's peak memory over eager's, and the fastest form of fastenc."""
    eager, fused, best = workload.timed(EAGER), workload.timed(FASTENC), workload.fastest(FASTENC)
    memory = "" if eager is None or fused is None else "–"
    if eager is not None and fused is not None and eager.peak_memory and fused.peak_memory is not None:
        memory = f"{fused.peak_memory / eager.peak_memory:.2f}"
    return [memory, "" if best is None else f"{best.peer}, {milliseconds(best.median)} ms"]
