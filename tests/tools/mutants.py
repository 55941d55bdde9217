"""Breaks the product one line at a time and sees whether the tests notice: `make mutants`.

Each entry of mutants.toml is made in a copy of this tree, its tests are run there, and the line is put back. Exit
status 0 where every mutant was caught, 1 where one survived, 2 where the tests fail on the product as it is.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import tomllib
from rich.console import Console
from rich.progress import track
from rich.table import Table

Item, Result = TypeVar("Item"), TypeVar("Result")

ROOT = Path(__file__).parents[2]
MINUTES = 10  # a mutant that loops for ever is caught too
FAILED = 1  # pytest's exit status where a test failed; others mean that no test could say anything


@dataclass(frozen=True)
class Mutant:
    """One line of `file` with `before` replaced by `after`, which one of `tests` must notice."""

    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def made_of(self, source: str) -> str:
        """The mutated source. Raises ValueError where `before` is not there exactly once."""
        found = source.count(self.before)
        if found != 1:
            raise ValueError(f"{self.file} must hold {self.before!r} once, found {found} times ({self.what})")
        return source.replace(self.before, self.after)


def mutants() -> list[Mutant]:
    """Those of mutants.toml."""
    with open(Path(__file__).with_name("mutants.toml"), "rb") as file:
        entries = tomllib.load(file)["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def copied(to: Path) -> Path:
    """This tree as git sees it, committed or not, in a new folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    return to


def outcome(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status on `tests` in a tree, and the test that failed first, or else what pytest said last."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=60 * MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end after {MINUTES} minutes"
    lines = (done.stdout + done.stderr).splitlines() or ["nothing"]
    return done.returncode, next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])


def verdict(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the tests caught the mutant, and the first test that did or what happened instead."""
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(mutant.made_of(source))
    try:
        status, said = outcome(tree, mutant.tests)
    finally:
        path.write_text(source)
    if status == FAILED:
        return True, said.removeprefix("FAILED ").split(" - ")[0]
    return False, f"[bold red]survived[/], pytest ended with {status}: {said}"


def spread(run: Callable[[Path, Item], Result], items: Sequence[Item], trees: Sequence[Path]) -> Iterator[Result]:
    """run(tree, item) for every item, in as many trees at a time as there are."""
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(item: Item) -> Result:
        tree = free.get()
        try:
            return run(tree, item)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(one, items)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file or description holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    asked = parser.parse_args(arguments)
    chosen = [mutant for mutant in mutants() if asked.only in mutant.file or asked.only in mutant.what]
    if not chosen:
        parser.error(f"--only must be part of a mutant's file or description, got {asked.only!r}")
    files = sorted({test for mutant in chosen for test in mutant.tests})
    console = Console()
    table = Table("file", "break")
    table.add_column("caught by", overflow="fold")
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        trees = [copied(Path(folder) / str(job)) for job in range(asked.jobs)]
        sound = spread(lambda tree, test: outcome(tree, [test]), files, trees)
        for test, (status, said) in zip(files, track(sound, "as it is", len(files), console=console), strict=True):
            if status != 0:
                console.print(f"{test} must pass on the product as it is, but pytest ended with {status}: {said}")
                return 2
        found = spread(verdict, chosen, trees)
        for mutant, (noticed, said) in zip(chosen, track(found, "mutants", len(chosen), console=console), strict=True):
            caught += noticed
            table.add_row(mutant.file, mutant.what, said)
    console.print(table)
    console.print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
