"""A record as text: heading, tables, and one line per workload."""

from __future__ import annotations

from .. import console
from ..baselines.suite import EAGER, FASTENC
from .record import Record, Result, Workload
from .summary import Ratio

HEADINGS = (
    "", "ms", "p20–p80", "× eager", "time ÷ fastenc's", "floor", "GB/s", "peak MB", "1st call s", "difference",
)  # fmt: skip
LEGEND = (
    "× eager: eager's time over the baseline's; above 1 the baseline is faster. time ÷ fastenc's: the baseline's time "
    "over fastenc's, with p20–p80 of the rounds; ≈ 1: within the noise between two runs of the same version, given for "
    "each workload. floor: the physical floor over the time. GB/s: the least bytes that must be read and written, over "
    "the time. peak MB: on a GPU it includes cuDNN's workspaces, which benchmark mode lets grow to the largest "
    "free block. 1st call: includes all compilation. difference: the relative L2 distance from the exact run, of the "
    "output or gradient that is nearest to its tolerance."
)


def title(workload: Workload) -> str:
    """The workload with its floor and its noise."""
    floor = "" if workload.floor is None else f", floor {milliseconds(workload.floor)} ms"
    noise = "" if workload.noise is None else f", noise ×{workload.noise:.3g}"
    return f"{workload}{floor}{noise}"


def milliseconds(seconds: float) -> str:
    """Seconds as text in milliseconds, with four digits."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:#.4g}".rstrip(".")


def megabytes(count: int) -> str:
    """Bytes as text in megabytes, with at least three digits."""
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def against(workload: Workload, ratio: Ratio | None) -> str:
    """A ratio with p20–p80 as text, marked "≈ 1" if it is within the noise."""
    if ratio is None:
        return ""
    text = f"{ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f})"
    return f"≈ 1: {text}" if workload.within_noise(ratio) else text


def share(workload: Workload, result: Result) -> str:
    """The floor over the time, in percent; empty if the floor is not known."""
    return "" if workload.floor is None else f"{100 * workload.floor / result.median:.0f} %"


def cells(workload: Workload, result: Result) -> tuple[str, ...]:
    """The cells of one baseline, as in HEADINGS."""
    median = spread = floor = rate = ""
    if result.time is not None:
        median = milliseconds(result.time.median)
        spread = f"{milliseconds(result.time.p20)}–{milliseconds(result.time.p80)}"
        floor = share(workload, result)
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
    )


def text(record: Record) -> str:
    """A table for each workload that the run reached, with notes below it, then the workloads that it did not reach."""
    reached = [workload for workload in record.workloads if workload.reached()]
    groups = [[cells(workload, result) for result in workload.results] for workload in reached]
    blocks = []
    for workload, table in zip(reached, console.tables(HEADINGS, groups), strict=True):
        lines = [console.wrapped(title(workload)), table]
        notes: dict[str, list[str]] = {}
        for result in workload.results:
            note = ": ".join(filter(None, ["" if result.status == "ok" else result.status, result.note]))
            notes.setdefault(note, []).append(result.peer)
        lines += [console.wrapped(f"{', '.join(names)}: {note}") for note, names in notes.items() if note]
        blocks.append("\n".join(lines))
    left = [str(workload) for workload in record.workloads if not workload.reached()]
    return "\n\n".join(blocks + ([console.wrapped(f"not reached: {'; '.join(left)}")] if left else []))


def brief(record: Record) -> str:
    """One line per timed workload: fastenc, the fastest eager, the fastest torch.compile, and the fastest of all."""
    lines = []
    for workload in record.workloads:
        best, fused = workload.fastest(), workload.timed(FASTENC)
        if best is None:
            continue
        words = [f"fastest {best.peer} {milliseconds(best.median)} ms"]
        if fused is not None:
            rivals = [workload.fastest(EAGER), workload.fastest("torch.compile")]
            words = [
                f"fastenc {milliseconds(fused.median)} ms",
                *(f"{against(workload, one.over_fastenc)} × {one.peer}" for one in rivals if one is not None),
                *words,
            ]
            if workload.floor is not None:
                words.append(f"{share(workload, fused)} of the floor")
        lines.append(f"{workload}: {', '.join(words)}")
    return "\n".join(lines)


def heading(record: Record) -> str:
    """The run's machine, settings, tests and ceilings, in a few lines."""
    machine, settings, tests = record.machine, record.settings, record.tests
    software = {"driver": machine.driver, "CUDA": machine.cuda, "cuDNN": machine.cudnn, "triton": machine.triton}
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if version is not None)
    on = {True: "on", False: "off"}
    lines = [f"{machine.label}: Python {machine.python}, torch {machine.torch}" + (f", {versions}" if versions else "")]
    if machine.device == "cuda":
        lines.append(
            f"convolution TF32 {on[settings.cudnn_allow_tf32]}, matrix product TF32 {on[settings.matmul_allow_tf32]}, "
            f"cudnn.benchmark {on[settings.cudnn_benchmark]}, the same for all baselines"
        )
    else:
        lines.append(f"{settings.threads} threads, the same for all baselines")
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
