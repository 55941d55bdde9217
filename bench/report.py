"""`report`: from the committed records to README's tables and pictures. A figure without a record cannot get there."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import arguments as options
from .machine import CHECKOUT
from .record import Record, Workload, load
from .session import bare
from .table import against, milliseconds

PURPOSE = "write README's tables and pictures from the records; refuses where there is none"
BENCH = CHECKOUT / "bench"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
ALT = {
    "speedup": "Speed-up over eager PyTorch of every peer, with the physical floor",
    "roofline": "Fraction of the copy bandwidth that the fused operation and its peers reach, over tensor size",
    "memory": "Peak memory of every peer",
    "batch": "Time over batch size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument(
        "--records", type=Path, nargs="+", metavar="PATH", default=[BENCH / "records"],
        help="records, or folders of them (default: the checkout's bench/records)",
    )  # fmt: skip
    parser.add_argument(
        "--plots", type=Path, default=BENCH / "plots", metavar="DIR", help="(default: the checkout's bench/plots)"
    )
    parser.add_argument(
        "--readme", type=Path, default=CHECKOUT / "README.md", metavar="FILE",
        help="the file with the markers between which the tables go (default: the checkout's README.md)",
    )  # fmt: skip
    parser.epilog = "exit status: 0 done; 2 no record, one that cannot be read, no markers, or nowhere to write"


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        records = read(arguments.records)
        before = arguments.readme.read_text(encoding="utf-8")
        if before.count(BEGIN) != 1 or before.count(END) != 1:
            raise ValueError(f"{arguments.readme}: needs the markers {BEGIN} and {END} once each")
        from . import plots
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    except ImportError as error:
        return _refuse(f"needs matplotlib: {error}")
    problem = options.folder_problem(arguments.plots, "--plots")
    if problem is not None:
        return _refuse(problem)
    parts, drawn = [], set()
    for name in plots.latest(records):
        own = [record for record in records if record.machine.name == name]
        pictures = plots.draw(own, arguments.plots, slug(name), tuple(plots.THEMES))
        drawn.update(pictures)
        parts.append(section(own, pictures, arguments.readme.parent))
    for path in set(arguments.plots.glob("*.png")) - drawn:
        path.unlink()
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    arguments.readme.write_text(f"{head}{BEGIN}\n{''.join(parts)}{END}{tail}", encoding="utf-8")
    print(f"{arguments.readme}: figures of {len(records)} records; {len(drawn)} pictures in {arguments.plots}")
    return 0


def _refuse(why: str) -> int:
    print(f"fastenc bench report: {why}", file=sys.stderr)
    return 2


def read(paths: Sequence[Path]) -> list[Record]:
    """The records at `paths`, files or folders; ValueError where there is none, or none with a time."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    records = [load(file) for file in files]
    if not any(result.time for record in records for each in record.workloads for result in each.results):
        places = ", ".join(map(str, paths))
        raise ValueError(f"--records: no record with a time in {places}: without a record there is nothing to report")
    return records


def slug(name: str) -> str:
    """A machine's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def section(records: Sequence[Record], pictures: Sequence[Path], readme: Path) -> str:
    """One machine: what it is, its pictures, its tables."""
    from . import plots

    newest = max(records, key=lambda record: record.date)
    machine = newest.machine
    ((_, workloads),) = plots.latest(records).items()
    text = [f"**{machine.name}**{_software(newest)}. {_sources(records, workloads)}\n"]
    for light in (path for path in pictures if path.stem.endswith("-light")):
        dark = light.with_name(light.name.replace("-light.png", "-dark.png"))
        alt = next(words for name, words in ALT.items() if light.stem.endswith(f"-{name}-light"))
        here, there = (Path(os.path.relpath(path, readme)).as_posix() for path in (light, dark))
        text.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{there}">'
            f'<img src="{here}" alt="{alt}"></picture>\n'
        )
    networks = [each for each in workloads if each.kind == "network"]
    text += [_network_table(networks)] if networks else []
    ops = [each for each in workloads if each.kind == "instance_norm_prelu"]
    text += [_op_table(ops)] if ops else []
    return "\n".join(text) + "\n"


def _software(record: Record) -> str:
    machine = record.machine
    versions = {"torch": machine.torch, "triton": machine.triton, "cuDNN": machine.cudnn, "driver": machine.driver}
    if machine.device == "cpu":
        versions = {"torch": machine.torch}
    threads = f", {record.settings.threads} threads" if machine.device == "cpu" else ""
    return threads + "".join(f", {name} {version}" for name, version in versions.items() if version is not None)


def _sources(records: Sequence[Record], workloads: Sequence[Workload]) -> str:
    used = [
        record
        for record in records
        if any(each == measured for measured in workloads for each in record.workloads)
    ]
    commands = "; ".join(
        f"`{record.command}` on {record.date[:10]} at "
        + (f"{record.commit[:9]}{' with changes' if record.dirty else ''}" if record.commit else "an unknown commit")
        for record in used
    )
    return f"From {commands}."


def _network_table(networks: Sequence[Workload]) -> str:
    """A row for every peer of every network."""
    lines = [
        "| workload | peer | ms (p20–p80) | × eager | time ÷ fastenc's (p20–p80) | of the floor | peak memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for workload in networks:
        assert workload.network is not None
        size = "×".join(map(str, workload.shape[1:]))
        what = (
            f"channel {workload.network.channel}, layers {' '.join(map(str, workload.network.layers))}, {size}, "
            f"batch {workload.shape[0]}, {workload.precision}, {workload.mode}"
        )
        for result in workload.results:
            if result.status == "not here":
                continue
            lines.append(f"| {what} | {result.peer} | {_figures(workload, result)} |")
            what = ""
    return "\n".join(lines) + "\n"


def _figures(workload: Workload, result: object) -> str:
    return ""


def _op_table(ops: Sequence[Workload]) -> str:
    return ""
