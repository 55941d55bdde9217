"""`python -m fastenc demo`: encode patches of a real brain, and train on them, on every route of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import fastenc

from ..bench.arguments import chosen_device, device_problem, folder_problem, positive
from .demo_routes import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    WHY,
    Learned,
    Route,
    Row,
    available,
    encode,
    executed,
    train,
)
from .shell import write_whole

if TYPE_CHECKING:
    from ..bench.console import Progress
    from .demo_data import Patches

EXTRAS = ("matplotlib", "nibabel", "nilearn", "rich")
SEED = 0
TRAINING_PATCHES, HELD_OUT_PATCHES = 512, 128
# Example 1, EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3): its channels are T1 and both tissue maps.
EXAMPLE_1 = {"channel": 64, "layers": [3, 3, 3, 3, 3], "in_planes": 3, "out_length": 32}
# Predicts the tissue fractions from T1 alone. Its second input channel is ones; see `Patches.inputs`.
SMALL = {"channel": 8, "layers": [1, 1, 1], "in_planes": 2, "out_length": 2}
# The middle of two patches, because a CPU executes the kernels about a million times slower than a GPU.
EXECUTED = (slice(2), slice(None), slice(9, 22), slice(10, 22), slice(10, 20))
ENCODING_STEPS = 100  # an encoding's length on the progress bar, in training steps
COLOURS = ("#9ecae1", "#d55e00", "#009e73", "#000000")
FIGURE, RECORD = "demo.png", "demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.description = (
        "Encode patches of the MNI152 brain with EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3) by every route of this "
        "machine and compare; train a small network to tell how much of a patch is grey and white matter; write a PNG "
        "and a JSON."
    )
    parser.add_argument(
        "--steps", type=positive, default=250, metavar="N", help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="patches encoded, and trained on, at a time (%(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if available")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fastenc-demo"),
        metavar="FOLDER",
        help="for PNG and JSON (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo. Returns 0, 1 if routes disagree, or 2 if it cannot start."""
    problem = _cannot_start(arguments)
    if problem is not None:
        print(f"fastenc demo: error: {problem}", file=sys.stderr)
        return 2
    from ..bench import console
    from ..bench.engine.machine import describe, settings
    from . import demo_data

    device = chosen_device(arguments.device)
    volumes = demo_data.mni152()
    generator = np.random.default_rng(SEED)
    training = demo_data.draw(volumes, demo_data.TRAINING, TRAINING_PATCHES, generator)
    held_out = demo_data.draw(volumes, demo_data.HELD_OUT, HELD_OUT_PATCHES, generator)
    encoded = demo_data.draw(volumes, demo_data.HELD_OUT, arguments.batch, generator)

    with settings(tf32=False, benchmark=False) as used:
        machine = describe(device)
        print(f"{machine.label}, torch {machine.torch}, float32 without TF32", flush=True)
        routes, missing = available(device)
        with console.Progress(len(routes) * (ENCODING_STEPS + arguments.steps)) as progress:
            rows = encode(routes, EXAMPLE_1, encoded.volumes, device, SEED, lambda step: progress.say("encoding", step))
            rows += [Row(name, note=f"did not run: {reason}") for name, reason in missing.items()]
            progress.say("executing the compiled kernels")
            rows.append(executed(held_out.inputs[EXECUTED], SEED))
            progress.advance(len(routes) * ENCODING_STEPS)
            ran = {row.route for row in rows if row.difference is not None}
            trained = [route for route in routes if route.name in ran]
            learned = _train(progress, trained, training, held_out, arguments, device)
    print("", *_encoding_lines(rows, arguments.batch), "", *_training_lines(learned, demo_data.TISSUES), "", sep="\n")

    agree = all(row.agrees is not False for row in rows)
    record = {
        "versions": _versions(),
        "machine": asdict(machine),
        "settings": asdict(used),
        "options": {"steps": arguments.steps, "batch": arguments.batch, "device": device.type, "seed": SEED},
        "data": {
            "volume": "MNI152 template at 1 mm, as nilearn installs it",
            "patch": list(demo_data.PATCH_SHAPE),
            "training": {"patches": TRAINING_PATCHES, "slabs": demo_data.TRAINING},
            "held_out": {"patches": HELD_OUT_PATCHES, "slabs": demo_data.HELD_OUT},
        },
        "encoding": {"network": EXAMPLE_1, "channels": demo_data.CHANNELS, "rows": [asdict(row) for row in rows]},
        "agreement": {
            "agree": agree,
            "output_tolerance": OUTPUT_TOLERANCE,
            "gradient_tolerance": GRADIENT_TOLERANCE,
            "why": WHY,
        },
        "training": {
            "network": SMALL,
            "tissues": demo_data.TISSUES,
            "routes": [
                {
                    "route": result.route,
                    "seconds": result.seconds,
                    "r2": dict(zip(demo_data.TISSUES, result.r2, strict=True)),
                    "loss": result.loss,
                }
                for result in learned
            ],
        },
    }
    write_whole(arguments.out / RECORD, json.dumps(record, indent=1))
    title = f"fastenc demo on {machine.label}, torch {machine.torch}, float32, batch {arguments.batch}"
    _plot(arguments.out / FIGURE, title, rows, learned, held_out.fractions, demo_data.TISSUES)
    print(f"Wrote {FIGURE} and {RECORD} to {arguments.out.resolve()}")
    if not agree:
        print("The routes disagree.")
    return 0 if agree else 1


def _cannot_start(arguments: argparse.Namespace) -> str | None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'fastenc[demo]'"
    return device_problem(arguments.device) or folder_problem(arguments.out)


def _encoding_lines(rows: Sequence[Row], batch: int) -> list[str]:
    """The table of the encodings, with its title, a legend and the rows' notes."""
    from ..bench.console import tables, wrapped

    cells = [
        (
            row.route,
            "–" if row.milliseconds is None else f"{row.milliseconds:.4g}",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB",
            "–" if row.difference is None else f"{row.difference:.1e}" if row.difference else "0",
            {True: "yes", False: "NO", None: "–"}[row.agrees],
        )
        for row in rows
    ]
    legend = (
        "Channels: T1 and the maps of grey and white matter. Peak memory: what PyTorch allocates during the call, "
        "without parameters and input. Difference: the relative L2 distance from plain PyTorch, the largest of all "
        f"patches; up to {OUTPUT_TOLERANCE:g} is rounding. Executed: output and all gradients of a tiny network, "
        f"gradients up to {GRADIENT_TOLERANCE:g}; the time and memory of executed kernels say nothing about a GPU's."
    )
    return [
        wrapped(f"EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3) encodes a batch of {batch}, each 3×31×32×30"),
        *tables(("route", "ms per batch", "peak memory", "difference", "agrees"), [cells]),
        wrapped(legend),
        *(wrapped(f"{row.route}: {row.note}") for row in rows if row.note),
    ]


def _train(
    progress: Progress,
    routes: Sequence[Route],
    training: Patches,
    held_out: Patches,
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[Learned]:
    seen, unseen = ((patches.inputs, patches.fractions) for patches in (training, held_out))
    learned = []
    for route in routes:

        def show(step: int, loss: float, route: Route = route) -> None:
            progress.advance(1)
            progress.say(f"training, {route.name}", f"step {step} of {arguments.steps}, loss {loss:.3f}")

        options = {"steps": arguments.steps, "batch": arguments.batch, "device": device, "seed": SEED}
        learned.append(train(route, SMALL, seen, unseen, **options, on_step=show))
    return learned


def _training_lines(learned: Sequence[Learned], tissues: Sequence[str]) -> list[str]:
    """The table of what the routes learned, with its title."""
    from ..bench.console import tables

    headings = ("route", "training", *(f"R² {tissue}" for tissue in tissues))
    cells = [(each.route, f"{each.seconds:.1f} s", *(f"{value:.3f}" for value in each.r2)) for each in learned]
    return ["Tissue fractions of patches from another part of the brain", *tables(headings, [cells])]


def _versions() -> dict[str, str | None]:
    """The versions of the packages involved; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastenc": fastenc.__version__}
    for name in ("torch", "triton", "numpy", *EXTRAS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _plot(
    path: Path, title: str, rows: Sequence[Row], learned: Sequence[Learned], true: Tensor, tissues: Sequence[str]
) -> None:
    """Draw time and memory of each route above; training losses, and predicted over true fractions, below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.4), layout="constrained", dpi=150)
    figure.suptitle(title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 2])
    above, below = halves
    measured = [row for row in rows if row.milliseconds is not None and row.peak_bytes is not None]
    names, colours = [row.route for row in measured], COLOURS[: len(measured)]
    times, memories = above.subplots(1, 2, sharey=True)
    for axes, values, what in (
        (times, [row.milliseconds or 0 for row in measured], "Time to encode a batch, ms"),
        (memories, [(row.peak_bytes or 0) / 1e6 for row in measured], "Peak memory of that call, MB"),
    ):
        axes.bar_label(axes.barh(names, values, color=colours, height=0.6), fmt="%.4g", padding=4)
        axes.set(title=what, xlim=(0, 1.15 * max(values)))
    times.invert_yaxis()
    losses, *scatters = below.subplots(1, 1 + len(tissues), width_ratios=[1.5] + [1] * len(tissues))
    for i, (result, colour) in enumerate(zip(learned, COLOURS, strict=False)):
        label = result.route
        width = 1.0 + 3.0 * (len(learned) - 1 - i) / max(1, len(learned) - 1)
        losses.plot(range(1, len(result.loss) + 1), result.loss, color=colour, linewidth=width, label=label)
        for k, scatter in enumerate(scatters):
            scatter.plot(
                true[:, k],
                result.predicted[:, k],
                marker="o" if i == 0 else "x+."[i - 1],
                markersize=7 if i == 0 else 4,
                markerfacecolor="none" if i == 0 else colour,
                color=colour,
                linestyle="none",
                label=f"{result.route}, R² {result.r2[k]:.3f}",
            )
    losses.set(yscale="log", xlabel="training step", ylabel="mean squared error / variance of the targets")
    losses.set_title("Training loss; the curves overlap")
    for k, (scatter, tissue) in enumerate(zip(scatters, tissues, strict=True)):
        fractions = [true[:, k], *(result.predicted[:, k] for result in learned)]
        low, high = min(float(f.min()) for f in fractions), max(float(f.max()) for f in fractions)
        margin = 0.05 * (high - low)
        limits = (low - margin, high + margin)
        scatter.plot(limits, limits, color="0.5", linewidth=0.8, zorder=0)
        scatter.set(xlim=limits, ylim=limits, aspect="equal")
        scatter.set(xlabel=f"true fraction of {tissue}", ylabel="predicted fraction" if k == 0 else "")
        scatter.set_title(f"{tissue.capitalize()} in held-out patches")
    for axes in (times, memories, losses, *scatters):
        axes.grid(color="0.9", linewidth=0.6, axis="x" if axes in (times, memories) else "both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (losses, *scatters):
        axes.legend(frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())
