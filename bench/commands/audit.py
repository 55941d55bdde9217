"""`audit`: compare what the kernels cost, for many shapes, with the ceilings. No GPU is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastenc.commands.shell import file_problem, write_whole

from ..arguments import refuse
from ..console import Progress
from ..engine.machine import commit
from ..proofs.audit.cases import ITEMSIZE, Case, cases, residual_shapes, shapes
from ..proofs.audit.rows import Compiled, Requests, Row, Variants, variant_violations, violations
from ..proofs.audit.table import print_requests, print_table, summary

PURPOSE = "check the kernels' bytes, registers, vector widths and variants against their ceilings, without a GPU"
SCHEMA = "fastenc-audit-2"
TARGETS: dict[str, int | str] = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# (precision, channels_last) in which the variants of Example 1, EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3), count.
EXAMPLES = tuple(product(ITEMSIZE, (True, False)))
MOST_PROCESSES = 8
DERIVED = ("moved", "ceiling", "split_excused")  # what JSON holds of a row besides its fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `audit`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.epilog = (
        "Example 1 is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3). exit status: 0 every ceiling holds; 1 a ceiling "
        "is broken; 2 the audit cannot run or FILE cannot be written; 130 stopped by Ctrl-C"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        import numpy  # noqa: F401
        from triton import knobs
    except ImportError as error:
        return refuse("audit", f"needs triton and numpy: {error}")
    if knobs.runtime.interpret:
        return refuse("audit", "TRITON_INTERPRET is set, so nothing can be compiled: unset it")
    if arguments.json is not None:
        problem = file_problem(arguments.json, "--json")
        if problem is not None:
            return refuse("audit", problem)
    audited = [*cases(shapes()), *cases(residual_shapes(), residual=True)]
    rows, variants, requests = audit(audited, min(MOST_PROCESSES, os.cpu_count() or 1))
    broken = [text for row in rows for text in violations(row)]
    broken += [text for each in variants for text in variant_violations(each)]
    if arguments.json is not None:
        write_whole(arguments.json, as_json(rows, variants, requests, broken))
    print_table(rows)
    print_requests(requests)
    print("\n".join(summary(rows, variants, broken)))
    return 1 if broken else 0


def audit(audited: Sequence[Case], processes: int) -> tuple[list[Row], list[Variants], list[Requests]]:
    """The rows of these cases, the variants of EXAMPLES, and the requests of one case of each branch.

    With one process, everything runs in this one.
    """
    from ..proofs.audit import findings as find

    by_variant = _grouped(audited, lambda case: (case.channels_last, case.dtype, case.backward, case.residual))
    by_shape = _grouped(audited, lambda case: (case.N, case.C, case.S))
    compiling = list(product(TARGETS, by_variant))
    results = iter(
        _results(
            [
                *(partial(find.compile_cases, TARGETS[target], group) for target, group in compiling),
                *(partial(find.count_cases, group) for group in by_shape),
                *(partial(find.example_variants, dtype, channels_last) for dtype, channels_last in EXAMPLES),
                *(partial(find.count_requests, case) for case in find.representatives(audited)),
            ],
            processes,
        )
    )
    compiled: dict[Case, dict[str, Compiled]] = {case: {} for case in audited}
    for target, group in compiling:
        for case, one in zip(group, next(results), strict=True):
            compiled[case][target] = one
    counts = {case: count for group in by_shape for case, count in zip(group, next(results), strict=True)}
    rows = [find.row_of(case, counts[case], compiled[case]) for case in audited]
    variants = [next(results) for _ in EXAMPLES]
    return rows, variants, [one for of_case in results for one in of_case]


def _grouped(audited: Sequence[Case], key: Callable[[Case], Any]) -> list[list[Case]]:
    """The cases, grouped by key."""
    groups: dict[Any, list[Case]] = {}
    for case in audited:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def _results(tasks: Sequence[Callable[[], Any]], processes: int) -> list[Any]:
    """Run the tasks and return their results in order."""
    with Progress(len(tasks)) as progress:

        def advance(result: Any) -> Any:
            progress.advance(1)
            progress.say("audit", progress.share())
            return result

        progress.say("audit", progress.share())
        if processes == 1:
            return [advance(task()) for task in tasks]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: workers ignore Ctrl-C
            try:
                futures = [pool.submit(task) for task in tasks]
            finally:
                signal.signal(signal.SIGINT, handler)
            try:
                for future in as_completed(futures):
                    advance(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            return [future.result() for future in futures]


def as_json(
    rows: Sequence[Row], variants: Sequence[Variants], requests: Sequence[Requests], broken: Sequence[str]
) -> str:
    """The whole audit as JSON."""
    import triton

    head, dirty = commit()
    found = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [dataclasses.asdict(row) | {name: getattr(row, name) for name in DERIVED} for row in rows],
        "variants": [dataclasses.asdict(each) for each in variants],
        "requests": [dataclasses.asdict(each) for each in requests],
        "violations": list(broken),
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
