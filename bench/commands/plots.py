"""Pictures of records, drawn by matplotlib for the width of a README, in a light and a dark theme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, groupby
from math import ceil, prod
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from ..baselines.suite import EAGER
from ..engine.floor import ITEMSIZE
from ..engine.record import Record, Result, Workload
from ..engine.session import bare

WIDTH = 8.3  # inches: at a README width of 830 pixels, a 9-point font is about 12 pixels high
DPI = 200
THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "grid": "#d8dee4"},
    "dark": {"ink": "#e6edf3", "paper": "#0d1117", "grid": "#30363d"},
}
# Each baseline has the same colour in all pictures.
COLOURS = {
    "eager": "#8c959f",
    "eager channels_last_3d": "#57606a",
    "fastenc": "#fb6a22",
    "fastenc recompute": "#d1242f",
    "fastenc frozen": "#ffab70",
    "fastenc graphed": "#a40e26",
    "fastenc torch.compile": "#e16f24",
    "torch.compile": "#54aeff",
    "torch.compile channels_last_3d": "#0969da",
    "torch.compile reduce-overhead": "#a5d6ff",
    "torch.compile reduce-overhead channels_last_3d": "#218bff",
    "torch.compile max-autotune": "#1f6feb",
    "torch.compile max-autotune channels_last_3d": "#0550ae",
    "GroupNorm(C, C)": "#d4a72c",
    "torch.compile GroupNorm(C, C)": "#9a6700",
}
OTHER = "#8250df"
MOST_PANELS = 6  # panels of bars in a picture; a record begins with the most important workloads
FARTHEST_FLOOR = 2.5  # a floor beyond 2.5 times the longest bar is not drawn, because the bars would become too short
MARKERS = "osD^vPX<>*"
DASHES = (0, (4, 2))


def colour(baseline: str) -> str:
    """The baseline's colour: fastenc orange or red, torch.compile blue, GroupNorm brown, eager grey."""
    return COLOURS.get(baseline, OTHER)


def latest(records: Iterable[Record]) -> dict[str, list[Workload]]:
    """The newest measurement of each workload, by the machine's name. GPUs come first."""
    found: dict[str, dict[Workload, Workload]] = {}
    for record in sorted(records, key=lambda record: (record.machine.device == "cpu", record.date)):
        measured = (each for each in record.workloads if any(result.time is not None for result in each.results))
        found.setdefault(record.machine.name, {}).update((bare(each), each) for each in measured)
    return {name: list(workloads.values()) for name, workloads in found.items()}


def draw(records: Sequence[Record], folder: Path, stem: str, themes: Sequence[str] = ("light",)) -> list[Path]:
    """Draw every picture for which the records have figures, and return the files.

    Args:
        records: all from one machine, which each picture names.
        folder: where `{stem}-{picture}-{theme}.png` are written.
        stem: the beginning of the files' names.
        themes: keys of THEMES.
    """
    ((_, workloads),) = latest(records).items() or (("", []),)
    written = []
    for name, picture in PICTURES.items():
        for theme in themes:
            with matplotlib.rc_context(style(THEMES[theme])):
                figure = picture(workloads, THEMES[theme])
                if figure is None:
                    continue
                figure.suptitle(records[0].machine.label, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
                written.append(folder / f"{stem}-{name}-{theme}.png")
                figure.savefig(written[-1], metadata={"Software": None})
    return written


def style(theme: dict[str, str]) -> Any:
    """matplotlib's settings for a theme."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        **dict.fromkeys(inked, theme["ink"]),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme["paper"]),
        "grid.color": theme["grid"],
        "grid.linewidth": 0.6,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "savefig.dpi": DPI,
    }


def timed(workload: Workload) -> list[Result]:
    """The results that have a time."""
    return [result for result in workload.results if result.time is not None]


def _networks(workloads: Iterable[Workload], kind: str = "network") -> list[Workload]:
    return [each for each in workloads if each.kind == kind and timed(each)]


def _title(workload: Workload) -> str:
    network, size = workload.network, "×".join(map(str, workload.shape[2:]))
    name: str = "" if workload.client is None else workload.client.name
    if network is not None:
        name = f"channel {network.channel}, layers {' '.join(map(str, network.layers))}"
    return f"{workload.mode}, batch {workload.shape[0]}\n{workload.precision}, {size}\n{name}"


def _baselines(workloads: Iterable[Workload]) -> list[str]:
    """The baselines that have a time in any of the workloads, in the order of the records."""
    chosen = list(workloads)
    have = {result.peer for each in chosen for result in timed(each)}
    return [baseline for baseline in dict.fromkeys(r.peer for each in chosen for r in each.results) if baseline in have]


def _short(baseline: str) -> str:
    """A short form of a baseline's name, such as "max-autotune, channels-last"."""
    name = baseline.replace(" channels_last_3d", ", channels-last")
    return re.sub("torch.compile (?=max-|reduce-)", "", name)


def _panels(workloads: Sequence[Workload], fill: Callable[[Any, Workload, list[str]], str]) -> Figure | None:
    """Panels of horizontal bars, two side by side: one for each workload, with a bar for each timed baseline.

    fill(axes, workload, baselines) draws the bars and returns an addition to the title.
    """
    if not workloads:
        return None
    workloads = workloads[:MOST_PANELS]
    across = min(2, len(workloads))
    lines = [workloads[i : i + across] for i in range(0, len(workloads), across)]
    heights = [0.21 * max(len(timed(each)) for each in line) + 0.95 for line in lines]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(lines), across, squeeze=False, height_ratios=heights)
    for panel in axes.flat[len(workloads) :]:
        panel.set_axis_off()
    for i, (panel, workload) in enumerate(zip(axes.flat, workloads, strict=False)):
        names = _baselines([workload])
        longest = max(len(timed(each)) for each in lines[i // across])
        panel.set_title(f"{_title(workload)}{fill(panel, workload, names)}")
        panel.set_ylim(longest - 0.4, -0.6)  # bars of one height side by side
        panel.set_yticks(range(len(names)), map(_short, names))
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x")
    return figure


def speedups(workloads: Sequence[Workload], theme: dict[str, str], kind: str = "network") -> Figure | None:
    """The speed-up over eager of every baseline on networks of one kind, with the physical floor."""
    drawn: list[float] = []  # the floors

    def fill(panel: Any, workload: Workload, names: list[str]) -> str:
        most = 1.0
        eager = next((r.time.median for r in timed(workload) if r.peer == EAGER and r.time is not None), None)
        for result in timed(workload):
            at, ratio = names.index(result.peer), result.over_eager
            if ratio is None and result.peer != EAGER:
                continue
            value, low, high = (1.0, 1.0, 1.0) if ratio is None else (ratio.median, ratio.p20, ratio.p80)
            panel.barh(at, value, color=colour(result.peer), height=0.74)
            if ratio is not None:
                panel.errorbar(value, at, xerr=[[value - low], [high - value]], fmt="none", ecolor=theme["ink"],
                               elinewidth=0.8, capsize=1.5)  # fmt: skip
            panel.annotate(f"{value:.2f}", (high, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
            most = max(most, high)
        right, more = 1.2 * most, ""
        floor = eager / workload.floor if workload.floor is not None and eager is not None else 0.0
        if 0 < floor <= FARTHEST_FLOOR * most:
            drawn.append(floor)
            right, more = max(right, 1.05 * floor), f", floor at {floor:#.3g}"
            panel.axvline(floor, color=theme["ink"], linewidth=1, linestyle=DASHES)
        panel.set_xlim(0, right)
        return more

    figure = _panels(_networks(workloads, kind), fill)
    if figure is not None:
        floors = "; dashed: physical floor" if drawn else ""
        figure.supxlabel(f"speed-up over eager, with p20–p80 of the rounds{floors}", fontsize=9)
    return figure


def memory(workloads: Sequence[Workload], theme: dict[str, str]) -> Figure | None:
    """The peak memory of every baseline on every EncoderNet3d."""

    def fill(panel: Any, workload: Workload, names: list[str]) -> str:
        most = 0.0
        for result in timed(workload):
            at, value = names.index(result.peer), (result.peak_memory or 0) / 1e9
            panel.barh(at, value, color=colour(result.peer), height=0.74)
            panel.annotate(f"{value:#.3g}", (value, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
            most = max(most, value)
        panel.set_xlim(0, 1.2 * most)
        return ""

    chosen = [each for each in _networks(workloads) if any(result.peak_memory for result in each.results)]
    figure = _panels(chosen, fill)
    if figure is not None:
        figure.supxlabel("peak memory in GB: parameters, optimizer, input and the allocations of one call", fontsize=9)
    return figure


def _grid(count: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, two side by side, each `height` inches high."""
    rows = ceil(count / 2)
    figure = Figure(figsize=(WIDTH, height * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, min(2, count), squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _curves(
    panel: Any, workloads: Sequence[Workload], baselines: Sequence[str], point: Callable[[Workload, float], Any]
) -> None:
    """Draw a line for each baseline through point(workload, seconds) of the workloads."""
    for baseline, marker in zip(baselines, cycle(MARKERS)):
        results = ((each, each.timed(baseline)) for each in workloads)
        points = sorted(point(each, found.time.median) for each, found in results if found is not None and found.time)
        if points:
            style = {"color": colour(baseline), "markersize": 4, "label": _short(baseline)}
            panel.plot(*zip(*points, strict=True), marker + "-", **style)


def _legend(figure: Figure, panels: Sequence[Any]) -> None:
    """One legend below the panels, for all their lines."""
    handles = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)


def roofline(workloads: Sequence[Workload], theme: dict[str, str]) -> Figure | None:
    """The fraction of copy bandwidth that the operation reaches, over the size of x."""
    ops = [each for each in workloads if each.kind == "instance_norm_prelu" and each.floor is not None]
    if not ops:
        return None
    sizes = Counter((each.dtype, each.mode != "forward", each.layout) for each in ops)
    most = max(sizes.values())
    chosen = sorted(panel for panel, count in sizes.items() if count > 1 or most == 1)
    figure, panels = _grid(len(chosen), 2.5, sharex=True, sharey=True)

    def point(workload: Workload, seconds: float) -> tuple[float, float]:
        return prod(workload.shape) * ITEMSIZE[workload.dtype] / 1e6, (workload.floor or 0.0) / seconds

    for panel, (dtype, backward, layout) in zip(panels, chosen, strict=True):
        here = [e for e in ops if (e.dtype, e.mode != "forward", e.layout) == (dtype, backward, layout)]
        _curves(panel, here, _baselines(ops), point)
        panel.axhline(1, color=theme["ink"], linewidth=1, linestyle=DASHES)
        panel.set_title(f"{'backward' if backward else 'forward'}, {layout}, {dtype}")
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.grid()
    figure.supxlabel("MB of x", fontsize=9)
    figure.supylabel("fraction of copy bandwidth", fontsize=9)
    _legend(figure, panels)
    return figure


def scaling(workloads: Sequence[Workload], theme: dict[str, str]) -> Figure | None:
    """Time over batch size, for networks that were timed at several batch sizes."""

    def series(workload: Workload) -> tuple[Any, ...]:
        return workload.mode, workload.precision, workload.network, workload.shape[2:]

    by_series = sorted(_networks(workloads), key=lambda each: repr(series(each)))
    found = [list(group) for _, group in groupby(by_series, key=series)]
    found = [group for group in found if len({each.shape[0] for each in group}) > 1]
    if not found:
        return None
    figure, panels = _grid(len(found), 3.0)
    baselines = _baselines(each for group in found for each in group)
    for panel, group in zip(panels, found, strict=True):
        _curves(panel, group, baselines, lambda workload, seconds: (workload.shape[0], 1e3 * seconds))
        floors = sorted((each.shape[0], 1e3 * each.floor) for each in group if each.floor is not None)
        if floors:
            panel.plot(*zip(*floors, strict=True), color=theme["ink"], linestyle=DASHES, linewidth=1, label="floor")
        batches = sorted({each.shape[0] for each in group})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.minorticks_off()
        panel.set_xlabel("batch")
        panel.set_ylabel("ms")
        panel.set_title(f"{group[0].mode}\n{_title(group[0]).split(chr(10), 1)[1]}")
        panel.grid()
    _legend(figure, panels)
    return figure


PICTURES: dict[str, Callable[[Sequence[Workload], dict[str, str]], Figure | None]] = {
    "speedup": speedups,
    "clients": partial(speedups, kind="client"),
    "roofline": roofline,
    "memory": memory,
    "batch": scaling,
}
