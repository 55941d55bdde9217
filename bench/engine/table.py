"""A record as a table."""

from __future__ import annotations

import textwrap

from .. import columns
from ..baselines.registry import EAGER, FASTENC
from .record import Record, Result, Workload
from .summary import Ratio

HEADINGS = (
    "", "ms", "p20–p80", "× eager", "time ÷ fastenc's", "floor", "GB/s", "peak MB", "1st call s", "difference", "",
)  # fmt: skip
LEGEND = (
    "× eager: eager's time over the peer's, above 1 is faster. time ÷ fastenc's: the peer's time over fastenc's, with "
    "p20–p80 of the rounds; ≈ 1: within the noise of two runs of the same version, stated beside each workload. floor: "
    "the share of the physical floor that is reached. GB/s: bytes that cannot be avoided, read and written. 1st call: "
    "with all compiling. difference: relative L2 from the exact run, the output or gradient nearest its tolerance."
)


def rows(record: Record) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every workload that was reached in words, with a row of cells, as in HEADINGS, for every peer."""
    return [
        (title(workload), [cells(workload, result) for result in workload.results])
        for workload in record.workloads
        if workload.reached()
    ]


def not_reached(record: Record) -> str:
    """The workloads that the run never came to, in a line; empty if there are none."""
    left = [str(workload) for workload in record.workloads if not workload.reached()]
    return f"not reached: {'; '.join(left)}" if left else ""


def title(workload: Workload) -> str:
    """The workload, its floor and its noise."""
    floor = "" if workload.floor is None else f", floor {milliseconds(workload.floor)} ms"
    noise = "" if workload.noise is None else f", noise ×{workload.noise:.3g}"
    return f"{workload}{floor}{noise}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with four digits."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:#.4g}".rstrip(".")


def megabytes(count: int) -> str:
    """Bytes as megabytes, with at least three digits."""
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def against(workload: Workload, ratio: Ratio | None) -> str:
    """A ratio with its spread, said to be noise where it is."""
    if ratio is None:
        return ""
    text = f"{ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f})"
    return f"≈ 1: {text}" if workload.within_noise(ratio) else text


def cells(workload: Workload, result: Result) -> tuple[str, ...]:
    """One peer's row."""
    median = spread = floor = rate = ""
    if result.time is not None:
        median = milliseconds(result.time.median)
        spread = f"{milliseconds(result.time.p20)}–{milliseconds(result.time.p80)}"
        if workload.floor is not None:
            floor = f"{100 * workload.floor / result.time.median:.0f} %"
        if not workload.flops and workload.least_bytes is not None:
            rate = f"{workload.least_bytes / result.time.median / 1e9:.3g}"
    return (
        result.peer,
        median,
        spread,
        "" if result.over_eager is None else f"{result.over_eager.median:.2f}",
        against(workload, result.over_fastenc),
        floor,
        rate,
        "" if result.peak_memory is None else megabytes(result.peak_memory),
        "" if result.first_call is None else f"{result.first_call:.1f}",
        "" if result.difference is None else f"{result.difference:.1e}",
        ": ".join(filter(None, ["" if result.status == "ok" else result.status, result.note])),
    )


def text(record: Record) -> str:
    """The table as plain text, in as many parts as the terminal's width takes."""
    groups = rows(record)
    shown = [i for i in range(len(HEADINGS) - 1) if any(row[i] for _, group in groups for row in group)]
    lines = [[row[i] for i in shown] for row in (HEADINGS, *(row for _, group in groups for row in group))]
    wide = columns.widths(lines)
    body = []
    for name, group in groups:
        body += textwrap.wrap(name, columns.terminal())
        for part in columns.parts(wide, 1, columns.terminal()):
            for row in (HEADINGS, *group):
                body.append(columns.aligned([row[i] for i in shown], wide, part, right=True))
            body.append("")
        for note in dict.fromkeys(row[-1] for row in group if row[-1]):
            names = ", ".join(row[0] for row in group if row[-1] == note)
            body += textwrap.wrap(f"{names}: {note}", columns.terminal())
        body.append("")
    return "\n".join([*body, *textwrap.wrap(not_reached(record), columns.terminal())]).rstrip("\n")


def print_table(record: Record) -> None:
    """Print the table and its legend."""
    print("", text(record), "", *textwrap.wrap(LEGEND, columns.terminal()), sep="\n")


def brief(record: Record) -> str:
    """A line for each workload with a time: fastenc against the fastest eager and the fastest torch.compile."""
    lines = []
    for workload in record.workloads:
        best, fused = workload.fastest(), workload.timed(FASTENC)
        if best is None or best.time is None:
            continue
        words = [f"fastest {best.peer} {milliseconds(best.time.median)} ms"]
        if fused is not None and fused.time is not None:
            rivals = [workload.fastest(EAGER), workload.fastest("torch.compile")]
            words = [
                f"fastenc {milliseconds(fused.time.median)} ms",
                *(f"{against(workload, one.over_fastenc)} × {one.peer}" for one in rivals if one is not None),
                *words,
            ]
            if workload.floor is not None:
                words.append(f"{100 * workload.floor / fused.time.median:.0f} % of the floor")
        lines.append(f"{workload}: {', '.join(words)}")
    return "\n".join(lines)


def heading(record: Record) -> str:
    """What the run was made on and under which settings, in a few lines."""
    machine, settings, tests = record.machine, record.settings, record.tests
    software = {"driver": machine.driver, "CUDA": machine.cuda, "cuDNN": machine.cudnn, "triton": machine.triton}
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if version is not None)
    on = {True: "on", False: "off"}
    lines = [f"{machine.name}: Python {machine.python}, torch {machine.torch}" + (f", {versions}" if versions else "")]
    if machine.device == "cuda":
        lines.append(
            f"convolution TF32 {on[settings.cudnn_allow_tf32]}, matrix product TF32 {on[settings.matmul_allow_tf32]}, "
            f"cudnn.benchmark {on[settings.cudnn_benchmark]}, the same for every peer"
        )
    else:
        lines.append(f"{settings.threads} threads, the same for every peer")
    if tests.status != "not run":
        lines.append(
            f"tests/gpu {tests.status}: {tests.passed} passed, {tests.failed} failed, {tests.errors} errors, "
            f"{tests.skipped} skipped in {tests.seconds:.0f} s"
        )
    if machine.copy_bandwidth is not None:
        rates = "".join(
            f", {each.dtype} matrix product {each.rate / 1e12:.3g} TFLOP/s" for each in machine.matmul_rates
        )
        lines.append(f"measured here: copy {machine.copy_bandwidth / 1e9:.3g} GB/s{rates}")
    states = [
        f"{when} {state.temperature:.0f} °C, {state.sm_clock:.0f} MHz"
        for when, state in (("before", record.before), ("after", record.after))
        if state is not None and state.temperature is not None and state.sm_clock is not None
    ]
    lines += [", ".join(states)] if states else []
    return "\n".join([*lines, *([record.note] if record.note else [])])
