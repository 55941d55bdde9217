"""A record as a table of plain text."""

from __future__ import annotations

from .record import Record, Result, Workload

HEADINGS = ("", "ms", "p20–p80", "× eager", "GB/s", "of copy", "peak MB", "1st call s", "difference", "")


def table(record: Record) -> str:
    """Every workload with a row for every peer. GB/s counts the bytes an operation cannot avoid, read and written.

    × eager is eager's median over the peer's: above 1 is faster than eager.
    """
    lines: list[tuple[str, ...] | str] = [HEADINGS]
    for workload in record.workloads:
        lines.append(str(workload))
        times = {result.peer: result.time.median for result in workload.results if result.time is not None}
        eager, bandwidth = times.get("eager"), record.machine.copy_bandwidth
        lines += [_row(workload, result, eager, bandwidth) for result in workload.results]
    rows = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(line if isinstance(line, str) else _align(line, widths) for line in lines)


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    first, *figures, last = row
    cells = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:-1], strict=True)]
    return "  ".join([f"{first:<{widths[0]}}", *cells, last]).rstrip()


def _row(workload: Workload, result: Result, eager: float | None, copy_bandwidth: float | None) -> tuple[str, ...]:
    median = spread = ratio = rate = fraction = ""
    if result.time is not None:
        median = f"{result.time.median * 1e3:.3f}"
        spread = f"{result.time.p20 * 1e3:.3f}–{result.time.p80 * 1e3:.3f}"
        if eager is not None:
            ratio = f"{eager / result.time.median:.2f}"
        if workload.least_bytes is not None:
            bytes_per_second = workload.least_bytes / result.time.median
            rate = f"{bytes_per_second / 1e9:.3g}"
            fraction = "" if copy_bandwidth is None else f"{100 * bytes_per_second / copy_bandwidth:.0f} %"
    return (
        f"  {result.peer}",
        median,
        spread,
        ratio,
        rate,
        fraction,
        "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
        "" if result.first_call is None else f"{result.first_call:.1f}",
        "" if result.difference is None else f"{result.difference:.1e}",
        " ".join(filter(None, ["" if result.status == "ok" else f"{result.status}.", result.note])),
    )


def heading(record: Record) -> str:
    """What the run was made on and under which settings, in a few lines."""
    machine, settings, tests = record.machine, record.settings, record.tests
    software = {"driver": machine.driver, "CUDA": machine.cuda, "cuDNN": machine.cudnn, "triton": machine.triton}
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if version is not None)
    on = {True: "on", False: "off"}
    lines = [
        f"{machine.name}: Python {machine.python}, torch {machine.torch}" + (f", {versions}" if versions else ""),
        f"convolution TF32 {on[settings.cudnn_allow_tf32]}, matrix product TF32 {on[settings.matmul_allow_tf32]}, "
        f"cudnn.benchmark {on[settings.cudnn_benchmark]}, {settings.threads} CPU threads, the same for every peer",
        f"tests/gpu {tests.status}: {tests.passed} passed, {tests.failed} failed, {tests.errors} errors, "
        f"{tests.skipped} skipped in {tests.seconds:.0f} s",
    ]
    if machine.copy_bandwidth is not None and machine.matmul_rate is not None:
        bandwidth, rate = machine.copy_bandwidth / 1e9, machine.matmul_rate / 1e12
        lines.append(f"measured here: copy {bandwidth:.0f} GB/s, bf16 matrix product {rate:.2f} TFLOP/s")
    if record.note:
        lines.append(record.note)
    return "\n".join(lines)
