"""Pictures of records, drawn by matplotlib for the width of a README, in a light and a dark theme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
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
from ..engine.session import latest

WIDTH = 8.3  # inches: at a README width of 830 pixels, a 9-point font is about 12 pixels high
DPI = 200
THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "grid": "#d8dee4"},
    "dark": {"ink": "#e6edf3", "paper": "#0d1117", "grid": "#30363d"},
}
# Each baseline has the same colour in all pictures: fastenc orange or red, torch.compile blue, GroupNorm brown, eager
# grey.
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


def draw(records: Sequence[Record], folder: Path, stem: str, themes: Sequence[str] = ("light",)) -> list[Path]:
    """Draw every picture for which the records have figures, and return the files.

    Args:
        records: all from one machine, which each picture names.
        folder: where `{stem}-{picture}-{theme}.png` are written.
        stem: the beginning of the files' names.
        themes: keys of THEMES.
    """
    workloads, written = latest(records), []
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


def _title(workload: Workload) -> str:
    size = "×".join(map(str, workload.shape[2:]))
    return f"{workload.mode}, batch {workload.shape[0]}\n{workload.precision}, {size}\n{workload.model}"


def _short(baseline: str) -> str:
    """A short form of a baseline's name, such as "max-autotune, channels-last"."""
    name = baseline.replace(" channels_last_3d", ", channels-last")
    return re.sub("torch.compile (?=max-|reduce-)", "", name)


def _bars(
    workloads: Sequence[Workload],
    theme: dict[str, str],
    spread: Callable[[Result], tuple[float, float, float] | None],
    form: str,
    label: str,
    floor_of: Callable[[Workload], float] = lambda workload: 0.0,
) -> Figure | None:
    """Panels of horizontal bars, two side by side: one for each workload, with a bar for each timed baseline.

    Args:
        spread: a bar's length, and the ends of the line that shows how it varies; None for no bar.
        form: the format of a length.
        label: below the panels.
        floor_of: where to draw the physical floor; nowhere if it is 0 or far beyond the bars.
    """
    workloads = [each for each in workloads if each.measured][:MOST_PANELS]
    if not workloads:
        return None
    across = min(2, len(workloads))
    longest = [max(len(each.measured) for each in workloads[i : i + across]) for i in range(0, len(workloads), across)]
    figure, panels = _grid(len(workloads), [0.21 * count + 0.95 for count in longest], 0.5)
    floors = ""
    for i, (panel, workload) in enumerate(zip(panels, workloads, strict=True)):
        most, title = 0.0, _title(workload)
        for at, result in enumerate(workload.measured):
            if (lengths := spread(result)) is None:
                continue
            value, low, high = lengths
            panel.barh(at, value, color=COLOURS.get(result.peer, OTHER), height=0.74)
            if low < high:
                panel.errorbar(value, at, xerr=[[value - low], [high - value]], fmt="none", ecolor=theme["ink"],
                               elinewidth=0.8, capsize=1.5)  # fmt: skip
            text = format(value, form)
            panel.annotate(text, (high, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
            most = max(most, high)
        right, floor = 1.2 * most, floor_of(workload)
        if 0 < floor <= FARTHEST_FLOOR * most:
            right, title = max(right, 1.05 * floor), f"{title}, floor at {floor:#.3g}"
            floors = "; dashed: physical floor"
            panel.axvline(floor, color=theme["ink"], linewidth=1, linestyle=DASHES)
        panel.set_xlim(0, right)
        panel.set_title(title)
        panel.set_ylim(longest[i // across] - 0.4, -0.6)  # bars of one height side by side
        panel.set_yticks(range(len(workload.measured)), [_short(result.peer) for result in workload.measured])
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x")
    figure.supxlabel(label + floors, fontsize=9)
    return figure


def speedups(workloads: Sequence[Workload], theme: dict[str, str], kind: str = "network") -> Figure | None:
    """The speed-up over eager of every baseline on networks of one kind, with the physical floor."""

    def spread(result: Result) -> tuple[float, float, float] | None:
        if result.peer == EAGER:
            return 1.0, 1.0, 1.0
        ratio = result.over_eager
        return None if ratio is None else (ratio.median, ratio.p20, ratio.p80)

    def floor_of(workload: Workload) -> float:
        eager = workload.timed(EAGER)
        return 0.0 if eager is None or workload.floor is None else eager.median / workload.floor

    chosen = [each for each in workloads if each.kind == kind and each.timed(EAGER)]
    return _bars(chosen, theme, spread, ".2f", "speed-up over eager, with p20–p80 of the rounds", floor_of)


def memory(workloads: Sequence[Workload], theme: dict[str, str]) -> Figure | None:
    """The peak memory of every baseline on every EncoderNet3d."""

    def spread(result: Result) -> tuple[float, float, float]:
        return ((result.peak_memory or 0) / 1e9,) * 3

    chosen = [each for each in workloads if each.kind == "network" and any(r.peak_memory for r in each.results)]
    label = "peak memory in GB: parameters, optimizer, input and the allocations of one call"
    return _bars(chosen, theme, spread, "#.3g", label)


def _grid(count: int, heights: Sequence[float], margin: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels, two side by side, in lines of these heights in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights) + margin), layout="constrained")
    axes = figure.subplots(len(heights), min(2, count), squeeze=False, height_ratios=heights, **options)
    panels = list(axes.flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _curves(
    panel: Any, workloads: Sequence[Workload], baselines: Sequence[str], point: Callable[[Workload, float], Any]
) -> None:
    """Draw a line for each baseline through point(workload, seconds) of the workloads."""
    for baseline, marker in zip(baselines, cycle(MARKERS)):
        results = ((each, each.timed(baseline)) for each in workloads)
        points = sorted(point(each, found.median) for each, found in results if found is not None)
        if points:
            style = {"color": COLOURS.get(baseline, OTHER), "markersize": 4, "label": _short(baseline)}
            panel.plot(*zip(*points, strict=True), marker + "-", **style)


def _baselines(workloads: Sequence[Workload]) -> list[str]:
    """The baselines that have a time in any of the workloads, in the order of the records."""
    have = {result.peer for each in workloads for result in each.measured}
    return [name for name in dict.fromkeys(r.peer for each in workloads for r in each.results) if name in have]


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
    figure, panels = _grid(len(chosen), [2.5] * ceil(len(chosen) / 2), 0.6, sharex=True, sharey=True)

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

    by_series = sorted((each for each in workloads if each.kind == "network"), key=lambda each: repr(series(each)))
    found = [list(group) for _, group in groupby(by_series, key=series)]
    found = [group for group in found if len({each.shape[0] for each in group}) > 1]
    if not found:
        return None
    figure, panels = _grid(len(found), [3.0] * ceil(len(found) / 2), 0.6)
    baselines = _baselines([each for group in found for each in group])
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
