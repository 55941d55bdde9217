"""Rehearses the first run on a GPU machine, on one without a GPU: `make rehearsal`.

It builds an environment with the versions that such machines have (several GB), runs in it all that does not need the
GPU itself, and prints one table. Exit status 0 if every step passed, 1 if one failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = (
    "torch==2.11.0",
    "triton==3.6.0",
    "numpy==2.3.5",
    "pytest==9.2.0",
    "hypothesis==6.170.15",
    "expecttest==0.3.0",
)
PYTHON = "3.12"
INTERPRETED = (
    "tests/op/test_forward_backward.py", "tests/op/test_residual.py", "tests/op/test_custom_ops.py",
    "tests/encoder/test_layers.py", "tests/encoder/test_memory_format.py", "tests/encoder/test_convolution.py",
)  # fmt: skip
VERSIONS = """
import platform, torch, triton, fastenc, fastenc.bench.commands.gpu
import fastenc.kernels.instance_norm_prelu_forward, fastenc.kernels.instance_norm_prelu_backward
print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
"""
COLLECT = """
import sys, pytest
from fastenc.bench.commands.gpu_tests import command
sys.exit(pytest.main([*command()[3:], "--collect-only", "-q"]))
"""
BENCH = """
import sys
from collections import Counter
from pathlib import Path
from fastenc.bench.__main__ import main
from fastenc.bench.engine.record import load
status = main(sys.argv[1:])
(path,) = Path(sys.argv[-1]).glob("*.json")
results = [result.status for workload in load(path).workloads for result in workload.results]
print(", ".join(f"{count} {name}" for name, count in Counter(results).items()))
sys.exit(status)
"""


def steps(out: Path, minutes: float) -> dict[str, list[str]]:
    """What runs, by name: the arguments of the environment's Python."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {
        "import": ["-c", VERSIONS],
        "private names of torch": [*pytest, "tests/encoder/test_torch_private.py"],
        "layouts on fake CUDA tensors": [str(Path(__file__).with_name("layouts.py"))],
        "collection of tests/gpu": ["-c", COLLECT],
        "bench gpu --device cpu": ["-c", BENCH, "gpu", "--device", "cpu", "--minutes", str(minutes), "--out", str(out)],
        "interpreted kernels": [*pytest, *INTERPRETED],
    }


def interpreter() -> str:
    """A Python of version PYTHON if there is one that starts, else the one that runs this."""
    found = shutil.which(f"python{PYTHON}")
    works = found is not None and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0
    return found if works and found is not None else sys.executable


def build(environment: Path) -> Path:
    """Make the environment if it is missing. Returns its Python."""
    python, built = environment / "bin" / "python", environment / "rehearsal"
    if not built.is_file() or built.read_text() != "\n".join(PINNED):
        subprocess.run([interpreter(), "-m", "venv", "--clear", environment], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        subprocess.run([python, *install, *PINNED], check=True)
        built.write_text("\n".join(PINNED))
    return python


def last_line(text: str) -> str:
    """The last line of an output that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def main() -> int:
    """Run every step and print the table."""
    parser = argparse.ArgumentParser(description="rehearse the first run on a GPU machine, without a GPU")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv" / "rehearsal", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=4.0, help="for bench gpu --device cpu (%(default)g)")
    arguments = parser.parse_args()
    python = build(arguments.environment.absolute())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rows, failed = [("step", "", "s", "")], 0
    with tempfile.TemporaryDirectory() as folder:
        for name, command in steps(Path(folder, "out"), arguments.minutes).items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            begin = time.monotonic()
            done = subprocess.run(
                [python, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            seconds = time.monotonic() - begin
            if done.returncode != 0:
                failed += 1
                print(done.stdout[-8000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            said = last_line(done.stdout) or last_line(done.stderr)
            rows.append((name, "failed" if done.returncode else "passed", f"{seconds:.0f}", said.strip("= ")[:100]))
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, result, seconds_text, said in rows:
        print(f"{name:{wide[0]}}  {result:{wide[1]}}  {seconds_text:>{wide[2]}}  {said}".rstrip())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
